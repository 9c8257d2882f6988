"""The threads of the `tokenizers` library."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_parallelism_is_ours = False  # whether TOKENIZERS_PARALLELISM holds our value rather than a choice of the user


@contextmanager
def threads_for_tokenizers() -> Iterator[None]:
    """Let the `tokenizers` library use all cores inside the block, and never in processes forked afterwards.

    Its thread pool does not survive a fork. Left alone the library prints a warning in every forked worker; saying
    "false" once the work is done keeps it quiet and safe. A value of TOKENIZERS_PARALLELISM set by the user is left
    as it is.
    """
    global _parallelism_is_ours
    if "TOKENIZERS_PARALLELISM" in os.environ and not _parallelism_is_ours:
        yield
        return
    _parallelism_is_ours = True
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
