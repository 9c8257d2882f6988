"""Python's garbage collector while a program starts.

Importing torch and LitGPT creates two million objects, nearly all of which stay. The collector scans them again and
again for garbage, which takes an eighth of the time to start.
"""

import contextlib
import gc
from collections.abc import Iterator

_USUAL = gc.get_threshold()
# New objects before the youngest generation is collected; Python's default is in the hundreds.
_OBJECTS = 50_000


@contextlib.contextmanager
def collect_rarely() -> Iterator[None]:
    """Collect garbage rarely in the scope."""
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Collect garbage in the scope as often as usual, but not among the objects that exist at its start."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*_USUAL)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
