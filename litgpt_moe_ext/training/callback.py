"""What hangs on the training loop: the events of a run, as methods of one base class.

A recipe adds callbacks of its own by their class path, and `examples/add_a_callback.py` is a whole one:

    callbacks:
      - class_path: examples.add_a_callback.StopWhenGood
        init_args: {loss: 2.5}

A method that is not overridden does nothing. A subclass whose `on_...` method is not one of these events, or takes
other arguments, is refused when it is defined: it would never be called, or fail in the middle of a run.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.errors import did_you_mean

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from litgpt_moe_ext.training.fabric import TrainingFabric


class Callback:
    """Base class of everything that acts on the events of a run. Methods are called on every process.

    The events of one optimizer step come in this order: `on_step_begin`, `on_batch` for every micro-batch,
    `on_gradients_clipped`, `on_after_optimizer_step`, then `on_log` and `on_logged` if the step is logged.

    A callback that a recipe names keeps each argument of its constructor under its name (or with `_` before it), as a
    dataclass does: checkpoints write it down with the other settings of the run.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for owner in cls.__mro__:  # classes beside this one may have events as well
            if owner is not Callback:
                for name, method in vars(owner).items():
                    if name.startswith("on_") and callable(method):
                        _check_event(owner, name, method)

    def on_before_setup(self, model: torch.nn.Module) -> None:
        """Change LitGPT's model before a strategy or a compiler wraps it.

        Its weights must keep their names and shapes, by which checkpoints are opened; `requires_grad` may change.

        Args:
            model: A `litgpt.GPT` with its initial weights.
        """

    def on_after_setup(self, fabric: TrainingFabric, module: torch.nn.Module) -> None:
        """Keep what later events need.

        Args:
            fabric: The fabric of the run.
            module: The model as it trains, wrapped by Fabric; `module.module` is LitGPT's.
        """

    def on_fit_begin(self, resume_dir: Path | None) -> None:
        """Get ready: training is about to start.

        Args:
            resume_dir: The checkpoint directory it resumes from, if it does.
        """

    def on_flops_counted(self, flops_per_token: float) -> None:
        """Note what the model costs.

        Args:
            flops_per_token: Floating point operations of forward and backward pass.
        """

    def on_step_begin(self, state: dict[str, Any]) -> None:
        """Act between two optimizer steps, before the first micro-batch of the next one is fetched.

        Args:
            state: LitGPT's training state: `model`, `optimizer`, `train_dataloader`, `iter_num`, `step_count`.
        """

    def on_batch(self, batch: Tensor, waited: float) -> None:
        """See a micro-batch that was fetched.

        Args:
            batch: Token ids, (B, T + 1), int64.
            waited: Seconds that fetching it took.
        """

    def on_gradients_clipped(
        self, norm: Tensor | None, module: torch.nn.Module, optimizer: torch.optim.Optimizer, scaled: bool
    ) -> None:
        """See the gradients of a step before the optimizer uses them.

        DeepSpeed clips inside its step: there the event follows the step, which has been skipped if the norm is not
        finite.

        Args:
            norm: Total gradient norm before clipping, a scalar on the device; None if the strategy has none.
            module: The model.
            optimizer: Its optimizer; `zero_grad` makes the step change nothing.
            scaled: Whether a gradient scaler skips steps whose gradients overflow.
        """

    def on_after_optimizer_step(self, strategy: Any, optimizer: torch.optim.Optimizer) -> None:
        """Act on the new weights.

        Args:
            strategy: Fabric's strategy.
            optimizer: The optimizer that has made its step.
        """

    def on_last_step(self, state: dict[str, Any]) -> None:
        """Act after the last optimizer step, before the final validation and checkpoint.

        Args:
            state: As in `on_step_begin`.
        """

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add to a log line before it reaches the loggers.

        Args:
            metrics: Numbers by name; a line of training has `loss`, one of validation `val_loss`.
        """

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """See a complete log line.

        Args:
            metrics: Values by name.
        """

    def on_checkpoint_staged(self, directory: Path) -> None:
        """Add files to a checkpoint before it gets its name.

        Args:
            directory: Where it is being written.
        """

    def on_checkpoint_saved(self, directory: Path) -> None:
        """See a complete checkpoint.

        Args:
            directory: The checkpoint.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what checkpoints must keep for this callback; tensors and plain data only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned; called on resume if it was not empty."""


EVENTS = tuple(name for name in vars(Callback) if name.startswith("on_"))
"""Names of all events."""


def _check_event(cls: type, name: str, method: Any) -> None:
    where = f"{cls.__module__}.{cls.__qualname__}.{name}"
    if name not in EVENTS:
        hint = did_you_mean(name, EVENTS) or f"; events are {', '.join(EVENTS)}"
        raise TypeError(f"{where}: no event of training has this name{hint}")
    expected = list(inspect.signature(getattr(Callback, name)).parameters)
    found = list(inspect.signature(method).parameters)
    if found != expected:
        raise TypeError(f"{where}: must have the arguments ({', '.join(expected)}), not ({', '.join(found)})")
    code = inspect.unwrap(method)
    if inspect.iscoroutinefunction(code) or inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise TypeError(f"{where}: must be a plain function without async and yield, whose body a call does not run")
