"""Sizes besides a batch's shape that captured passes must have: a graph keeps the sizes of its capture.

Shape legend: B batch, T tokens.
"""

from typing import Protocol

import torch
from torch import Tensor


class DynamicSizes(Protocol):
    """Sizes that depend on the values of a batch, known on the host. Passes for larger sizes serve smaller ones too."""

    def needed(self, ids_BT: Tensor) -> tuple[int, ...]:
        """Return the sizes that passes for a batch must have, with a margin for the batches after it.

        Args:
            ids_BT: Token ids, int64.
        """

    def reserve(self, ids_BT: Tensor, sizes: tuple[int, ...]) -> None:
        """Have passes over `ids_BT`, whose values will change, captured with these sizes."""


class SizesByShape:
    """The largest sizes that the batches of each shape have needed so far.

    Args:
        dynamic: Tells what a batch needs; None if only its shape matters.
    """

    def __init__(self, dynamic: DynamicSizes | None) -> None:
        self._dynamic = dynamic
        self._largest: dict[torch.Size, tuple[int, ...]] = {}

    def note(self, ids_BT: Tensor) -> tuple[int, ...]:
        """Return the largest sizes for a batch's shape, its own included.

        Args:
            ids_BT: Token ids, int64.
        """
        needed = () if self._dynamic is None else self._dynamic.needed(ids_BT)
        largest = tuple(map(max, needed, self._largest.get(ids_BT.shape, needed)))
        self._largest[ids_BT.shape] = largest
        return largest

    def reserve(self, ids_BT: Tensor, sizes: tuple[int, ...]) -> None:
        """See `DynamicSizes.reserve`."""
        if self._dynamic is not None:
            self._dynamic.reserve(ids_BT, sizes)

    def __contains__(self, shape: torch.Size) -> bool:
        """Return whether batches of a shape have been noted."""
        return shape in self._largest
