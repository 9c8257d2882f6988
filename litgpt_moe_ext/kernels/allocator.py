"""Reuse of freed memory for large tensors on a CPU.

glibc's `malloc` maps blocks of more than 32 MiB anew for every allocation and hands them back when they are freed. The
kernel clears every page again: 44 ms for 100 MB where 4 ms suffice. Stacked expert weights are such blocks, and a
training step allocates their gradients anew. If glibc is told to keep freed memory (`mallopt`, malloc.h), the second
step reuses the memory of the first.

Switches itself off without glibc, and if the user has chosen settings (`MALLOC_*` variables, or
`GLIBC_TUNABLES`, see mallopt(3)).
"""

import ctypes
import functools
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_USER_CHOICES = ("GLIBC_TUNABLES", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@functools.cache
def keep_large_blocks() -> bool:
    """Let the process keep freed memory for its next allocations; only the first call does anything.

    Returns:
        Whether the allocator accepted the settings.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _USER_CHOICES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No separate mappings, and a heap that is trimmed only when 2 GiB at its end are free.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
