"""Temporary replacement of names in a module of LitGPT."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


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
