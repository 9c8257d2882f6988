"""A training run as a sequence of phases."""

from __future__ import annotations

from typing import TYPE_CHECKING

import litgpt_moe_ext
from litgpt_moe_ext.garbage import settled
from litgpt_moe_ext.software import software

if TYPE_CHECKING:
    from litgpt_moe_ext.training.loop import Outcome
    from litgpt_moe_ext.training.phases.equip import Equipment
    from litgpt_moe_ext.training.phases.launch import Launched
    from litgpt_moe_ext.training.phases.prepare import Prepared
    from litgpt_moe_ext.training.phases.start import Start
    from litgpt_moe_ext.training.settings import Settings


def run(settings: Settings) -> None:
    """Pretrain a model with LitGPT's own loop.

    Each phase takes the results of earlier ones, so none can run too early.

    Args:
        settings: The settings of the run.

    Raises:
        SettingsError: If a setting or an input is wrong; before any training.
        TrainingStopped: If training cannot go on.
        TrainingInterrupted: If a signal ended it.
    """
    litgpt_moe_ext.register()
    # These modules need the extended LitGPT, so they are imported after `register`.
    from litgpt_moe_ext.training.callbacks.kernel_report import check_kernels
    from litgpt_moe_ext.training.checkpoint.exports import export_checkpoints
    from litgpt_moe_ext.training.logs import TRANSCRIPT_FILE
    from litgpt_moe_ext.training.parallel.memory import check_memory, choose_place
    from litgpt_moe_ext.training.phases.equip import choose_equipment, equip
    from litgpt_moe_ext.training.phases.launch import launch
    from litgpt_moe_ext.training.phases.plan import make_plan
    from litgpt_moe_ext.training.phases.prepare import prepare_data
    from litgpt_moe_ext.training.phases.report import announce, conclude
    from litgpt_moe_ext.training.phases.start import find_start, move_earlier_run
    from litgpt_moe_ext.training.steps.epochs import with_epochs

    plan = make_plan(settings)
    with launch(plan) as launched:
        equipment = choose_equipment(launched)
        check_memory(launched)
        choose_place(launched)
        check_kernels(launched)
        launched, start = find_start(launched)
        prepared = prepare_data(launched, start)
        launched = with_epochs(launched, prepared)
        equip(launched, prepared, equipment)
        # All checks are done; from here on files are moved and written.
        start, prepared = move_earlier_run(launched, start, prepared)
        if launched.fabric.is_global_zero:
            launched.reporter.transcript.open(plan.out_dir / TRANSCRIPT_FILE)
            # In train.log only: what is needed to reproduce a result.
            launched.reporter.transcript.line(f"Code: {software()}")
        announce(launched, start, equipment)
        outcome = train(launched, start, prepared, equipment)
        conclude(launched, prepared, outcome)
        export_checkpoints(launched)


def train(launched: Launched, start: Start, prepared: Prepared, equipment: Equipment) -> Outcome:
    """Run LitGPT's loop to its end."""
    import litgpt.pretrain

    from litgpt_moe_ext.training.callbacks.retention import Retention
    from litgpt_moe_ext.training.compilation import compile_scope
    from litgpt_moe_ext.training.loop import HookedLoop
    from litgpt_moe_ext.training.parallel.memory import explaining_lack_of_memory
    from litgpt_moe_ext.training.phases.start import same_corpora
    from litgpt_moe_ext.training.steps.epochs import Epochs

    plan, settings, fabric = launched.plan, launched.plan.settings, launched.fabric
    loop = HookedLoop(launched, start, prepared.tokenizer_dir, equipment)
    retention = Retention(settings.checkpoint, plan.out_dir, fabric, loop.writer.save)
    epochs = Epochs(loop.save_step if settings.checkpoint.every_epoch else None)
    # The recipe's callbacks come last: if one ends the run, everything of the last step has been saved.
    for callback in (epochs, retention, *settings.callbacks):
        fabric.add_callback(callback)
    same = same_corpora(start, plan.plain)
    with explaining_lack_of_memory(launched), same, loop.installed(), compile_scope(equipment.compile), settled():
        litgpt.pretrain.main(
            fabric=fabric,
            devices=launched.devices,
            num_nodes=launched.num_nodes,
            seed=settings.seed,
            initial_checkpoint_dir=start.initial_checkpoint_dir,
            resume=start.resume_file or False,
            config=plan.config,
            data=prepared.data,
            out_dir=plan.out_dir,
            tokenizer_dir=prepared.tokenizer_dir,
            tokenizer=prepared.tokenizer,
            train=plan.train,
            eval=settings.eval.for_litgpt(),
            optimizer=settings.optimizer,
        )
    launched.reporter.close(fabric.step)
    return loop.outcome(retention.best_loss)
