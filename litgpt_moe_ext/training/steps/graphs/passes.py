"""The captured passes for the micro-batches of a step, and where their gradients are stored.

Shape legend: B batch, T tokens.
"""

from collections.abc import Iterable

from torch import nn

from litgpt_moe_ext.training.steps.graphs.capture import Capture, Loss, Passes, gradients_set_aside
from litgpt_moe_ext.training.steps.graphs.check import Reference
from litgpt_moe_ext.training.steps.graphs.inputs import Inputs, ModelTensors


class CapturedPasses:
    """The passes for the first micro-batch of a step and for the later ones, and the tensors they read.

    Args:
        capture: Captures the passes.
        loss: Takes ids and targets and returns a scalar.
        model: The model whose parameters and buffers `loss` reads.
        inputs: The static tensors that the passes read.

    Attributes:
        inputs: As given.
    """

    def __init__(self, capture: Capture, loss: Loss, model: nn.Module, inputs: Inputs) -> None:
        self._capture, self._loss = capture, loss
        self.inputs, self._tensors = inputs, ModelTensors(model)
        self._first: Passes | None = None
        self._other: Passes | None = None

    def lacks(self, batch: Inputs) -> bool:
        """Return whether passes must be captured anew: the model's tensors have moved, or sizes are too small."""
        return self._tensors.have_moved() or self.inputs.is_outgrown(batch)

    def have_written(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether the gradients of parameters are those of the passes, where the passes write them."""
        written = {} if self._first is None else self._first.gradients
        return all(parameter.grad is written.get(parameter) for parameter in parameters)

    def passes(self, begins: bool) -> Passes:
        """Return the passes for the next micro-batch, with gradients moved to where the passes add to them.

        Args:
            begins: Whether no leaf has a gradient yet.
        """
        if self._first is None:
            self._first = self._captured(add=False)
        if begins and all(leaf.grad is None for leaf in self._first.gradients):
            return self._first
        for leaf, gradient in self._first.gradients.items():
            if leaf.grad is None:
                gradient.zero_()
            elif leaf.grad is not gradient:
                gradient.copy_(leaf.grad)
            leaf.grad = gradient
        if self._other is None:
            self._other = self._captured(add=True)
        return self._other

    def _captured(self, add: bool) -> Passes:
        return self._capture.passes(self._loss, self.inputs.ids_BT, self.inputs.targets_BT, add)

    def check(self, reference: Reference, accumulates: bool, model: nn.Module) -> Passes:
        """Compare the passes with passes without graphs; leave gradients as they were.

        Args:
            reference: Result without graphs for the micro-batch in the static tensors.
            accumulates: Whether a step has more than one micro-batch.
            model: The model whose gradients they compute.

        Returns:
            The passes for the first micro-batch of a step.

        Raises:
            GraphError: If the results differ.
        """
        with gradients_set_aside(reference.leaves):
            first = self.passes(begins=True)
            reference.compare(first, 1, model)
            if accumulates:
                self.hand_over(first)
                reference.compare(self.passes(begins=False), 2, model)
        return first

    def hand_over(self, passes: Passes) -> None:
        """Set the leaves' gradients to those just computed."""
        if passes is self._first:
            for leaf, gradient in passes.gradients.items():
                leaf.grad = gradient
