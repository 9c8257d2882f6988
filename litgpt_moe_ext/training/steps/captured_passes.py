"""The captured passes for the micro-batches of a step, and where their gradients are stored.

Shape legend: B batch, T tokens.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from litgpt_moe_ext.training.steps.capture import Capture, Loss, Passes, gradients_set_aside
from litgpt_moe_ext.training.steps.gradient_tasks import TaskGraphs
from litgpt_moe_ext.training.steps.graph_check import Reference


class Inputs(NamedTuple):
    """A micro-batch, or the static tensors that micro-batches are copied into.

    Attributes:
        ids_BT: Token ids, int64.
        targets_BT: Targets, int64.
        sizes: Sizes that passes need, or have reserved (`litgpt_moe_ext.training.steps.room`).
    """

    ids_BT: Tensor
    targets_BT: Tensor
    sizes: tuple[int, ...]

    def cloned(self) -> "Inputs":
        """Return a copy."""
        return Inputs(self.ids_BT.clone(), self.targets_BT.clone(), self.sizes)


class CapturedPasses:
    """The passes for the first micro-batch of a step and for the later ones, and the tensors they read.

    Args:
        capture: Captures the passes.
        loss: Takes ids and targets and returns a scalar.
        model: The model whose parameters and buffers `loss` reads.
        inputs: The static tensors that the passes read.

    Attributes:
        tasks: Graphs of what happens to the gradients of the passes.
    """

    def __init__(self, capture: Capture, loss: Loss, model: nn.Module, inputs: Inputs) -> None:
        self._capture, self._loss = capture, loss
        self._inputs = inputs
        self.tasks = TaskGraphs(capture.function)
        self._first: Passes | None = None
        self._other: Passes | None = None
        # Holding the tensors keeps their memory from being reused.
        self._read = [
            (tensors, name, tensor, tensor.data_ptr())
            for module in model.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    def fits(self, batch: Inputs) -> bool:
        """Return whether a batch has the shapes of the inputs and needs no larger sizes."""
        is_alike = self._has_ids_of(batch) and batch.targets_BT.shape == self._inputs.targets_BT.shape
        return is_alike and not self.is_outgrown(batch)

    def is_outgrown(self, batch: Inputs) -> bool:
        """Return whether a batch has the shape of the inputs but needs larger sizes."""
        is_larger = any(size > reserved for size, reserved in zip(batch.sizes, self._inputs.sizes, strict=True))
        return is_larger and self._has_ids_of(batch)

    def _has_ids_of(self, batch: Inputs) -> bool:
        return batch.ids_BT.shape == self._inputs.ids_BT.shape

    def has_moved(self) -> bool:
        """Return whether a parameter or buffer has moved since the capture."""
        return any(
            tensors.get(name) is not tensor or tensor.data_ptr() != address
            for tensors, name, tensor, address in self._read
        )

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
            self._first = self._capture.passes(self._loss, self._inputs.ids_BT, self._inputs.targets_BT, add=False)
        if begins and all(leaf.grad is None for leaf in self._first.gradients):
            return self._first
        for leaf, gradient in self._first.gradients.items():
            if leaf.grad is None:
                gradient.zero_()
            elif leaf.grad is not gradient:
                gradient.copy_(leaf.grad)
            leaf.grad = gradient
        if self._other is None:
            self._other = self._capture.passes(self._loss, self._inputs.ids_BT, self._inputs.targets_BT, add=True)
        return self._other

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

    def load(self, batch: Inputs) -> None:
        """Copy a micro-batch into the static tensors."""
        self._inputs.ids_BT.copy_(batch.ids_BT)
        self._inputs.targets_BT.copy_(batch.targets_BT)

    def hand_over(self, passes: Passes) -> None:
        """Set the leaves' gradients to those just computed."""
        if passes is self._first:
            for leaf, gradient in passes.gradients.items():
                leaf.grad = gradient
