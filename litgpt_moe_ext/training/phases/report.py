"""The messages of a run before its first step and after its last."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, cast

from litgpt_moe_ext.config.notes import model_notes
from litgpt_moe_ext.model_size import count_parameters
from litgpt_moe_ext.training.checkpoint.changes import resume_notes
from litgpt_moe_ext.training.checkpoint.compatibility import start_notes
from litgpt_moe_ext.training.checkpoint.progress import BEST, FINAL, step_of
from litgpt_moe_ext.training.logs import METRICS_FILE, TRANSCRIPT_FILE
from litgpt_moe_ext.training.parallel.accelerator import unused_gpu
from litgpt_moe_ext.wording import abbreviated, counted, in_shell

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.training.loop import Outcome
    from litgpt_moe_ext.training.phases.equip import Equipment
    from litgpt_moe_ext.training.phases.launch import Launched
    from litgpt_moe_ext.training.phases.plan import Plan
    from litgpt_moe_ext.training.phases.prepare import Prepared
    from litgpt_moe_ext.training.phases.start import Start


def announce(launched: Launched, start: Start, equipment: Equipment) -> None:
    """Say what is about to be trained, on what and for how long, and how a resumed run differs."""
    plan, fabric, say = launched.plan, launched.fabric, launched.fabric.print
    size = count_parameters(plan.config, bool(plan.train.tie_embeddings))
    say(
        f"{plan.config.name or 'model'}: {abbreviated(size.total)} parameters, {abbreviated(size.active)} "
        f"active per token, on {fabric.world_size} x {fabric.device.type}, {fabric.strategy.precision.precision}"
    )
    if fabric.device.type == "cpu" and (reason := unused_gpu()) is not None:
        say(f"  The GPU of this machine is not used: {reason}")
    say(str(equipment.compile))
    if fabric.device.type == "cuda":
        say(str(equipment.graphs))
    padding = " with padding" if getattr(plan.settings.data, "pads", False) else ""
    say(
        f"{counted(plan.total_steps, 'step')} of {counted(plan.tokens_per_step, 'token')}{padding}, checkpoints in "
        f"{plan.out_dir}"
    )
    for line in _cut(plan):
        say(line)
    for note in model_notes(cast("Config", plan.config)):
        say(f"  {note}")
    if start.initial_checkpoint_dir is not None:
        say(f"Starting from the weights in {start.initial_checkpoint_dir}")
        for note in start_notes(start.initial_checkpoint_dir, plan.config):
            say(f"  {note}")
    if start.resume_dir is not None:
        say(f"Resuming from {start.resume_dir}")
        if plan.settings.initial_checkpoint_dir is not None:
            say("  initial_checkpoint_dir is ignored: the run continues with its own weights")
        for note in resume_notes(start.resume_dir, plan.plain):
            say(f"  {note}")
        if (step := step_of(start.resume_dir) or 0) >= plan.total_steps:
            say(f"  This run is finished; to train longer, add{flags_to_continue(plan, step)}")


def conclude(launched: Launched, prepared: Prepared, outcome: Outcome) -> None:
    """Say what was trained, how well, and what to do with it."""
    plan, say = launched.plan, launched.fabric.print
    tokens = outcome.iterations * (plan.tokens_per_step // launched.accumulation)
    if tokens:
        duration = timedelta(seconds=round(outcome.seconds))
        padding = f", {outcome.padding:.0%} of them padding," if outcome.padding else ""
        say(
            f"Trained {counted(tokens, 'token')}{padding} in {duration} ({abbreviated(tokens / outcome.seconds)} tok/s)"
        )
    if launched.reporter.val_loss is not None:
        unigram = getattr(prepared.data, "unigram_loss", None)
        baseline = "" if unigram is None else f"; a model of token frequencies alone has {unigram:.3f}"
        say(f"Validation loss {launched.reporter.val_loss:.3f}{baseline}")
    best = plan.out_dir / BEST
    if outcome.best_loss is not None and best.is_dir():
        say(f"Best validation loss {outcome.best_loss:.3f} after step {step_of(best)}: {best}")
    if prepared.tokenizer is not None:
        final = in_shell(plan.out_dir / FINAL)
        say(f'Try it: litgpt generate {final} --prompt "..."')
        say(f"        litgpt chat {final}")
    say(f"Metrics: {plan.out_dir / METRICS_FILE}, log: {plan.out_dir / TRANSCRIPT_FILE}")
    say(f"To continue: --resume auto{flags_to_continue(plan, outcome.step)}")


def _cut(plan: Plan) -> Iterator[str]:
    """Yield a line for each setting that whole steps, or this many steps, cannot fulfil exactly."""
    train = plan.settings.train
    planned, rest = divmod(train.max_tokens, plan.tokens_per_step)
    if rest and plan.total_steps == planned + plan.steps_ahead:
        yield (
            f"  train.max_tokens: {train.max_tokens:,} ends within a step: nothing is trained on the last "
            f"{counted(rest, 'token')}"
        )
    if train.lr_warmup_steps and train.lr_warmup_steps >= planned:
        yield (
            f"  train.lr_warmup_steps: {train.lr_warmup_steps} of {counted(planned, 'step')}: the learning rate rises "
            "to the end and never falls"
        )


def flags_to_continue(plan: Plan, step: int) -> str:
    """Return the flags, each after a space, that let a training continue beyond `step`; empty if none are needed."""
    train, ahead = plan.settings.train, plan.steps_ahead
    planned = train.max_tokens // plan.tokens_per_step
    # More than 2 if the settings of a finished run have been shortened.
    times = 2 * max(1, -(-(step - ahead) // max(planned, 1)))
    planned += ahead
    more = (
        f" --train.max_tokens {times * train.max_tokens}"
        if train.epochs is None
        else f" --train.epochs {times * train.epochs}"
    ) + getattr(plan.settings.data, "flags_to_go_on", "")
    if train.max_steps is None:
        return more if step >= planned else ""
    if step >= planned:
        return f"{more} --train.max_steps null"
    if step >= train.max_steps:
        return f" --train.max_steps {min(2 * step, planned)}"
    return ""
