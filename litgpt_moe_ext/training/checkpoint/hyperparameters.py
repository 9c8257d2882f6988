"""The settings of a run as a YAML file that `run_train.py --config` accepts.

LitGPT 0.5.13 writes the file by parsing the command line again, which fails or writes defaults if training was started
from Python. Here it is written from the values that the run actually uses.
"""

import dataclasses
import inspect
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.callback import Callback

FILE_NAME = "hyperparameters.yaml"


def to_plain(value: Any, name: str = "value") -> Any:
    """Turn a setting into plain data that YAML can store and jsonargparse can read back.

    Dataclasses become dictionaries, without fields that are None by default and still are. Data modules and callbacks
    become a class path with their arguments; those that are not dataclasses keep the arguments as attributes.

    Args:
        value: The setting.
        name: Its name, for the error.

    Raises:
        SettingsError: If a part of it has no equivalent in YAML.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: to_plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, f"{name}.{index}") for index, item in enumerate(value)]
    if isinstance(value, Callback) or (_is_data_module(value) and not dataclasses.is_dataclass(value)):
        return _named(value, _arguments_of(value, name), name)
    if dataclasses.is_dataclass(value):
        fields = {
            f.name: to_plain(getattr(value, f.name), f"{name}.{f.name}")
            for f in dataclasses.fields(value)
            if f.init and not _unset(f, value)
        }
        if _is_data_module(value):
            return _named(value, fields, name)
        return fields
    raise SettingsError(f"{name}: {value!r} must be text, a number, true, false, null, or lists and keys of these")


def _named(value: Any, arguments: dict[str, Any], name: str) -> dict[str, Any]:
    cls = type(value)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": to_plain(arguments, name)}


def _arguments_of(value: Any, name: str) -> dict[str, Any]:
    slots = [slot for cls in type(value).__mro__ for slot in vars(cls).get("__slots__", ())]
    kept = {**vars(value), **{slot: getattr(value, slot) for slot in slots if hasattr(value, slot)}}
    names = inspect.signature(type(value)).parameters
    if missing := [argument for argument in names if argument not in kept and f"_{argument}" not in kept]:
        raise SettingsError(
            f"{name}: {type(value).__qualname__} must keep its argument {missing[0]} as an attribute of that name, "
            f"from which it is written to {FILE_NAME}; add self.{missing[0]} = {missing[0]} to its __init__"
        )
    return {argument: kept.get(argument, kept.get(f"_{argument}")) for argument in names}


def _unset(field: dataclasses.Field, value: Any) -> bool:
    return field.default is None and getattr(value, field.name) is None


def _is_data_module(value: Any) -> bool:
    from litgpt.data import DataModule

    return isinstance(value, DataModule)


def save(settings: dict[str, Any], directory: Path) -> None:
    """Write `settings` (plain data) to `hyperparameters.yaml` in the unfinished checkpoint `directory`."""
    (directory / FILE_NAME).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def read(checkpoint_dir: Path) -> dict[str, Any]:
    """Return the settings in a checkpoint as plain data; empty if there are no readable ones."""
    try:
        settings = yaml.safe_load((checkpoint_dir / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # ValueError: not UTF-8, or an impossible date
        return {}
    return settings if isinstance(settings, dict) else {}
