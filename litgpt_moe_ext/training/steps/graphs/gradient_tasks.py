"""What happens to the gradients of a step, clipping and the optimizer, as CUDA graphs.

With a small model and Muon, the host would spend most of a step on launching the optimizer's kernels. They can only be
captured with gradients that stay where they are, as those of captured passes do.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class GradientTask(NamedTuple):
    """Work on the gradients of a step.

    Attributes:
        name: What it is, in messages; no other task of the run has the same.
        run: Does the work without waiting for the device.
        depends_on: Returns whatever `run` would bake into a graph besides the gradients' addresses: those of other
            tensors, and numbers that its kernels receive as arguments.
    """

    name: str
    run: Callable[[], Tensor | None]
    depends_on: Callable[[], tuple]


def run_now(task: GradientTask) -> Tensor | None:
    """Do the work without a graph."""
    return task.run()


class Replay(NamedTuple):
    """A captured function.

    Attributes:
        run: Repeats its kernels.
        result: What it returned, to which every replay writes.
    """

    run: Callable[[], None]
    result: Tensor | None


class TaskGraphs:
    """The graphs of tasks over the gradients of the same captured passes.

    Args:
        capture: Captures a function without running its kernels.
    """

    def __init__(self, capture: Callable[[Callable[[], Tensor | None]], Replay]) -> None:
        self._capture = capture
        self._last: dict[str, tuple] = {}
        self._captured: dict[str, tuple[tuple, Replay]] = {}

    def of(self, task: GradientTask) -> Replay | None:
        """Return the graph of a task, captured now if it has become steady; None if it must run without."""
        depends_on = task.depends_on()
        last, self._last[task.name] = self._last.get(task.name), depends_on
        depended_on, replay = self._captured.get(task.name, ((), None))
        if replay is not None and depended_on == depends_on:
            return replay
        if last != depends_on:
            return None  # a setting that changes in every step would be captured in every step
        replay = self._capture(task.run)
        self._captured[task.name] = depends_on, replay
        return replay
