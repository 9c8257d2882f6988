"""All graphs of a run: what they share, and what becomes of them together.

Shape legend: B batch, T tokens.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from torch import Tensor

from litgpt_moe_ext.moe.balancing.step_shares import nothing_counted
from litgpt_moe_ext.training.steps.graphs.capture import Capture, Loss, Passes
from litgpt_moe_ext.training.steps.graphs.gradient_tasks import Replay, TaskGraphs
from litgpt_moe_ext.training.steps.graphs.passes import CapturedPasses
from litgpt_moe_ext.training.steps.graphs.validation import CapturedValidation


class Graphs(NamedTuple):
    """The graphs of a run. They share memory, so one must have ended before another runs.

    Attributes:
        passes: Those of micro-batches.
        tasks: What happens to the gradients of the passes.
        validation: The loss without gradients.
    """

    passes: CapturedPasses
    tasks: TaskGraphs
    validation: CapturedValidation


class SharingCapture(NamedTuple):
    """Captures passes that share what they can, in parallel branches.

    Attributes:
        capture: Captures them.
        sharing: The scope in which they share.
        abreast: The scope in which parts of layers get branches of their own.
    """

    capture: Capture
    sharing: Callable[[], AbstractContextManager[None]]
    abreast: Callable[[], AbstractContextManager[None]]

    def passes(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor, add: bool) -> Passes:
        """See `Capture.passes`."""
        with self.sharing(), nothing_counted(), self.abreast():
            return self.capture.passes(loss, ids_BT, targets_BT, add)

    def forward(self, loss: Loss, ids_BT: Tensor, targets_BT: Tensor) -> Replay:
        """See `Capture.forward`. What is shared is only kept up to date for `passes`."""
        with self.abreast():
            return self.capture.forward(loss, ids_BT, targets_BT)

    def function(self, function: Callable[[], Tensor | None]) -> Replay:
        """See `Capture.function`."""
        return self.capture.function(function)
