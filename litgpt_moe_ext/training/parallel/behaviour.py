"""What training asks of a strategy beyond Lightning's interface; callers ask here and never for a type."""

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
    """Mixed into one of Lightning's strategies, left of it; the defaults are those of one process and of ddp.

    Attributes:
        facts: The strategy's row of the table.
        clips_in_step: Whether the step of its optimizer clips the gradients and reports their norm, so that
            `clip_gradients` before it has nothing to do.
        steps_in_parts: Whether one step calls the torch optimizer several times, each time with a part of its groups,
            so that hooks of that optimizer run more than once.
        compile_obstacle: Why the model cannot be compiled under it, or None.
    """

    facts: StrategyFacts
    clips_in_step = False
    steps_in_parts = False
    compile_obstacle: str | None = None

    @property
    def holds_whole_model(self) -> bool:
        """Whether every rank has all weights between two steps."""
        return "weights" not in self.facts.shards

    @property
    def scales_gradients(self) -> bool:
        """Whether the loss is scaled against underflow, and steps with gradients that overflow are left out."""
        return getattr(self.precision, "scaler", None) is not None

    def use_precision(self, name: str, accelerator: str) -> None:
        """Choose the precision where Fabric would refuse or replace it; call it before Fabric is made.

        Args:
            name: As in recipes.
            accelerator: Device type.
        """
        if name == "16-mixed":
            # Fabric takes bf16-mixed instead on CPUs, and refuses it for sharded models; torch has it everywhere.
            self._precision = MixedPrecision("16-mixed", accelerator)

    def follow(self, train: TrainArgs) -> None:
        """Learn how many micro-batches a step has and how it is clipped; call it when the ranks are connected."""

    def attach_optimizer(self, model: Any, optimizer: Optimizer, on_norm: Callable[[Tensor], None]) -> Any:
        """Return what the loop uses as the optimizer.

        Args:
            model: Fabric's wrapper of the model that was set up.
            optimizer: Over its parameters.
            on_norm: Told the gradient norm of every step, where `clips_in_step`.
        """
        return self.setup_optimizer(optimizer)

    def load_weights(self, model: nn.Module, weights: Mapping[str, Tensor], strict: bool = True) -> None:
        """Give a model that was set up other weights; every rank must call.

        Args:
            model: The model.
            weights: Whole tensors by name, the same on every rank.
            strict: As `nn.Module.load_state_dict`.
        """
        model.load_state_dict(weights, strict=strict)

    def in_place_of_forward(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return what a function returns that runs the model's passes, so that its gradients are exchanged.

        Args:
            function: Returns the loss of the inputs, a scalar. Where its backward pass is not autograd's of the model,
                it ends with `exchange_gradients`.
            *inputs: Of the function.
        """
        return function(*inputs)

    def exchange_gradients(self) -> None:
        """Exchange the gradients that parameters have, which no node of autograd has added up, if their step ends."""

    def loss_scale_state(self) -> Callback:
        """Return what keeps the loss scale in the checkpoints; only where `scales_gradients`."""
        return ScalerState(self.precision)


class ScalerState(Callback):
    """Keep the state of the gradient scaler of float16 training in the checkpoints.

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


def as_the_model_names_them(model: nn.Module, weights: Mapping[str, Tensor], strict: bool) -> dict[str, Tensor]:
    """Return whole weights under the names and in the layout that the model saves.

    A module may convert what it loads. Here a model without storage does that, because no rank of a sharded model has
    room for the result.

    Args:
        model: LitGPT's model, possibly sharded.
        weights: What was loaded from a file.
        strict: As `nn.Module.load_state_dict`.
    """
    with torch.device("meta"):
        reader = type(model)(model.config)
    reader.load_state_dict(weights, strict=strict, assign=True)
    return reader.state_dict()
