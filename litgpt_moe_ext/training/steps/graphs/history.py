"""The history of a run's passes, which decides when to capture them and for what sizes.

Shape legend: B batch, T tokens.
"""

from typing import NamedTuple

from torch import Tensor

from litgpt_moe_ext.training.steps.graphs.inputs import Inputs
from litgpt_moe_ext.training.steps.graphs.room import Room, SizesByShape

# The first step compiles kernels, which a capture does not allow, and the optimizer creates its states. The second is
# watched for waits for the device, which a graph cannot contain.
_WATCHED = 2


class Turn(NamedTuple):
    """A micro-batch and its place in the run.

    Attributes:
        inputs: The micro-batch.
        begins: Whether it is the first of a step: no parameter has a gradient.
        watched: Whether to watch for waits for the device.
        captures: Whether passes may be captured with it.
    """

    inputs: Inputs
    begins: bool
    watched: bool
    captures: bool


class PassHistory:
    """Counts the steps and remembers the shapes that have run.

    Args:
        room: Sizes that passes must have room for.

    Attributes:
        accumulates: Whether a step has had more than one micro-batch.
    """

    def __init__(self, room: Room) -> None:
        self._sizes, self._steps = SizesByShape(room), 0
        self.accumulates = False

    def note(self, ids_BT: Tensor, targets_BT: Tensor, begins: bool) -> Turn:
        """Return the turn of the next micro-batch, with the largest sizes that its shape has needed so far."""
        self._steps += begins
        self.accumulates |= not begins
        captures = begins and self._steps > _WATCHED and ids_BT.shape in self._sizes
        inputs = Inputs(ids_BT, targets_BT, self._sizes.note(ids_BT))
        return Turn(inputs, begins, self._steps == _WATCHED, captures)
