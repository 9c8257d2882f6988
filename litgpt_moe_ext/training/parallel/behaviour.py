"""What training needs of a strategy beyond Lightning's interface; callers use this and never check types."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.plugins.precision import Precision
from litgpt.args import TrainArgs
from torch import Tensor, nn
from torch.optim import Optimizer

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.parallel.facts import StrategyFacts

if TYPE_CHECKING:
    from lightning.fabric.strategies import Strategy as _Base
else:
    _Base = object


class Behaviour(_Base):
    """A mixin for Lightning's strategies, placed left of them; defaults are those of a single process and of ddp.

    Attributes:
        facts: The strategy's row of the table of facts.
        clips_in_step: Whether the optimizer's step itself clips the gradients and reports their norm, so that
            `clip_gradients` has nothing to do.
        steps_in_parts: Whether one step calls the torch optimizer several times, each time with some of its groups, so
            that the optimizer's hooks run more than once.
        compile_obstacle: Why the model cannot be compiled under this strategy, or None.
        made_on_cpu: Whether the model is made in the memory of the CPU and moved from there shard by shard; None for
            strategies that need all of it on the device.
    """

    facts: StrategyFacts
    clips_in_step = False
    steps_in_parts = False
    compile_obstacle: str | None = None
    made_on_cpu: bool | None = None

    @property
    def holds_whole_model(self) -> bool:
        """Whether every rank has all weights between two steps."""
        return "weights" not in self.facts.shards

    @property
    def scales_gradients(self) -> bool:
        """Whether the loss is scaled against underflow, and steps whose gradients overflow are skipped."""
        return getattr(self.precision, "scaler", None) is not None

    def use_precision(self, name: str, accelerator: str) -> None:
        """Set a precision that Fabric would refuse or replace; call this before Fabric is made.

        Args:
            name: Name of the precision, as in recipes.
            accelerator: Device type.
        """
        if name == "16-mixed":
            # Fabric would use bf16-mixed on CPUs and refuse 16-mixed for sharded models; torch supports both.
            self._precision = MixedPrecision("16-mixed", accelerator)

    def follow(self, train: TrainArgs) -> None:
        """Take over the number of micro-batches of a step and its clipping; call this once ranks are connected."""

    def attach_optimizer(self, model: Any, optimizer: Optimizer, on_norm: Callable[[Tensor], None]) -> Any:
        """Return the optimizer for the loop to use.

        Args:
            model: Fabric's wrapper of the model that was set up.
            optimizer: Optimizer over its parameters.
            on_norm: Told the gradient norm of every step if `clips_in_step`.
        """
        return self.setup_optimizer(optimizer)

    def in_place_of_forward(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return the result of a function that runs the model's passes, with gradients exchanged among ranks.

        Args:
            function: Returns the loss of the inputs, a scalar. If its backward pass bypasses the model's autograd
                graph, it ends with `exchange_gradients`.
            *inputs: Inputs of the function.
        """
        return function(*inputs)

    def exchange_gradients(self) -> None:
        """Exchange gradients that were written without autograd, if this is the last micro-batch of a step."""

    def loss_scale_state(self) -> Callback:
        """Return the callback that saves the loss scale in checkpoints; only if `scales_gradients`."""
        return ScalerState(self.precision)


class ScalerState(Callback):
    """Saves the state of the gradient scaler of float16 training in checkpoints.

    Args:
        precision: Fabric's precision plugin.
    """

    def __init__(self, precision: Precision) -> None:
        self._precision = precision

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scaler."""
        return self._precision.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the state of the scaler."""
        self._precision.load_state_dict(state)


def in_model_layout(model: nn.Module, weights: Mapping[str, Tensor], strict: bool) -> dict[str, Tensor]:
    """Return whole weights under the names and in the layout that the model saves.

    Modules may convert weights on loading. A model without storage does that here, as no rank of a sharded model has
    room for a whole one.

    Args:
        model: LitGPT's model, possibly sharded.
        weights: Weights loaded from a file.
        strict: As `nn.Module.load_state_dict`.
    """
    with torch.device("meta"):
        reader = type(model)(model.config)
    reader.load_state_dict(weights, strict=strict, assign=True)
    return reader.state_dict()
