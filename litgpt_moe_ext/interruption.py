"""Ctrl-C that is not lost.

Some extension modules drop whatever their imports raise: torch's drops a KeyboardInterrupt while it loads NumPy. The
program would go on with half a NumPy, and fail at the first use of the rest, after hours.

Imports nothing of this package.
"""

import _thread
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_LOOK_EVERY = 0.05  # seconds


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C in the scope, but not while an extension module loads: then after it.

    Where another handler than Python's is in place, and outside the main thread, nothing changes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def comes_of_interruption(error: BaseException | None) -> bool:
    """Return whether an error is a KeyboardInterrupt, or was raised on the way out of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _loads_extension(frame):
        raise KeyboardInterrupt
    timer = threading.Timer(_LOOK_EVERY, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def _loads_extension(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_qualname.startswith("ExtensionFileLoader."):
            return True
        frame = frame.f_back
    return False
