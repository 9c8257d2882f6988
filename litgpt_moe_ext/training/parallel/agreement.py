"""Sharing what one process has seen or decided with all processes, which must act on it together."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.errors import refuse_first
from litgpt_moe_ext.training.callback import Callback


class Agreement(Callback):
    """Asks all processes once the gradients of a step are computed; the answer is known when the step is over.

    The answer is copied to the host right after the gradients, whose norm the host waits for anyway. Asking after the
    optimizer's step would keep the host from starting the next step until the device has finished this one.

    Args:
        fabric: The connected processes.
        seen: Returns what this process has seen, as a fixed number of numbers.
    """

    def __init__(self, fabric: Any, seen: Callable[[], tuple[int, ...]]) -> None:
        self._fabric, self._seen = fabric, seen
        self._asked = False
        self._answer: Tensor | None = None
        self._here: torch.cuda.Event | None = None

    def on_gradients_clipped(self, norm: Tensor | None, module: Any, optimizer: Any, scaled: bool) -> None:
        """Ask all processes; what this one sees later in the step counts for the next."""
        if self._fabric.world_size > 1:
            self._ask()

    def reached(self) -> tuple[int, ...]:
        """Return the elementwise maximum of what all processes have seen; every process must call this after a step."""
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
        """Return the answer as of the previous call (at the first call, as of now), and ask anew without waiting.

        So the host can check between a model's passes and still stay ahead of its device.
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
        # To the device and back through pinned memory, so the host does not wait.
        self._answer.copy_(seen)
        everywhere = self._answer.to(self._fabric.device, non_blocking=True)
        torch.distributed.all_reduce(everywhere, op=torch.distributed.ReduceOp.MAX)
        self._answer.copy_(everywhere, non_blocking=True)
        if self._here is not None:
            self._here.record()
        self._asked = True


def agree(fabric: Any, decide: Callable[[], Any]) -> Any:
    """Call `decide` on the first rank only, and return its result, or raise its error, on every rank.

    Args:
        fabric: The launched fabric; every rank must call this.
        decide: Reads the file system, which may take long or differ between nodes.
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


def refuse_together(fabric: Any, problems: Iterable[str]) -> None:
    """Raise SettingsError on every rank if any rank has a problem, with that of the lowest one.

    Args:
        fabric: The launched fabric; every rank must call this.
        problems: What is wrong on this rank; the first counts.
    """
    own = next(iter(problems), None)
    found: list[str | None] = [own]
    if fabric.world_size > 1:
        found = [None] * fabric.world_size
        torch.distributed.all_gather_object(found, own)
    refuse_first(problem for problem in found if problem is not None)
