"""The events of a training run, as methods of one base class.

A recipe names its own callbacks by class path; `examples/add_a_callback.py` is a complete one:

    callbacks:
      - class_path: examples.add_a_callback.StopWhenGood
        init_args: {loss: 2.5}

Methods that are not overridden do nothing. A subclass with an `on_...` method that is not one of these events, or takes
other arguments, is refused when it is defined: the method would never be called, or would fail in the middle of a run.
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
    """Base class of everything that reacts to the events of a run. Methods are called on every process.

    The events of one optimizer step come in this order: `on_step_begin`, `on_batch` for every micro-batch,
    `on_gradients_clipped`, `on_after_optimizer_step`, then `on_log` and `on_logged` if the step is logged.

    A callback named by a recipe keeps each constructor argument as an attribute of the same name, with or without a
    leading `_`, as a dataclass does: checkpoints store these with the other settings of the run.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for owner in cls.__mro__:  # mixins may have events as well
            if owner is not Callback:
                for name, method in vars(owner).items():
                    if name.startswith("on_") and callable(method):
                        _check_event(owner, name, method)

    def on_before_setup(self, model: torch.nn.Module) -> None:
        """Change LitGPT's model before a strategy or a compiler wraps it.

        Weights must keep their names and shapes, or checkpoints could not be opened; `requires_grad` may change.

        Args:
            model: A `litgpt.GPT` with its initial weights.
        """

    def on_after_setup(self, fabric: TrainingFabric, module: torch.nn.Module) -> None:
        """Keep what later events need; the model is set up.

        Args:
            fabric: The fabric of the run.
            module: The model as it trains, wrapped by Fabric; `module.module` is LitGPT's.
        """

    def on_fit_begin(self, resume_dir: Path | None) -> None:
        """Get ready: training is about to start.

        Args:
            resume_dir: The checkpoint directory to resume from, or None.
        """

    def on_flops_counted(self, flops_per_token: float) -> None:
        """Note the cost of the model.

        Args:
            flops_per_token: Floating point operations of a forward and backward pass, per token.
        """

    def on_step_begin(self, state: dict[str, Any]) -> None:
        """Act between two optimizer steps, before the first micro-batch of the next one is fetched.

        Args:
            state: LitGPT's training state: `model`, `optimizer`, `train_dataloader`, `iter_num`, `step_count`.
        """

    def on_batch(self, batch: Tensor, waited: float) -> None:
        """See a micro-batch that has just been fetched.

        Args:
            batch: Token ids, (B, T + 1), int64.
            waited: Seconds spent fetching it.
        """

    def on_gradients_clipped(
        self, norm: Tensor | None, module: torch.nn.Module, optimizer: torch.optim.Optimizer, scaled: bool
    ) -> None:
        """See the gradients of a step before the optimizer uses them.

        DeepSpeed clips inside its step: the event follows that step, which is skipped if the norm is not finite.

        Args:
            norm: Total gradient norm before clipping, a scalar on the device; None if the strategy has none.
            module: The model.
            optimizer: Its optimizer; call `zero_grad` to make the step change nothing.
            scaled: Whether a gradient scaler skips steps whose gradients overflow.
        """

    def on_after_optimizer_step(self, strategy: Any, optimizer: torch.optim.Optimizer) -> None:
        """Act on the new weights.

        Args:
            strategy: Fabric's strategy.
            optimizer: The optimizer that has just stepped.
        """

    def on_last_step(self, state: dict[str, Any]) -> None:
        """Act after the last optimizer step, before the final validation and checkpoint.

        Args:
            state: As in `on_step_begin`.
        """

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add to a log line before it reaches the loggers.

        Args:
            metrics: Numbers by name; training lines have `loss`, validation lines `val_loss`.
        """

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """See a complete log line.

        Args:
            metrics: Values by name.
        """

    def on_checkpoint_staged(self, directory: Path) -> None:
        """Add files to a checkpoint before it is renamed to its final name.

        Args:
            directory: The temporary directory it is written to.
        """

    def on_checkpoint_saved(self, directory: Path) -> None:
        """See a complete checkpoint.

        Args:
            directory: The checkpoint.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in checkpoints, as tensors and plain data only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned; called on resume if it was not empty."""


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
