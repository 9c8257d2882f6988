"""What LitGPT's loop hands from the model to its loss function.

The loop calls the model for logits, and then another function for their loss. Of a batch that it trains on, the model
hands over what makes the loss cheapest:

- With CUDA graphs, which hold both passes, its input; the loss function does all the work.
- Otherwise logits in the precision of the output head, often 16 bits. Fabric returns the outputs of a model in float32.
  Of logits that is a copy twice as large as they are, for a loss whose kernel (`litgpt_moe_ext.loss.cross_entropy`)
  computes in float32 anyway. What goes to another loss is converted here: the same operators in the same order.

Everybody else who calls the model gets what Fabric returns.

From there a loss goes through these functions, outermost first; `litgpt_moe_ext.training.loop` puts them together:

| function               | what it does                                                                       |
| ---------------------- | ---------------------------------------------------------------------------------- |
| `TokenMeans.wrap_loss` | weighs the mean of a micro-batch by its tokens (`losses.py`)                       |
| `Handover.wrap`        | takes what the model has handed over; with graphs, `GraphedLoss` runs both passes  |
| `FusedLoss.wrap`       | with `fused_cross_entropy`, computes the output head as well                       |
| `loss_of_logits`       | calls the kernel where there is one, otherwise LitGPT's function                   |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.loss.cross_entropy import has_kernel, mean_cross_entropy
from litgpt_moe_ext.moe.gradient_injection import remember_scale
from litgpt_moe_ext.training.steps.graphed_loss import GraphedLoss, GraphOptions
from litgpt_moe_ext.training.steps.room import NoRoom, Room

if TYPE_CHECKING:
    from lightning.fabric.plugins.precision import Precision

    from litgpt_moe_ext.training.parallel.behaviour import Behaviour
    from litgpt_moe_ext.training.steps.cuda_graphs import GraphDecision


class _Deferred(NamedTuple):
    """What stands for the logits of a batch that is not computed yet."""

    ids_BT: Tensor


class _Handed:
    """Logits for whoever takes them. LitGPT's loop holds on to this until the next batch has some, and not to them."""

    def __init__(self, logits: Any) -> None:
        self._logits = [logits]

    def take(self) -> Any:
        return self._logits.pop()


class Handover:
    """Put between LitGPT's loop, its model and its loss function.

    Args:
        decision: Whether to try CUDA graphs.
        say: Told about them.
        room: What their passes must have room for.
    """

    def __init__(self, decision: GraphDecision, say: Callable[[str], None], room: Room | None = None) -> None:
        self._decision, self._say, self._room = decision, say, room or NoRoom()
        self._graphed: Callable[[Tensor, Tensor], Tensor] | None = None
        self._expects = False
        self._cross_entropy: Callable[[Any, Tensor], Tensor]

    def expect_batch(self) -> None:
        """Note that the loop has a batch: its next call of the model, and no other, is the one that trains."""
        self._expects = True

    def wrap(self, cross_entropy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss function that takes what the model hands over.

        Args:
            cross_entropy: Takes targets and logits as the output head wrote them.
        """
        self._cross_entropy = cross_entropy

        def loss(logits: Any, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if isinstance(logits, _Deferred) and self._graphed is not None:
                return self._graphed(logits.ids_BT, targets)
            if isinstance(logits, _Handed):
                logits = logits.take()
            return cross_entropy(logits, targets, *args, **kwargs)

        return loss

    @contextlib.contextmanager
    def installed(self, model: Any, strategy: Behaviour) -> Iterator[None]:
        """Have a model hand over the loop's batches while it trains, for the time of the scope.

        Args:
            model: Fabric's wrapper.
            strategy: Fabric's, under whose precision the model computes.
        """
        compute = model.forward
        if self._decision.obstacle is None:
            self._graphed = self._with_graphs(model, strategy)

        def forward(ids_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
            expected, self._expects = self._expects, False
            if not expected or args or kwargs or not (model.training and torch.is_grad_enabled()):
                return compute(ids_BT, *args, **kwargs)
            if self._graphed is not None:
                return _Deferred(ids_BT)
            with _unconverted(strategy.precision):
                return _Handed(compute(ids_BT))

        # Fabric's wrapper would hand an ordinary assignment on to the model inside.
        object.__setattr__(model, "forward", forward)
        try:
            yield
        finally:
            object.__delattr__(model, "forward")
            self._graphed = None

    def _with_graphs(self, model: Any, strategy: Behaviour) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            # As Fabric's wrapper does it, but for the hook that wants `fabric.backward` to have been called.
            with strategy.precision.forward_context():
                logits = model.module(ids_BT)
            return self._cross_entropy(logits, targets_BT)

        options = GraphOptions(not self._decision.asked, self._room, strategy.exchange_gradients)
        return partial(strategy.in_place_of_forward, GraphedLoss(loss, model, self._say, options))


def loss_of_logits(cross_entropy: Callable[..., Tensor], precision: Precision) -> Callable[..., Tensor]:
    """Return a loss function that takes logits as the output head wrote them.

    Args:
        cross_entropy: LitGPT's function, for all that the kernel cannot take.
        precision: Fabric's, which converts logits for it.
    """

    def loss(logits: Tensor | list[Tensor], targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(logits, Tensor) and has_kernel(logits, targets):
            return remember_scale(mean_cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1)))
        return cross_entropy(precision.convert_output(logits), targets, *args, **kwargs)

    return loss


@contextlib.contextmanager
def _unconverted(precision: Precision) -> Iterator[None]:
    """Have Fabric return outputs as the model computed them, for the time of the scope."""
    precision.convert_output = _as_it_is
    try:
        yield
    finally:
        del precision.convert_output  # and the method of the class is there again


def _as_it_is(data: Any) -> Any:
    return data
