"""What a terminal can do."""

import os
from typing import TextIO


def redraws(stream: TextIO) -> bool:
    """Return whether a progress bar can be drawn on a stream: a terminal that can go back in its last line.

    Those inside editors and on serial lines often cannot, which TERM says. Rich would draw nothing there until the end.
    """
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
