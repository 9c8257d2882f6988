"""When to stop: Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP, a time limit.

A terminal that is closed sends SIGHUP, also when a connection to it breaks. Clusters announce the end of a job by
SIGTERM, or some time before by a signal of choice: SLURM five minutes before with `#SBATCH --signal=SIGUSR1@300`.

Runs stop only between two iterations, or in a validation or benchmark there, after a finished step and before the next
batch is fetched: the saved state is exactly that of an uninterrupted run.
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

    Like KeyboardInterrupt it is not an `Exception`, so that no handler on the way mistakes it for an error.

    Attributes:
        signal_number: The signal.
        checkpoint: Directory that holds the state, or None if no step was finished yet.
    """

    def __init__(self, signal_number: int, checkpoint: Path | None) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.checkpoint = checkpoint


class TrainingStopped(RuntimeError):  # noqa: N818  (not every reason is an error)
    """Training cannot or should not continue; the message says why, what is saved, and what to do."""


# Wrappers such as `timeout`, or `uv run` in a terminal, deliver one Ctrl-C twice, milliseconds apart: to their child
# and to the process group. Repeats within this time, in seconds, are ignored.
MOMENT = 1.0
_MESSAGE_SECONDS = 1.0  # longest wait for the message about a signal, as nobody may be reading the output

# Windows has neither SIGUSR1 nor SIGHUP.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class StopRequests:
    """Remembers a signal until the loop can act on it.

    Args:
        say: Told what will happen next when a signal arrives.

    Attributes:
        received: The signal that this process received, or 0.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.received = 0
        self._first_at = 0.0
        self._saying: list[Any] = []  # one lock per message, held until it is printed

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT, SIGTERM, SIGUSR1 and SIGHUP in the scope; a SIGINT after another signal ends the program.

        A SIGHUP that is ignored, as after `nohup`, stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [n for n in _SIGNALS if signal.Signals(n).name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            while self._saying:  # before the program prints more, or ends
                self._saying.pop().acquire(timeout=_MESSAGE_SECONDS)

    def _on_signal(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.received:
            if now - self._first_at < MOMENT:
                return
            if number == signal.SIGINT:
                raise KeyboardInterrupt
        self.received, self._first_at = number, now
        name = signal.Signals(number).name
        message = f"{name} received: finishing the step, then saving. Ctrl-C again quits at once."
        # From a thread, because the signal may have interrupted this one in the middle of a write to the same stream,
        # which Python does not let it re-enter.
        lock = _thread.allocate_lock()
        lock.acquire()
        self._saying.append(lock)
        _thread.start_new_thread(self._say_beside, (message, lock))

    def _say_beside(self, message: str, lock: Any) -> None:
        try:
            self._say(message)
        finally:
            lock.release()


class Deadline:
    """LitGPT's `train.max_time`, which its own `pretrain` ignores.

    Args:
        max_time: Time limit of this run in seconds, or None.
    """

    def __init__(self, max_time: float | None) -> None:
        self._max_time = max_time
        self._end: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether this process's time is over; other processes have their own clocks."""
        if self._max_time is None:
            return False
        if self._end is None:
            # The clock starts with the first step, because LitGPT's preparations may take long and train nothing. That
            # step is always trained: without any, `final` would be untrained, and to continue would not help.
            self._end = time.monotonic() + self._max_time
            return False
        return time.monotonic() >= self._end

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; infinite without one."""
        if self._max_time is None:
            return math.inf
        return self._max_time if self._end is None else max(0.0, self._end - time.monotonic())
