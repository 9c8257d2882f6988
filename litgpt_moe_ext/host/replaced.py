"""Replacing names in a module of LitGPT, for good or within a scope."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any


def wrapping(module: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Return a decorator that puts a function in place of a module's, which it gets as its first argument.

    Not for functions of the model: every call passes through one more Python function.
    """
    original = getattr(module, name)

    def put_in_place(function: Callable[..., Any]) -> None:
        @wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        setattr(module, name, replacement)

    return put_in_place


@contextmanager
def replaced(module: ModuleType, names: Mapping[str, Any]) -> Iterator[None]:
    """Replace names of a module within the scope.

    Args:
        module: The module, whose functions look the names up when they run.
        names: The new values by name.
    """
    originals = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(originals)
