"""Paths that cannot even be looked up: refused once, where they are given.

`pathlib` answers `is_file` for a path that is not there, and raises for one below a folder that may not be entered, or
with a name that is too long. With this check no command needs to think of that.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import refuse_first


def check_path(name: str, path: Path) -> None:
    """Raise SettingsError, with the setting's name, if the system cannot say whether there is something at a path."""
    refuse_first(_problem(name, path))


def check_paths(settings: Any) -> None:
    """Do the same for all paths in settings, which may be nested mappings (also jsonargparse's) and lists."""
    refuse_first(problem for name, path in _paths("", settings) for problem in _problem(name, path))


def _problem(name: str, path: Path) -> Iterator[str]:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        setting = name.replace(".init_args", "")
        yield f"{setting}: {str(path)!r} cannot be looked up ({reason}); name a path that you may read"


def _paths(name: str, value: Any) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield name, value
    elif isinstance(value, Mapping) or hasattr(value, "as_dict"):
        for key, inner in (value if isinstance(value, Mapping) else vars(value)).items():
            yield from _paths(f"{name}.{key}".lstrip("."), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _paths(f"{name}.{index}", inner)
