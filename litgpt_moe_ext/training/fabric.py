"""A Fabric that tells its callbacks what LitGPT's loop does; `training.callback` describes the events."""

import contextlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.fabric.loggers import Logger
from lightning.fabric.wrappers import _FabricOptimizer, _unwrap_objects
from torch import Tensor

from litgpt_moe_ext.errors import FROM_ITS_WEIGHTS, SettingsError, one_line
from litgpt_moe_ext.evaluation.perplexity import exp
from litgpt_moe_ext.files.archives import ONLY_PLAIN, foreign_object, kind_of
from litgpt_moe_ext.moe.balancing.bias import begin_schedules
from litgpt_moe_ext.moe.balancing.metrics import routers_of
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.control import StopRequests
from litgpt_moe_ext.training.parallel.random_state import RankStreams
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import GradientTask, run_now
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from lightning.fabric.strategies import Strategy

    from litgpt_moe_ext.training.parallel.behaviour import Behaviour

    class TrainingStrategy(Behaviour, Strategy):  # pyrefly: ignore[inconsistent-inheritance]  (Lightning's is wider)
        """A Lightning strategy with the additional behaviour that training needs."""


_NAMED_WEIGHTS = 4


class TrainingFabric(L.Fabric):
    """`lightning.Fabric` with more hooks.

    Args:
        show: Receives every message that LitGPT or the plugin prints, on the first process only.
        **kwargs: As `lightning.Fabric`.

    Attributes:
        random_streams: The random generators of every process.
        attempt: How many times the run has been started: 1, plus one for every resume.
        model: The model that was set up, once it is.
        state: LitGPT's training state, once it exists.
        stop_requests: Signals that this process has received.
        interrupted_by: Signal that all processes have agreed to act on before the next step; 0 if none.
        run_task: Does work on the gradients of a step, in some runs as a CUDA graph.
    """

    if TYPE_CHECKING:

        @property
        def strategy(self) -> TrainingStrategy:
            """The strategy that `make_strategy` returned."""
            ...

    def __init__(self, show: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._show = show
        self._told: set[Any] = set()  # topics of messages that are printed only once
        self.random_streams = RankStreams(self)
        self.attempt = 1
        self.model: Any = None
        self._optimizer: Any = None
        self.state: dict[str, Any] = {"step_count": 0}
        self.stop_requests = StopRequests(self.print)
        self.interrupted_by = 0
        self.run_task: Callable[[GradientTask], Tensor | None] = run_now

    @property
    def step(self) -> int:
        """Number of finished optimizer steps."""
        return self.state["step_count"]

    def agree_on_interruption(self) -> bool:
        """Return whether any process has received a signal; every process must call this."""
        received = torch.tensor(self.stop_requests.received, device=self.device)
        self.interrupted_by = int(cast(Tensor, self.all_reduce(received, reduce_op="max")))
        return bool(self.interrupted_by)

    def add_callback(self, callback: Callback, first: bool = False) -> None:
        """Add a callback after construction; with `first`, ahead of the existing ones."""
        self._callbacks.insert(0 if first else len(self._callbacks), callback)

    def add_logger(self, logger: Logger) -> None:
        """Add a logger after construction."""
        self._loggers.append(logger)

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Tell every callback of an event.

        Fabric's method inspects every callback's signature at every call; ours are checked when their class is defined.

        Raises:
            RuntimeError: If a callback raises StopIteration, which would silently end LitGPT's loop.
        """
        for callback in self._callbacks:
            if (method := getattr(callback, hook_name, None)) is not None:  # Fabric's own plug-ins may lack it
                try:
                    method(*args, **kwargs)
                except StopIteration as error:
                    raise RuntimeError(f"{type(callback).__name__}.{hook_name} raised StopIteration") from error

    def print(self, *values: Any, **_options: Any) -> None:
        """Show a message on the first process."""
        if self.is_global_zero:
            self._show(" ".join(str(value) for value in values))

    def _print_once(self, about: Any, message: str) -> None:
        if about not in self._told:
            self._told.add(about)
            self.print(message)

    @contextlib.contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """As Fabric's, but raise an error only after the other processes' turn; they would wait for this one forever.

        Args:
            local: Whether the first process of each node goes first.
        """
        problem = None
        # Fabric makes a group of processes for this, which waits for each of them, be it gone, for 27 years.
        self.barrier()
        with super().rank_zero_first(local):
            try:
                yield
            except Exception as error:
                problem = error
        if problem is not None:
            raise problem

    def setup(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Show the callbacks LitGPT's model, then set it up.

        Raises:
            SettingsError: If a callback has added, removed or reshaped weights.
        """
        # LitGPT has already called `torch.compile`, which compiles only at the first call of the model.
        model = getattr(module, "_orig_mod", module)
        before = _weight_shapes(model)
        self.call("on_before_setup", model=model)
        _require_same_shapes(before, _weight_shapes(model))
        self.model = super().setup(module, *args, **kwargs)
        return self.model

    def setup_optimizers(self, *optimizers: torch.optim.Optimizer) -> Any:
        """Give the optimizer to the strategy, which may replace it."""
        (optimizer,) = optimizers
        attached = self.strategy.attach_optimizer(self.model, optimizer, self._report_norm)
        self._optimizer = _FabricOptimizer(attached, self.strategy, self._callbacks)
        return self._optimizer

    def require_training_mode(self) -> None:
        """Put the model back into training mode if a callback left it in evaluation mode, and say so once."""
        if self.model.module.training:
            return
        self.model.train()
        self._print_once(
            "mode",
            "  A callback has left the model in evaluation mode, without dropout and without balancing of experts: it "
            "is put back into training mode. Call model.train() where the callback has done its work.",
        )

    def callback_states(self) -> dict[str, Any]:
        """Return the non-empty states of the callbacks, by name, without those that could not be loaded again."""
        states = {}
        for name, callback in self._named_callbacks():
            state = callback.state_dict()
            foreign = foreign_object(state)
            if foreign is not None:
                self.print(
                    f"  {name}.state_dict returns a {kind_of(foreign)}, {ONLY_PLAIN}: the state of this callback is "
                    "not saved."
                )
            elif state:
                states[name] = state
        return states

    def _named_callbacks(self) -> Iterator[tuple[str, Callback]]:
        # Named by class; further callbacks of the same class get a number.
        seen: Counter[str] = Counter()
        for callback in self._callbacks:
            name = type(callback).__name__
            seen[name] += 1
            yield (name if seen[name] == 1 else f"{name}-{seen[name]}"), callback

    def clip_gradients(self, module: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor | None:
        """Clip and tell the callbacks the norm; they decide whether a non-finite norm ends the run."""
        if self.strategy.clips_in_step:
            return None
        settings = {**kwargs, "error_if_nonfinite": False}
        clip = partial(super().clip_gradients, module, optimizer, *args, **settings)
        if self.strategy.scales_gradients:
            norm = clip()  # the gradient scaler keeps account of what it has unscaled
        else:
            norm = self.run_task(GradientTask("clipping", clip, lambda: (args, settings)))
        if norm is not None:
            self._report_norm(norm)
        return norm

    def _report_norm(self, norm: Tensor) -> None:
        self.call(
            "on_gradients_clipped",
            norm=norm,
            module=self.model,
            optimizer=self._optimizer,
            scaled=self.strategy.scales_gradients,
        )

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log losses averaged over all processes, by optimizer step.

        LitGPT logs those of the first process, by iteration, and a utilization (`device/mfu`) whose peaks are wrong for
        some GPUs; ours is `mfu`.
        """
        metrics = {name: value for name, value in metrics.items() if name != "device/mfu"}
        for name in ("loss", "val_loss"):
            if name not in metrics:
                continue
            metrics[name] = float(metrics[name])
            if self.world_size > 1:
                mean: Any = self.all_reduce(torch.tensor(metrics[name], device=self.device))
                metrics[name] = float(mean)
        for name, loss in (("ppl", "loss"), ("val_ppl", "val_loss")):
            if loss in metrics:
                metrics[name] = exp(float(metrics[loss]))
        complete = dict(metrics)
        self.call("on_log", metrics=complete)
        metrics |= self._numbers(complete)
        with self.surviving_the_logger():
            super().log_dict(metrics, self.step)
        self.call("on_logged", metrics=metrics)

    @contextlib.contextmanager
    def surviving_the_logger(self) -> Iterator[None]:
        """Go on without what a logger cannot write or send in the scope, and say so once."""
        try:
            yield
        except Exception as error:  # every logging service has its own errors
            self._print_once("logger", f"  the logger failed: {one_line(error).rstrip('.')}. Training goes on.")

    def _numbers(self, metrics: Mapping[Any, Any]) -> dict[str, Any]:
        """Return the metrics that are named numbers; say once for each of the others that it is left out."""
        found = {}
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            if isinstance(name, str) and isinstance(value, Real):
                found[name] = value
            else:
                self._print_once(
                    ("metric", name),
                    f"  a callback's on_log gives {name!r} a {kind_of(value)}, where metrics are numbers by name: it "
                    "is left out.",
                )
        return found

    def save(self, path: str | Path, state: dict[str, Any], filter: dict[str, Any] | None = None) -> None:
        """Save as Fabric does, but do not leave the other ranks waiting if the first cannot write."""
        try:
            super().save(path, state, filter)
        except (OSError, RuntimeError):
            # The other ranks wait in the barrier at the end of Fabric's method.
            if self.is_global_zero:
                self.barrier()
            raise

    def load(
        self, path: str | Path, state: dict[str, Any] | None = None, strict: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Load a training checkpoint, including the states of the callbacks.

        Raises:
            SettingsError: If it is damaged or does not fit the present settings.
        """
        try:
            remainder = super().load(path, state, strict, **{**kwargs, "weights_only": True})
        except SettingsError:  # from the corpus, which explains itself what does not fit
            raise
        except pickle.UnpicklingError as error:
            raise SettingsError(
                f"resume: {quoted(path)} is damaged, or holds objects whose loading would run code; it is refused"
            ) from error
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise SettingsError(
                f"resume: {quoted(path)} does not fit the present settings, or this version of the package: "
                f"{one_line(error)}. Resume with those in hyperparameters.yaml beside it, or {FROM_ITS_WEIGHTS}."
            ) from error
        self.random_streams.resumed = remainder.pop("rng", None)
        saved = remainder.pop("callbacks", {})
        for name, callback in self._named_callbacks():
            if name in saved:
                callback.load_state_dict(saved[name])
        return remainder

    def load_raw(self, path: str | Path, obj: Any, strict: bool = True, **kwargs: Any) -> None:
        """As Fabric's, but also accept a training checkpoint and take only its weights; schedules start anew."""
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        self.strategy.load_module_state_dict(_unwrap_objects(obj), checkpoint.get("model", checkpoint), strict)
        begin_schedules(routers_of(obj).values())


def _weight_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def _require_same_shapes(before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]) -> None:
    # Whatever opens a checkpoint, a resumed run included, builds the model from its model_config.
    changed = sorted(name for name in before | after if before.get(name) != after.get(name))
    if changed:
        named = ", ".join(changed[:_NAMED_WEIGHTS]) + (", ..." if len(changed) > _NAMED_WEIGHTS else "")
        raise SettingsError(
            f"callbacks: on_before_setup has changed which weights the model has ({named}), so that nothing could open "
            "its checkpoints; keep weights of your own in the callback, and return them from its state_dict"
        )
