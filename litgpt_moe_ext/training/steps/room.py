"""What captured passes must have room for beside the shape of a batch, since a graph's sizes are those of its capture.

Shape legend: B batch, T tokens.
"""

from typing import Protocol

from torch import Tensor


class Room(Protocol):
    """Sizes that the values of a batch decide, known on the host. Passes for larger ones compute smaller ones too."""

    def needed(self, ids_BT: Tensor) -> tuple[int, ...]:
        """Return the sizes that passes for a batch must have, with something to spare for the batches after it.

        Args:
            ids_BT: Token ids, int64.
        """

    def reserve(self, ids_BT: Tensor, sizes: tuple[int, ...]) -> None:
        """Have passes over `ids_BT`, whose values will change, made with these sizes."""


class NoRoom:
    """For models whose sizes depend on the shape of a batch alone."""

    def needed(self, ids_BT: Tensor) -> tuple[int, ...]:
        """Return no sizes."""
        return ()

    def reserve(self, ids_BT: Tensor, sizes: tuple[int, ...]) -> None:
        """Do nothing."""
