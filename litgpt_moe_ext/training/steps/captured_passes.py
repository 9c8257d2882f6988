"""What has been captured for the micro-batches of a step, and where their gradients lie.

Shape legend: B batch, T tokens.
"""

from typing import NamedTuple

from torch import Tensor, nn

from litgpt_moe_ext.training.steps.capture import Capture, Loss, Passes, gradients_set_aside
from litgpt_moe_ext.training.steps.graph_check import Reference


class Inputs(NamedTuple):
    """A micro-batch, or tensors that micro-batches are copied into.

    Attributes:
        ids_BT: Token ids, int64.
        targets_BT: Targets, int64.
        sizes: What passes over them need room for, or have (`litgpt_moe_ext.training.steps.room`).
    """

    ids_BT: Tensor
    targets_BT: Tensor
    sizes: tuple[int, ...]

    def cloned(self) -> "Inputs":
        """Return the same in tensors of its own."""
        return Inputs(self.ids_BT.clone(), self.targets_BT.clone(), self.sizes)


class CapturedPasses:
    """The passes for the first micro-batch of a step and for the others, and the tensors that they know.

    Args:
        capture: What makes them.
        loss: Takes the inputs and returns a scalar.
        model: Whose parameters and buffers it reads.
        inputs: What the passes read from now on.
    """

    def __init__(self, capture: Capture, loss: Loss, model: nn.Module, inputs: Inputs) -> None:
        self._capture, self._loss = capture, loss
        self._inputs = inputs
        self._first: Passes | None = None
        self._other: Passes | None = None
        # To hold them keeps their memory from being used for anything else.
        self._read = [
            (tensors, name, tensor, tensor.data_ptr())
            for module in model.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    def fits(self, batch: Inputs) -> bool:
        """Return whether a batch has the shapes of the inputs, and needs no larger sizes."""
        is_alike = self._has_ids_of(batch) and batch.targets_BT.shape == self._inputs.targets_BT.shape
        return is_alike and not self.is_outgrown(batch)

    def is_outgrown(self, batch: Inputs) -> bool:
        """Return whether a batch has the shape of the inputs, but needs larger sizes."""
        is_larger = any(size > reserved for size, reserved in zip(batch.sizes, self._inputs.sizes, strict=True))
        return is_larger and self._has_ids_of(batch)

    def _has_ids_of(self, batch: Inputs) -> bool:
        return batch.ids_BT.shape == self._inputs.ids_BT.shape

    def has_moved(self) -> bool:
        """Return whether a parameter or a buffer is no longer where it was."""
        return any(
            tensors.get(name) is not tensor or tensor.data_ptr() != address
            for tensors, name, tensor, address in self._read
        )

    def passes(self, begins: bool) -> Passes:
        """Return the passes for the next micro-batch, and have gradients lie where they add to them.

        Args:
            begins: Whether no leaf has a gradient yet.
        """
        if self._first is None:
            self._first = self._capture(self._loss, self._inputs.ids_BT, self._inputs.targets_BT, add=False)
        if begins and all(leaf.grad is None for leaf in self._first.gradients):
            return self._first
        for leaf, gradient in self._first.gradients.items():
            if leaf.grad is None:
                gradient.zero_()
            elif leaf.grad is not gradient:
                gradient.copy_(leaf.grad)
            leaf.grad = gradient
        if self._other is None:
            self._other = self._capture(self._loss, self._inputs.ids_BT, self._inputs.targets_BT, add=True)
        return self._other

    def check(self, reference: Reference, accumulates: bool, model: nn.Module) -> Passes:
        """Compare the passes with those without graphs; gradients are then those that there were.

        Args:
            reference: Of the micro-batch that the tensors hold.
            accumulates: Whether there is more than one micro-batch in a step.
            model: Whose gradients they compute.

        Returns:
            The passes for the first micro-batch of a step.

        Raises:
            GraphError: If they differ.
        """
        with gradients_set_aside(reference.leaves):
            first = self.passes(begins=True)
            reference.compare(first, 1, model)
            if accumulates:
                self.hand_over(first)
                reference.compare(self.passes(begins=False), 2, model)
        return first

    def load(self, batch: Inputs) -> None:
        """Have the passes compute a micro-batch."""
        self._inputs.ids_BT.copy_(batch.ids_BT)
        self._inputs.targets_BT.copy_(batch.targets_BT)

    def hand_over(self, passes: Passes) -> None:
        """Give the leaves the gradients that were just computed."""
        if passes is self._first:
            for leaf, gradient in passes.gradients.items():
                leaf.grad = gradient
