"""What the model hands to the loss function in LitGPT's loop.

The loop calls the model for logits, then another function for their loss. For a batch of training or validation, the
model hands over whatever makes the loss cheapest:

- With CUDA graphs, which contain all passes, its input; the loss function does all the work.
- Otherwise logits in the precision of the output head, often 16 bits. Fabric would convert them to float32, a copy of
  twice the size, although the loss kernel (`litgpt_moe_ext.loss.cross_entropy`) computes in float32 anyway. Logits for
  any other loss are converted here: the same operators in the same order.

All other callers of the model get what Fabric returns.

The loss passes through these functions, outermost first; `litgpt_moe_ext.training.loop` puts them together:

| function               | what it does                                                                       |
| ---------------------- | ---------------------------------------------------------------------------------- |
| `TokenMeans.wrap_loss` | weighs the mean of a micro-batch by its tokens (`losses.py`)                       |
| `Handover.wrap`        | takes what the model handed over; with graphs, `GraphedLoss` runs both passes      |
| `FusedLoss.wrap`       | with `fused_cross_entropy`, computes the output head as well                       |
| `loss_of_logits`       | calls the kernel where there is one, otherwise LitGPT's function                   |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.loss.cross_entropy import has_kernel, mean_cross_entropy
from litgpt_moe_ext.moe.balancing.gradient_injection import remember_scale
from litgpt_moe_ext.training.steps.graphs.dynamic_sizes import DynamicSizes
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import GradientTask
from litgpt_moe_ext.training.steps.graphs.graphed_loss import GraphedLoss, GraphOptions

if TYPE_CHECKING:
    from lightning.fabric.plugins.precision import Precision

    from litgpt_moe_ext.training.parallel.behaviour import Behaviour
    from litgpt_moe_ext.training.steps.graphs.decision import GraphDecision


class _DeferredLoss(NamedTuple):
    """What the model hands over in place of the logits of a batch.

    Attributes:
        loss: Takes the targets and returns the loss; called once.
    """

    loss: Callable[[Tensor], Tensor]


class Handover:
    """The link between LitGPT's loop, its model and its loss function.

    Args:
        decision: Whether to try CUDA graphs.
        say: Told once whether graphs are used.
        dynamic_sizes: Sizes of graphed passes that depend on the values of a batch, if any.
    """

    def __init__(
        self, decision: GraphDecision, say: Callable[[str], None], dynamic_sizes: DynamicSizes | None = None
    ) -> None:
        self._decision, self._say, self._dynamic_sizes = decision, say, dynamic_sizes
        self._passes: GraphedLoss | None = None
        self._expects = False
        self._cross_entropy: Callable[[Any, Tensor], Tensor]

    def expect_batch(self) -> None:
        """Note that the loop has a batch: its next call of the model is for the loss."""
        self._expects = True

    def wrap_validation(self, validate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return LitGPT's validation, which takes the loss of what the model hands over.

        Args:
            validate: Takes a fabric, the model, the batches and options.
        """

        def validate_handed(fabric: Any, model: Any, batches: Iterable[Tensor], *args: Any, **kwargs: Any) -> Tensor:
            try:
                return validate(fabric, model, self._expected(batches), *args, **kwargs)
            finally:
                self._expects = False  # of the batch that it fetched, but had no use for

        return validate_handed

    def _expected(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            self.expect_batch()
            yield batch

    def wrap(self, cross_entropy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss function that takes what the model hands over.

        Args:
            cross_entropy: Takes logits as the output head wrote them, and targets.
        """
        self._cross_entropy = cross_entropy

        def loss(logits: Any, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if isinstance(logits, _DeferredLoss):
                return logits.loss(targets)
            return cross_entropy(logits, targets, *args, **kwargs)

        return loss

    @contextlib.contextmanager
    def installed(self, model: Any, strategy: Behaviour) -> Iterator[None]:
        """Within the scope, have the model hand over the loop's batches.

        Args:
            model: Fabric's wrapper of the model.
            strategy: Fabric's strategy, in whose precision the model computes.
        """
        compute = model.forward
        training = validating = None
        if self._decision.obstacle is None:
            self._passes = passes = self._with_graphs(model, strategy)
            training, validating = partial(strategy.in_place_of_forward, passes), passes.validated

        def forward(ids_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
            expected, self._expects = self._expects, False
            if not expected or args or kwargs or model.training != torch.is_grad_enabled():
                return compute(ids_BT, *args, **kwargs)
            if (loss := training if model.training else validating) is not None:
                return _DeferredLoss(partial(loss, ids_BT))
            with _unconverted(strategy.precision):
                logits = [compute(ids_BT)]
            # Taken out: LitGPT's loop keeps what it gets until the next batch, when there would be two of them.
            return _DeferredLoss(lambda targets: self._cross_entropy(logits.pop(), targets))

        # Fabric's wrapper would forward an ordinary assignment to the inner model.
        object.__setattr__(model, "forward", forward)
        try:
            yield
        finally:
            object.__delattr__(model, "forward")
            self._passes = None

    def run_task(self, task: GradientTask) -> Tensor | None:
        """Do work on the gradients of a step, as a graph where their passes were; see `GraphedLoss.run_task`."""
        return task.run() if self._passes is None else self._passes.run_task(task)

    def _with_graphs(self, model: Any, strategy: Behaviour) -> GraphedLoss:
        def loss(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            # As Fabric's wrapper does, except for the hook that requires `fabric.backward` to be called.
            with strategy.precision.forward_context():
                logits = model.module(ids_BT)
            return self._cross_entropy(logits, targets_BT)

        options = GraphOptions(not self._decision.asked, self._dynamic_sizes, strategy.exchange_gradients)
        return GraphedLoss(loss, model, self._say, options)


def loss_of_logits(cross_entropy: Callable[..., Tensor], precision: Precision) -> Callable[..., Tensor]:
    """Return a loss function that takes logits as the output head wrote them.

    Args:
        cross_entropy: LitGPT's function, for everything that the kernel cannot take.
        precision: Fabric's precision, which converts logits for `cross_entropy`.
    """

    def loss(logits: Tensor | list[Tensor], targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(logits, Tensor) and has_kernel(logits, targets):
            return remember_scale(mean_cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1)))
        return cross_entropy(precision.convert_output(logits), targets, *args, **kwargs)

    return loss


@contextlib.contextmanager
def _unconverted(precision: Precision) -> Iterator[None]:
    """Within the scope, have Fabric return outputs as the model computed them."""
    precision.convert_output = _as_it_is
    try:
        yield
    finally:
        del precision.convert_output  # uncovers the method of the class


def _as_it_is(data: Any) -> Any:
    return data
