"""A Fabric that tells its callbacks what LitGPT's loop does.

The events, and what the callbacks may do about them, stand in `training.callback`.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.strategies import ModelParallelStrategy, Strategy
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.parallel.deepspeed.strategy import ZeroStrategy


class TrainingFabric(L.Fabric):
    """`lightning.Fabric` with more hooks.

    Args:
        show: Receives every message that LitGPT or the plugin prints, on the first process only.
        **kwargs: As `lightning.Fabric`.

    Attributes:
        resumed_rng: State of the random generators of every process from the loaded checkpoint, until it is restored.
        state: LitGPT's training state, once there is one.
    """

    def __init__(self, show: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._show = show
        self.resumed_rng: list[dict] | None = None
        self._model: Any = None
        self._optimizer: Any = None
        self.state: dict[str, Any] = {"step_count": 0}

    @property
    def step(self) -> int:
        """Number of finished optimizer steps."""
        return self.state["step_count"]

    def add_callback(self, callback: Callback) -> None:
        """Add a callback after construction."""
        self._callbacks.append(callback)

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Tell every callback of an event.

        Fabric's method looks at the signature of every callback at every call; these are checked when a class is
        defined.
        """
        for callback in self._callbacks:
            if (method := getattr(callback, hook_name, None)) is not None:  # Fabric's own plug-ins may lack it
                method(*args, **kwargs)

    def print(self, *values: Any, **_options: Any) -> None:
        if self.is_global_zero:
            self._show(" ".join(str(value) for value in values))

    def init_module(self, empty_init: bool | None = None) -> contextlib.AbstractContextManager:
        # FSDP2 would initialise shards on their own: on a CPU every process draws the same numbers for its part. Made
        # whole and then sharded, the weights are those of a single process.
        # DeepSpeed would share them out before LitGPT has given them values.
        if isinstance(self.strategy, (ModelParallelStrategy, ZeroStrategy)):
            return Strategy.module_init_context(self.strategy, empty_init)
        return super().init_module(empty_init)

    def setup(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # LitGPT has called `torch.compile`, which compiles at the first call only.
        self.call("on_before_setup", model=getattr(module, "_orig_mod", module))
        self._model = super().setup(module, *args, **kwargs)
        return self._model

    def setup_optimizers(self, *optimizers: torch.optim.Optimizer) -> Any:
        if not isinstance(self.strategy, ZeroStrategy):
            return super().setup_optimizers(*optimizers)
        (optimizer,) = optimizers
        engine, optimizer = self.strategy.start(self._model.module, optimizer, self._report_norm)
        self._model._forward_module = engine
        self._optimizer = _FabricOptimizer(optimizer, self.strategy, self._callbacks)
        return self._optimizer

    def callback_states(self) -> dict[str, Any]:
        """Return the state of every callback that has one, by name."""
        return {name: state for name, callback in self._named_callbacks() if (state := callback.state_dict())}

    def _named_callbacks(self) -> Iterator[tuple[str, Callback]]:
        # By class; a second one of a class is told from the first by its number.
        seen: Counter[str] = Counter()
        for callback in self._callbacks:
            name = type(callback).__name__
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name}-{seen[name]}"), callback

    def clip_gradients(self, module: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        if isinstance(self.strategy, ZeroStrategy):
            return None
        # Whether a gradient that is not finite ends the run is for the callbacks to say.
        norm = super().clip_gradients(module, optimizer, *args, **{**kwargs, "error_if_nonfinite": False})
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        self.call("on_gradients_clipped", norm=norm, module=module, optimizer=optimizer, scaled=self.scales_gradients)
        return norm

    def _report_norm(self, norm: Tensor) -> None:
        self.call(
            "on_gradients_clipped",
            norm=norm,
            module=self._model,
            optimizer=self._optimizer,
            scaled=self.scales_gradients,
        )

    @property
    def scales_gradients(self) -> bool:
        """Whether the loss is scaled against underflow, and steps with gradients that overflow are left out."""
        if isinstance(self.strategy, ZeroStrategy):
            return self.strategy.precision.precision == "16-mixed"
        return getattr(self.strategy.precision, "scaler", None) is not None

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log the mean of the losses over all processes, under the number of optimizer steps.

        LitGPT logs the losses of the first process, under the number of its iterations.
        """
        metrics = dict(metrics)
        for name in ("loss", "val_loss"):
            if name in metrics and self.world_size > 1:
                metrics[name] = float(self.all_reduce(torch.tensor(float(metrics[name]), device=self.device)))
        for name, loss in (("ppl", "loss"), ("val_ppl", "val_loss")):
            if loss in metrics:
                metrics[name] = math.exp(min(float(metrics[loss]), 700.0))
        self.call("on_log", metrics=metrics)
        super().log_dict(metrics, self.step)
        self.call("on_logged", metrics=metrics)

    def save(self, path: str | Path, state: dict[str, Any], filter: dict[str, Any] | None = None) -> None:
        try:
            super().save(path, state, filter)
        except (OSError, RuntimeError):
            # The others wait for this process at the end of Fabric's method.
            if self.is_global_zero:
                self.barrier()
            raise

    def load(
        self, path: str | Path, state: dict[str, Any] | None = None, strict: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        try:
            remainder = super().load(path, state, strict, **kwargs)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"resume: {str(path)!r} does not fit the present settings: {error}. Resume with those in "
                "hyperparameters.yaml beside it, or start anew from its weights with initial_checkpoint_dir."
            ) from error
        self.resumed_rng = remainder.pop("rng", None)
        saved = remainder.pop("callbacks", {})
        for name, callback in self._named_callbacks():
            if name in saved:
                callback.load_state_dict(saved[name])
        return remainder

    def load_raw(self, path: str | Path, obj: Any, strict: bool = True, **kwargs: Any) -> None:
        """As Fabric's, but also takes the model out of a training checkpoint."""
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if isinstance(self.strategy, ZeroStrategy):
            self.strategy.load_module_state_dict(self.strategy.model, checkpoint.get("model", checkpoint), strict)
        elif "model" in checkpoint:
            obj.load_state_dict(checkpoint["model"], strict=strict)
        else:
            super().load_raw(path, obj, strict, **kwargs)


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file.

    Lightning's own first makes a copy of all of it in memory, and another in a temporary file that may lie on another
    file system; the directory that `checkpoints.save_whole` writes into is temporary already.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


class MappedCheckpointIO(DirectCheckpointIO):
    """Reads a checkpoint through the file system's cache, which the processes of a node share.

    For strategies whose processes keep a part of what they read.
    """

    def load_checkpoint(self, path: str | Path, *_args: Any, **_options: Any) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
