"""Handling of Ctrl-C and SIGTERM that loses no signal and leaves nothing half-written.

Some extension modules drop exceptions raised by their imports: torch's drops a KeyboardInterrupt while it loads NumPy.
The program would go on with half of NumPy, and fail at the first use of the rest, after hours. Python itself drops
exceptions of finalizers.

Imports nothing of this package.
"""

import _thread
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

_LOOK_EVERY = 0.05  # seconds
# Programs that pass a signal on to their process group and to their child (`timeout`, a terminal and `uv run`) deliver
# it twice, milliseconds apart; nobody presses Ctrl-C twice within this many seconds.
_MOMENT = 0.3
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_process = 0  # the process that installed the handlers, which its forks inherit
_end: Callable[[signal.Signals], int]
_postponed = False
_raised = _NOTHING = (0, -math.inf)  # which signal raised last, and when
_again: dict[signal.Signals, threading.Timer] = {}  # timers that raise postponed signals


class Terminated(BaseException):
    """SIGTERM asks the program to end.

    Not a KeyboardInterrupt, after which a chat goes on.
    """


@contextmanager
def interruptible(end: Callable[[signal.Signals], int]) -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C and Terminated on SIGTERM in the scope.

    While an extension module loads, the exception waits until after that; if Python had to drop it, it is raised again.
    A signal that is delivered twice counts once, and so does a Ctrl-C whose first delivery has ended the scope. Outside
    the main thread, and if another handler than Python's is installed, nothing changes.

    Args:
        end: Prints that a signal ends the program, and returns its exit status; for `ending_at_once`.
    """
    global _process, _end, _raised
    in_main = threading.current_thread() is threading.main_thread()
    taken = [number for number, usual in _USUAL.items() if in_main and signal.getsignal(number) in (usual, _after)]
    if not taken:
        yield
        return
    _process, _end, _raised = os.getpid(), end, _NOTHING
    dropped = sys.unraisablehook
    sys.unraisablehook = partial(_again_if_dropped, dropped)
    for number in taken:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, _after if number == signal.SIGINT and _comes_twice(number) else _USUAL[number])
        sys.unraisablehook = dropped
        while _again:
            _again.popitem()[1].cancel()


def count_again() -> None:
    """Let the next signal count however soon it comes: the user has done something else since the last one."""
    global _raised
    _raised = _NOTHING


def end_at_once_on_termination() -> None:
    """Let SIGTERM end this process at once until the scope of `interruptible` ends.

    For code that waits for other processes: no Python code runs meanwhile, so nothing could be raised.
    """
    if signal.getsignal(signal.SIGTERM) is _interrupt and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Postpone exceptions for signals until soon after the scope, which must be short.

    Blocking signals is not enough, because the threads of extension modules receive them too.
    """
    global _postponed
    _postponed = True
    try:
        yield
    finally:
        _postponed = False


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End at once on a signal in the scope, which runs native code for long and leaves nothing half-written.

    Python would not raise before that code returns, but a thread hears of the signal at once.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _interrupt
    if not ours:
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_end_when_told, args=(heard,), daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        told.close()
        listener.join()


def _end_when_told(heard: socket.socket) -> None:
    with heard:
        while number := heard.recv(1):
            if number[0] in _USUAL:
                os._exit(_end(signal.Signals(number[0])))


def interruption_behind(error: BaseException | None) -> signal.Signals | None:
    """Return the signal that raised an error or led to it; None if there was none."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return signal.SIGINT
        if isinstance(error, Terminated):
            return signal.SIGTERM
        error = error.__cause__ or error.__context__
    return None


def _comes_twice(number: int) -> bool:
    raised, when = _raised
    return number == raised and time.monotonic() - when < _MOMENT


def _after(number: int, frame: FrameType | None) -> None:
    # Replaces Python's handler after a scope that a signal has ended: while the program ends, Python's would raise in
    # the middle of clean-up code.
    if not _comes_twice(number):
        signal.default_int_handler(number, frame)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _raised
    if number == signal.SIGTERM and os.getpid() != _process:
        # A forked worker ends as it would without this handler.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if not (_postponed or _loads_extension(frame)):
        if _comes_twice(number):
            return
        _raised = number, time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated
    _interrupt_again(number)


def _again_if_dropped(otherwise: Callable[[Any], object], dropped: Any) -> None:
    global _raised
    if number := interruption_behind(dropped.exc_value):
        _raised = _NOTHING
        _interrupt_again(number)
    else:
        otherwise(dropped)


def _interrupt_again(number: int) -> None:
    signum = signal.Signals(number)
    waiting = _again.get(signum)
    if waiting is not None and waiting.is_alive():  # after a fork, the parent's threads are not
        return
    _again[signum] = timer = threading.Timer(_LOOK_EVERY, _look_again, (signum,))
    timer.daemon = True
    timer.start()


def _look_again(signum: signal.Signals) -> None:
    _again.pop(signum, None)
    _thread.interrupt_main(signum)


def _loads_extension(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_qualname.startswith("ExtensionFileLoader."):
            return True
        frame = frame.f_back
    return False


def end_with_the_reader() -> None:
    """End this process silently when nobody reads its output any more, as `| head` expects.

    Not for processes that train or load a model: they have other pipes, which may close without ending them.
    """
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
