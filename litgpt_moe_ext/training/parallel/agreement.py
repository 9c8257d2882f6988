"""What one of several processes has seen or decided, and all must act on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.training.callback import Callback


class Agreement(Callback):
    """Asks all processes when the gradients of a step are there, and knows when the step is over.

    The answer goes to memory of the host behind the gradients, whose norm is looked at anyway. Asked for after the
    optimizer's step, it would keep the host from starting the next one until the device has finished this one.

    Args:
        fabric: The connected processes.
        seen: Returns what this process has seen, as numbers; always as many.
    """

    def __init__(self, fabric: Any, seen: Callable[[], tuple[int, ...]]) -> None:
        self._fabric, self._seen = fabric, seen
        self._asked = False
        self._answer: Tensor | None = None
        self._here: torch.cuda.Event | None = None

    def on_gradients_clipped(self, norm: Tensor | None, module: Any, optimizer: Any, scaled: bool) -> None:
        """Ask: what this process sees later in the step is for the next."""
        if self._fabric.world_size > 1:
            self._ask()

    def reached(self) -> tuple[int, ...]:
        """Return the largest of what any process has seen, number by number; every process must call after a step."""
        if self._fabric.world_size == 1:
            return self._seen()
        if not self._asked:  # before the first step, and after one without gradients
            self._ask()
        self._asked = False
        if self._here is not None:
            self._here.synchronize()
        assert self._answer is not None
        return tuple(self._answer.tolist())

    def reached_earlier(self) -> tuple[int, ...]:
        """Return the same as of the call before, or as of now in the first, and ask anew without waiting.

        So a process may look between the passes of a model, and stay ahead of its device.
        """
        found = self.reached()
        if self._fabric.world_size > 1:
            self._ask()
        return found

    def _ask(self) -> None:
        cuda = self._fabric.device.type == "cuda"
        seen = torch.tensor(self._seen())
        if self._answer is None:
            self._answer = torch.empty_like(seen, pin_memory=cuda)
            self._here = torch.cuda.Event() if cuda else None
        # From pinned memory and back, for which the host does not wait.
        self._answer.copy_(seen)
        everywhere = self._answer.to(self._fabric.device, non_blocking=True)
        torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MAX)
        self._answer.copy_(everywhere, non_blocking=True)
        if self._here is not None:
            self._here.record()
        self._asked = True


def agree(fabric: Any, decide: Callable[[], Any]) -> Any:
    """Return on every rank what `decide` returns on the first, which alone calls it; its error is raised on all.

    Args:
        fabric: The launched fabric; every rank must call.
        decide: Looks at the file system, which may take long or differ between nodes.
    """
    outcome, error = None, None
    if fabric.is_global_zero:
        try:
            outcome = decide()
        except (OSError, ValueError) as problem:  # of the file system, or a settings error
            error = problem
    outcome, error = fabric.broadcast((outcome, error))
    if error is not None:
        raise error
    return outcome
