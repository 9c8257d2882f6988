"""Triton's interpreter without what it does over and over: a tenth to a third of its time in these tests.

At every launch it puts its own functions in the place of those of `triton.language`, and it does so again for every
function that a kernel calls. Once for a launch is enough.
"""

import functools
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _languages(function):
    """Return the modules of the language that a kernel's function sees, which are what the interpreter changes."""
    seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return frozenset(module.__name__ for module in seen if module in (tl, tl.core))


def install():
    """Change it for this process."""
    launch, change = interpreter.GridExecutor.__call__, interpreter._patch_lang
    changed = set()

    def call(self, *args, **kwargs):
        changed.clear()  # a launch takes its changes back when it ends
        return launch(self, *args, **kwargs)

    def change_once(function):
        if not _languages(function) <= changed:
            changed.update(_languages(function))
            return change(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = call, change_once
    of_number = functools.cache(interpreter._get_np_dtype)
    of_pointer = np.dtype(np.uint64)

    def dtype_of(kind):
        return of_pointer if isinstance(kind.scalar, tl.pointer_type) else of_number(kind.scalar)

    interpreter._get_np_dtype = dtype_of
