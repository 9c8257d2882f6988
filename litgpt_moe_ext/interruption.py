"""Ctrl-C and SIGTERM that are not lost, and leave nothing half-written.

Some extension modules drop whatever their imports raise: torch's drops a KeyboardInterrupt while it loads NumPy. The
program would go on with half a NumPy, and fail at the first use of the rest, after hours. Python itself drops what
finalizers raise.

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
# What passes a signal on to its whole process group and to its child (`timeout`, a terminal and `uv run`) delivers it
# twice, milliseconds apart; nobody presses Ctrl-C twice within this time in seconds.
_MOMENT = 0.3
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_process = 0  # whose handlers are in place; what it forks inherits them
_end: Callable[[signal.Signals], int]
_postponed = False
_raised = _NOTHING = (0, -math.inf)  # which signal raised last, and when
_again: dict[signal.Signals, threading.Timer] = {}  # what raises signals that came when nothing could be raised


class Terminated(BaseException):
    """SIGTERM asks the program to end.

    Not a KeyboardInterrupt, after which a conversation goes on.
    """


@contextmanager
def interruptible(end: Callable[[signal.Signals], int]) -> Iterator[None]:
    """In the scope, raise KeyboardInterrupt on Ctrl-C and Terminated on SIGTERM.

    Not while an extension module loads: then after it; and once more where Python had to drop it. A signal that comes
    twice counts once, and a Ctrl-C also where the first has ended the scope. Where another handler than Python's is in
    place, and outside the main thread, nothing changes.

    Args:
        end: Says that a signal ends the program, and returns its exit status; for `ending_at_once`.
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

    For what waits for other processes: no Python code runs meanwhile, so nothing could be raised.
    """
    if signal.getsignal(signal.SIGTERM) is _interrupt and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """In the scope, which is short, raise nothing on a signal, but soon after it.

    To block signals is not enough: the threads of extension modules receive them, too.
    """
    global _postponed
    _postponed = True
    try:
        yield
    finally:
        _postponed = False


@contextmanager
def ending_at_once() -> Iterator[None]:
    """In the scope, which runs long in code that is not Python's and leaves nothing half-written, end on a signal.

    Python would raise nothing before that code returns. A thread hears of the signal at once.
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
    """Return the signal that raised an error, or made something else raise it on the way out; None if none did."""
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
    # Stands in for Python's handler behind a scope that a signal has ended: while the program ends, that would raise
    # in the middle of somebody's clearing up.
    if not _comes_twice(number):
        signal.default_int_handler(number, frame)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _raised
    if number == signal.SIGTERM and os.getpid() != _process:
        # A forked worker ends as it would have without this.
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
    if waiting is not None and waiting.is_alive():  # which no thread of another process is behind a fork
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
    """End this process without a word when nobody reads its output any more, as `| head` expects.

    Who trains or loads a model has other pipes, whose ends must not end it.
    """
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
