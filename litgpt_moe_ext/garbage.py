"""Python's garbage collector while a program starts.

Importing torch and LitGPT makes two million objects, and nearly all of them stay. The collector looks through them
again and again for ones that it could delete, an eighth of the time that a start takes.
"""

import contextlib
import gc
from collections.abc import Iterator

_USUAL = gc.get_threshold()
# Objects that are made before the youngest are looked through; Python's own number is in the hundreds.
_OBJECTS = 50_000


@contextlib.contextmanager
def collect_rarely() -> Iterator[None]:
    """Look for garbage rarely in the scope."""
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """In the scope, look for garbage as often as usual, but not among the objects that there are at its start."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*_USUAL)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
