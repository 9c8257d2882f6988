"""The validation of a model whose training passes are CUDA graphs, as a graph in their memory.

A pass of a validation is smaller than one of training, but without a graph the host takes as long to launch it.
"""

from typing import cast

from torch import Tensor, nn

from litgpt_moe_ext.training.steps.graphs.capture import Capture, Loss
from litgpt_moe_ext.training.steps.graphs.check import require_same_loss
from litgpt_moe_ext.training.steps.graphs.dynamic_sizes import DynamicSizes, SizesByShape
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import Replay
from litgpt_moe_ext.training.steps.graphs.inputs import Inputs, ModelTensors
from litgpt_moe_ext.training.steps.graphs.obstacles import GraphError, hook_of_others


class CapturedValidation:
    """A loss without gradients, captured with the second of two batches alike and replayed for others like them.

    Args:
        capture: Captures it. What else it has captured must not be under way.
        loss: Takes ids and targets and returns a scalar.
        model: The model whose parameters and buffers `loss` reads, in evaluation mode.
        dynamic_sizes: Sizes that depend on the values of a batch, if any.
    """

    def __init__(self, capture: Capture, loss: Loss, model: nn.Module, dynamic_sizes: DynamicSizes | None) -> None:
        self._capture, self._loss, self._model = capture, loss, model
        self._sizes = SizesByShape(dynamic_sizes)
        self._last: tuple = ()
        self._captured: tuple[Inputs, ModelTensors, Replay] | None = None

    def __call__(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor | None:
        """Return the loss of a batch, a scalar; None if this batch must go without a graph.

        Raises:
            GraphError: If the loss cannot be a graph.
        """
        batch = Inputs(ids_BT, targets_BT, self._sizes.note(ids_BT))
        last, self._last = self._last, (batch.shapes, batch.sizes)
        if self._captured is not None:
            inputs, tensors, replay = self._captured
            if inputs.fits(batch) and not tensors.have_moved():
                inputs.load(batch)
                replay.run()
                # A copy, because the next replay writes to the same address.
                return cast(Tensor, replay.result).clone()
        if last != self._last:
            return None
        self._captured = None
        return self._capture_with(batch)

    def _capture_with(self, batch: Inputs) -> Tensor:
        if (obstacle := hook_of_others(self._model)) is not None:
            raise GraphError(obstacle)
        inputs = batch.cloned()
        self._sizes.reserve(inputs.ids_BT, inputs.sizes)
        expected = self._loss(inputs.ids_BT, inputs.targets_BT)
        replay = self._capture.forward(self._loss, inputs.ids_BT, inputs.targets_BT)
        replay.run()
        require_same_loss(cast(Tensor, replay.result), expected)
        self._captured = inputs, ModelTensors(self._model), replay
        return expected
