"""When to stop: Ctrl-C, SIGTERM and SIGUSR1, a time limit.

Clusters announce the end of a job by SIGTERM, or by a signal of choice some time before: SLURM with
`#SBATCH --signal=SIGUSR1@300` five minutes before.

Everything is decided between two iterations, or in a validation or benchmark there, when the step is finished and the
next batch is not fetched yet: what is saved then is exactly what an uninterrupted run would have had.
"""

import _thread
import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class TrainingInterrupted(BaseException):
    """A signal ended the run between two steps, after its state was saved.

    Like KeyboardInterrupt no `Exception`, so that nothing in between mistakes it for an error.

    Attributes:
        signal_number: The signal.
        checkpoint: Directory that holds the state, or None if no step was finished yet.
    """

    def __init__(self, signal_number: int, checkpoint: Path | None) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.checkpoint = checkpoint


class TrainingStopped(RuntimeError):  # noqa: N818  (not every reason is an error)
    """Training cannot or shall not go on; the message says why, what is saved, and what to do."""


# What passes a signal on to its whole process group and to its child (`timeout`, `uv run` in a terminal) delivers one
# Ctrl-C twice, milliseconds apart; nobody presses it twice within this time in seconds.
MOMENT = 1.0
_MESSAGE_SECONDS = 1.0  # for a message that a signal has come; nobody may read it

# Windows has no SIGUSR1.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopRequests:
    """Remembers a signal until the loop can act on it.

    Args:
        say: Told what will happen next when a signal arrives.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._received = 0
        self._first_at = 0.0
        self._saying: list[Any] = []  # a lock for each message, held until it is said

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGINT, SIGTERM and SIGUSR1 in the scope; a later SIGINT ends the program at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            while self._saying:  # before the program says more, or ends
                self._saying.pop().acquire(timeout=_MESSAGE_SECONDS)

    def _on_signal(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self._received:
            if now - self._first_at < MOMENT:
                return
            if number == signal.SIGINT:
                raise KeyboardInterrupt
        self._received, self._first_at = number, now
        name = signal.Signals(number).name
        message = f"{name} received: finishing the step, then saving. Ctrl-C again quits at once."
        # Where the signal found this thread writing to the same place, Python does not let it write there.
        lock = _thread.allocate_lock()
        lock.acquire()
        self._saying.append(lock)
        _thread.start_new_thread(self._say_beside, (message, lock))

    def _say_beside(self, message: str, lock: Any) -> None:
        try:
            self._say(message)
        finally:
            lock.release()

    @property
    def received(self) -> int:
        """The signal that this process received, or 0."""
        return self._received


class Deadline:
    """LitGPT's `train.max_time`, which its own `pretrain` ignores.

    Args:
        max_time: Seconds of this run, or None.
    """

    def __init__(self, max_time: float | None) -> None:
        self._max_time = max_time
        self._end: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether the time of this process is over; other processes have clocks of their own."""
        if self._max_time is None:
            return False
        # The clock starts with the first step: what LitGPT does before it may take long, and trains nothing.
        self._end = self._end or time.monotonic() + self._max_time
        return time.monotonic() >= self._end

    @property
    def seconds_left(self) -> float:
        """Until then; infinite where nothing ends the run."""
        if self._max_time is None:
            return math.inf
        return self._max_time if self._end is None else max(0.0, self._end - time.monotonic())
