"""What captured passes read: copies of a micro-batch's tensors, and the model's tensors, which must not move.

Shape legend: B batch, T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Inputs(NamedTuple):
    """A micro-batch, or the static tensors that micro-batches are copied into.

    Attributes:
        ids_BT: Token ids, int64.
        targets_BT: Targets, int64.
        sizes: Sizes that passes need, or have reserved (`litgpt_moe_ext.training.steps.graphs.dynamic_sizes`).
    """

    ids_BT: Tensor
    targets_BT: Tensor
    sizes: tuple[int, ...]

    def cloned(self) -> "Inputs":
        """Return a copy."""
        return Inputs(self.ids_BT.clone(), self.targets_BT.clone(), self.sizes)

    def fits(self, batch: "Inputs") -> bool:
        """Return whether a batch has these shapes and needs no larger sizes."""
        return self.shapes == batch.shapes and not self.is_outgrown(batch)

    def is_outgrown(self, batch: "Inputs") -> bool:
        """Return whether a batch has ids of this shape but needs larger sizes."""
        is_larger = any(size > reserved for size, reserved in zip(batch.sizes, self.sizes, strict=True))
        return is_larger and batch.ids_BT.shape == self.ids_BT.shape

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """Shapes of ids and targets."""
        return self.ids_BT.shape, self.targets_BT.shape

    def load(self, batch: "Inputs") -> None:
        """Copy a batch into these tensors."""
        self.ids_BT.copy_(batch.ids_BT)
        self.targets_BT.copy_(batch.targets_BT)


class ModelTensors:
    """The parameters and buffers that a model has now. Holding them keeps their memory from being reused.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._read = [
            (tensors, name, tensor, tensor.data_ptr())
            for module in model.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]

    def have_moved(self) -> bool:
        """Return whether one has been replaced, or lies elsewhere."""
        return any(
            tensors.get(name) is not tensor or tensor.data_ptr() != address
            for tensors, name, tensor, address in self._read
        )
