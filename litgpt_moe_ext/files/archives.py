"""Archives of `torch.save`, such as a `lit_model.pth`, opened without running code that is in them."""

import pickle
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch

from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.files.checksums import problem_with_names
from litgpt_moe_ext.wording import quoted

COPY_AGAIN = "copy it again, or name another checkpoint"
_LONGEST_CAUSE = 400


def open_archive(path: Path, setting: str) -> dict[str, Any]:
    """Return the content of a `lit_model.pth`, with tensors on the CPU that stay on disk until they are used.

    Args:
        path: The file.
        setting: Name of its setting, for errors.

    Raises:
        SettingsError: If the file is damaged (tensor values are not checked), or holds Python objects other than
            tensors and plain data.
    """
    refuse_cut_off(path, setting)
    if damage := problem_with_names(path):  # before trusting names and shapes
        raise SettingsError(f"{setting}: in {quoted(path.parent)} {damage}; {COPY_AGAIN}")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        objects = _foreign_objects(path)
        if not objects:
            raise SettingsError(f"{setting}: {path} is damaged; {COPY_AGAIN}") from error
        raise SettingsError(
            f"{setting}: {path} holds {', '.join(objects)}, which could run code; it must hold tensors and plain data "
            "only; open it with what wrote it, and save its weights alone"
        ) from None
    except (EOFError, RuntimeError) as error:
        raise SettingsError(f"{setting}: {path} is damaged ({shortened(error)}); {COPY_AGAIN}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{setting}: {path} holds a {type(content).__name__}; it must hold weights by name")
    return content


def refuse_cut_off(path: Path, setting: str) -> None:
    """Raise SettingsError if a `lit_model.pth` cannot be read, or lacks its end.

    Args:
        path: The file.
        setting: Name of its setting, for errors.
    """
    try:
        with path.open("rb") as file:
            is_whole = zipfile.is_zipfile(file)
    except OSError as error:
        raise SettingsError(f"{setting}: {path} cannot be read ({error.strerror}); {COPY_AGAIN}") from error
    if not is_whole:
        raise SettingsError(f"{setting}: {path} is damaged or cut off; {COPY_AGAIN}")


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
ONLY_PLAIN = "where checkpoints hold tensors and plain data only"


def kind_of(value: object) -> str:
    """Return the full name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def foreign_object(value: Any) -> object | None:
    """Return an object inside a value that `open_archive` would refuse, or None if all are tensors and plain data."""
    if type(value) in _PLAIN or isinstance(value, torch.Tensor):
        return None
    if type(value) in (dict, OrderedDict, Counter):
        value = [*value, *value.values()]
    elif type(value) not in (list, tuple, set):
        return value
    return next((found for item in value if (found := foreign_object(item)) is not None), None)


def shortened(error: Exception) -> str:
    """Return the message of an error in one line of limited length."""
    text = one_line(error)
    return text if len(text) <= _LONGEST_CAUSE else text[:_LONGEST_CAUSE] + " ..."


def _foreign_objects(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
        return []  # unreadable
