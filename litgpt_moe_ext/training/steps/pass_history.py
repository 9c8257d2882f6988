"""What the passes of a run have been so far, as far as it decides when they are captured and for what sizes.

Shape legend: B batch, T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.training.steps.captured_passes import Inputs
from litgpt_moe_ext.training.steps.room import Room

# Kernels are compiled in the first step, which a capture does not allow, and the optimizer makes its states. In the
# second, waits for the device are noticed, which no graph can hold.
_WATCHED = 2


class Turn(NamedTuple):
    """A micro-batch and its place in the run.

    Attributes:
        inputs: The micro-batch.
        begins: Whether a step begins with it: no parameter has a gradient.
        watched: Whether waits for the device are to be noticed.
        captures: Whether passes may be captured with it.
    """

    inputs: Inputs
    begins: bool
    watched: bool
    captures: bool


class PassHistory:
    """Counts the steps, and remembers the shapes that have run.

    Args:
        room: What passes must have room for.

    Attributes:
        accumulates: Whether a step has had more than one micro-batch.
    """

    def __init__(self, room: Room) -> None:
        self._room, self._steps = room, 0
        self._sizes: dict[torch.Size, tuple[int, ...]] = {}  # of the shapes that have run: what they needed room for
        self.accumulates = False

    def note(self, ids_BT: Tensor, targets_BT: Tensor, begins: bool) -> Turn:
        """Return the place of the next micro-batch, which needs what those of its shape have needed so far."""
        self._steps += begins
        self.accumulates |= not begins
        sizes, before = self._room.needed(ids_BT), self._sizes.get(ids_BT.shape)
        if before is not None:
            sizes = tuple(map(max, sizes, before))
        self._sizes[ids_BT.shape] = sizes
        captures = begins and self._steps > _WATCHED and before is not None
        return Turn(Inputs(ids_BT, targets_BT, sizes), begins, self._steps == _WATCHED, captures)
