"""Paths that are given: refused before any work if they cannot be looked up, read, or written to.

`pathlib` answers `is_file` for a path that is not there, and raises for one below a folder that may not be entered, or
with a name that is too long. With these checks no command needs to think of that, and none finds out after an hour that
its result has no place.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import refuse_first
from litgpt_moe_ext.files.durable import dead_link, is_stream, refusal
from litgpt_moe_ext.wording import quoted

# What commands call the files and folders that they make. Those of a training have checks of their own.
_FILES, _FOLDERS = ("out", "json", "slurm", "save_filepath"), ("out_dir",)
_OF_TRAINING = ("out_dir", "data_path", "artifacts_dir", "wandb_artifacts_dir")
# As in $SCRATCH/data or /scratch/${USER}/data. A file that is really called like that is found before this is asked.
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def check_path(name: str, path: Path) -> None:
    """Raise SettingsError, with the name of the argument, unless a path can be looked up, and read or written to.

    Args:
        name: Of a command's argument, which says whether the command reads or makes what is there.
        path: Its value.
    """
    if name in _FILES or name in _FOLDERS:
        check_written(name, path)
    else:
        refuse_first(_unreadable(name, path))


def check_written(name: str, path: Path) -> None:
    """Raise SettingsError, with the name of what says where it is, unless a file (or `out_dir`) can be written."""
    refuse_first(_unwritable(name, path))


def check_paths(settings: Any) -> None:
    """Do the same for all paths in the settings of a training: nested mappings (also jsonargparse's) and lists."""
    for name, path in _paths("", settings):
        made = name.rpartition(".")[2] in _OF_TRAINING
        refuse_first((_out_of_sight if made else _unreadable)(name.replace(".init_args", ""), path))


def _out_of_sight(name: str, path: Path) -> Iterator[str]:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if path.parts and path.parts[0].startswith("~"):
            yield f"{name}: {quoted(path)} begins with ~, which only shells replace by a home directory; write that out"
        elif (variable := _VARIABLE.search(str(path))) is not None:
            shown = variable.group()
            yield f"{name}: {quoted(path)} has {shown}, which only shells replace by a variable; write its value out"
        return
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        # A recipe's letters are Unicode, names of files are not everywhere.
        remedy = "set PYTHONUTF8=1, or name" if isinstance(error, UnicodeEncodeError) else "name"
        yield f"{name}: {quoted(path)} cannot be looked up ({reason}); {remedy} another path"


def _unreadable(name: str, path: Path) -> Iterator[str]:
    yield from _out_of_sight(name, path)
    if os.path.exists(path) and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        yield f"{name}: {quoted(path)} cannot be read (Permission denied); name what you may read"


def _unwritable(name: str, path: Path) -> Iterator[str]:
    yield from _out_of_sight(name, path)
    if name in _FILES and path.is_dir():
        yield f"{name}: {quoted(path)} is a folder; name a file"
        return
    if is_stream(path):
        if not os.access(path, os.W_OK):
            yield f"{name}: {quoted(path)} cannot be written (Permission denied); name another path"
        return
    # A folder is made with all that it lies in; a file is written beside its place and renamed.
    folder = path if name in _FOLDERS else path.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        what = "a link to what is not there" if dead_link(folder) else "a file"
        yield f"{name}: {quoted(path)} cannot be made, because {quoted(folder)} is {what}; name another path"
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield f"{name}: {quoted(path)} cannot be written ({quoted(folder)} is read-only for you); name another path"
    elif (problem := refusal(folder)) is not None:
        because = f"{quoted(folder)} takes no new files ({problem})"
        yield f"{name}: {quoted(path)} cannot be made: {because}; name another path"


def _paths(name: str, value: Any) -> Iterator[tuple[str, Path]]:
    if isinstance(value, Path):
        yield name, value
    elif isinstance(value, Mapping) or hasattr(value, "as_dict"):
        for key, inner in (value if isinstance(value, Mapping) else vars(value)).items():
            yield from _paths(f"{name}.{key}".lstrip("."), inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _paths(f"{name}.{index}", inner)
