"""Names of a module of LitGPT that mean something else for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def replaced(module: ModuleType, names: Mapping[str, Any]) -> Iterator[None]:
    """Give names of a module other values for the time of the scope.

    Args:
        module: Whose functions look the names up when they run.
        names: The values by name.
    """
    originals = {name: getattr(module, name) for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(originals)
