"""Benchmarks during training, logged beside the losses, without any effect on the training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt import Tokenizer

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.parallel.random_state import undisturbed
from litgpt_moe_ext.training.settings import EvaluateArgs

if TYPE_CHECKING:
    from litgpt_moe_ext.training.fabric import TrainingFabric


def check_benchmarks(args: EvaluateArgs) -> None:
    """Raise SettingsError unless every benchmark file can be read; needs no model."""
    if args.hellaswag is not None:
        from litgpt_moe_ext.evaluation.hellaswag import load_items

        try:
            load_items(args.hellaswag, limit=1)
        except (OSError, ValueError) as error:
            # The benchmark calls its own setting `file`.
            raise SettingsError(f"evaluate.hellaswag: {str(error).removeprefix('file: ')}") from error
    if args.tasks:
        from litgpt_moe_ext.evaluation.harness.tasks import load_task_file

        names: list[str] = []
        for file in args.tasks:
            try:
                names.append(str(load_task_file(file).config.task))
            except (OSError, ValueError) as error:
                raise SettingsError(f"evaluate.{error}") from error
        if repeated := {name for name in names if names.count(name) > 1}:
            raise SettingsError(
                f"evaluate.tasks: the task {', '.join(sorted(repeated))} is defined in several files; rename it in all "
                "but one of them (key `task`)"
            )


def make_benchmarks(
    args: EvaluateArgs, tokenizer: Tokenizer, tokenizer_dir: Path, block_size: int, fabric: TrainingFabric
) -> TrainingBenchmarks:
    """Return the callback that evaluates a model with this tokenizer and sequence length."""
    from litgpt_moe_ext.evaluation.harness.training import HellaSwag, TaskFile
    from litgpt_moe_ext.evaluation.hellaswag import load_items

    benchmarks: list[Any] = []
    if args.hellaswag is not None:
        items = load_items(args.hellaswag, args.max_items)
        benchmarks.append(HellaSwag(items, args, tokenizer, block_size, fabric))
    benchmarks += [TaskFile(file, args, tokenizer, tokenizer_dir, fabric) for file in args.tasks]
    return TrainingBenchmarks(benchmarks, args.every_steps)


class TrainingBenchmarks(Callback):
    """Evaluate after every validation or every so many steps, and after the last step.

    A signal that ends the run also ends an evaluation, which is repeated when the run is resumed.

    Args:
        benchmarks: Benchmarks of `litgpt_moe_ext.evaluation.harness.training`, or the like.
        every_steps: Optimizer steps between evaluations; None evaluates after every validation.
    """

    def __init__(self, benchmarks: Sequence[Any], every_steps: int | None) -> None:
        self._benchmarks, self._every_steps = benchmarks, every_steps
        self._evaluated_step: int | None = None
        self._interrupted = False

    def on_after_setup(self, fabric: TrainingFabric, module: Any) -> None:
        """Keep the model, uncompiled because the lengths of the texts differ from batch to batch."""
        self._fabric, self._model = fabric, module.module

    def on_fit_begin(self, resume_dir: Path | None) -> None:
        """Try the largest batches, so that failures show before training."""
        with undisturbed(self._fabric, self._model) as model:
            for benchmark in self._benchmarks:
                try:
                    benchmark.rehearse(model)
                except Exception as error:  # caused by a setting in any case
                    raise SettingsError(f"evaluate: {type(benchmark).__name__} does not work: {error}") from error

    def on_step_begin(self, state: dict[str, Any]) -> None:
        """Evaluate if one is due after the last step."""
        step = state["step_count"]
        if self._interrupted or (self._every_steps is not None and step and step % self._every_steps == 0):
            self._evaluate(step)

    def on_last_step(self, state: dict[str, Any]) -> None:
        """Evaluate the finished model, if not after its last validation."""
        if self._interrupted or self._every_steps is not None:
            self._evaluate(state["step_count"])

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """Evaluate after a validation, unless `every_steps` is set."""
        if self._every_steps is None and "val_loss" in metrics:
            self._evaluate(self._fabric.step)

    def _evaluate(self, step: int) -> None:
        if step == self._evaluated_step:
            return  # as where the last step has a validation of its own
        self._evaluated_step, started = step, time.perf_counter()
        self._interrupted = False
        scores: dict[str, float] = {}
        with undisturbed(self._fabric, self._model) as model:
            for benchmark in self._benchmarks:
                try:
                    scores |= benchmark.scores(model)
                except Exception as error:
                    if self._fabric.world_size > 1:
                        raise  # the other processes are waiting for this one in the benchmark
                    # A failed benchmark should not end the run.
                    name = type(benchmark).__name__
                    self._fabric.print(f"  {name} failed after step {step}: {type(error).__name__}: {error}")
                if self._fabric.agree_on_interruption():
                    self._evaluated_step, self._interrupted = None, True
                    self._fabric.print(f"  benchmarks stopped after step {step}; --resume auto runs them again")
                    return
        seconds = time.perf_counter() - started
        if scores:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
            self._fabric.print(f"  {shown} ({seconds:.1f} s)")
        self._fabric.log_dict(scores)

    def state_dict(self) -> dict[str, Any]:
        """Return whether an evaluation was interrupted."""
        return {"interrupted": True} if self._interrupted else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Evaluate before the next step if the evaluation was interrupted."""
        self._interrupted = bool(state["interrupted"])
