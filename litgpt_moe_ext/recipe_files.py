"""Reads YAML as people write it, in recipes and flags, and locates mistakes by file and line."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from litgpt_moe_ext.errors import SettingsError, did_you_mean_recipe, nearest, one_line
from litgpt_moe_ext.wording import quoted

CLASS_KEYS = {"class_path", "init_args"}
"""The keys of a setting that names a class."""

# How deeply the nodes of a recipe may be nested, and how many it may have with every alias expanded.
_DEEPEST, _LARGEST = 50, 100_000

# Settings that may stand in files of their own: the data module, and every section of a run's settings.
SECTIONS = (
    *("data", "train", "eval", "log", "sample", "evaluate", "schedule", "parameter_groups", "anomaly", "ema"),
    *("checkpoint", "distributed"),
)

_TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
# Types that no setting has and JSON lacks.
_FOREIGN_TAGS = {f"tag:yaml.org,2002:{kind}": f"!!{kind}" for kind in ("binary", "omap", "pairs", "set")}


def read_recipe(file: Path, setting: str = "--config") -> tuple[dict[str, Any], dict[str, int]]:
    """Return the settings in a file, and the line of every key and of every item of a list, by name.

    A section that stands in a file of its own (`train: train.yaml`, beside the recipe) is read from there.

    Args:
        file: A YAML file.
        setting: The setting that named it, for the error.

    Raises:
        SettingsError: If it does not hold settings as keys and values, each key once.
    """
    settings, lines = read_mapping(file, setting)
    for name in SECTIONS:
        if names_file(settings.get(name)):
            settings[name] = read_mapping(file.parent / settings[name], name)[0]
    return settings, lines


def names_file(value: Any) -> bool:
    """Return whether the value of a section is the name of a file that holds it, as in LitGPT."""
    return isinstance(value, str) and value.endswith((".yaml", ".yml", ".json"))


def read_mapping(file: Path, setting: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the settings in one file, such as that of a section, and the lines of their names.

    Args:
        file: A YAML file.
        setting: The setting that named it, or the section, for the error.

    Raises:
        SettingsError: As for `read_recipe`.
    """
    name = f"{setting}: {quoted(file)}"
    if os.path.isdir(file):  # pathlib raises if a parent folder may not be entered
        raise SettingsError(f"{name} is a folder; name a recipe (YAML file), like those in configs/")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name} is not a text file in UTF-8 ({error}); save it as one") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        hint = "; name a recipe (YAML file) that you may read"
        if isinstance(error, FileNotFoundError):
            hint = did_you_mean_recipe(file) or "; `litgpt-moe init` lists recipes and writes one"
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(f"{name} cannot be read ({reason}){hint}") from error
    document = _compose(name, text)
    if not isinstance(document, yaml.MappingNode):
        holds = "is empty" if document is None else "holds no settings"
        raise SettingsError(f"{name} {holds}; it must consist of lines KEY: VALUE, as in configs/")
    lines: dict[str, int] = {}
    _note_lines(document, name, "", lines)
    settings = _load(name, text)
    if isinstance(settings.get("model_config"), dict):
        settings["model_config"] = without_mark(settings["model_config"])
    return settings, lines


def without_mark(model: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a model without the mark of a `model_config.yaml`, which may be copied into a recipe."""
    from litgpt_moe_ext.host.checkpoints import REQUIRES_MARK

    return {name: value for name, value in model.items() if name != REQUIRES_MARK}


def class_path_of(value: Any) -> Any:
    """Return the class that a setting names, by `class_path` and `init_args` or by itself; unchecked."""
    return value.get("class_path") if isinstance(value, Mapping) else value


def beside_a_class(name: str, value: Mapping[str, Any]) -> Iterator[str]:
    """Yield a message for every key of a setting that names a class but `class_path` and `init_args`.

    Args:
        name: Name of the setting.
        value: Its value.
    """
    for key in value:
        if key not in CLASS_KEYS:
            near = f"; did you mean {name}.init_args?" if nearest(key, ("init_args",)) else ""
            inside = f", and arguments stand in its init_args: {name}.init_args.{key}"
            yield f"{name}.{key}: has no effect beside class_path{near or inside}"


def is_trusted(class_path: str) -> bool:
    """Return whether a class that a checkpoint names may be imported: one of LitGPT's, of torch's optimizers, or ours.

    A checkpoint may come from anybody, and its settings are data: importing a module that they name would run it.
    """
    return "." not in class_path or class_path.startswith(("litgpt.", "litgpt_moe_ext.", "torch.optim."))


def as_data(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the settings in a checkpoint without its callbacks, which are code and not needed to judge it.

    Args:
        settings: The content of its `hyperparameters.yaml`.
        file: That file.

    Raises:
        SettingsError: If the optimizer is of a class that is not trusted.
    """
    path = class_path_of(settings.get("optimizer"))
    if isinstance(path, str) and not is_trusted(path):
        raise SettingsError(
            f"optimizer.class_path: {path!r} is not imported, since a checkpoint may come from anyone; if you trust "
            f"it, give {file} as the recipe"
        )
    return {name: value for name, value in settings.items() if name != "callbacks"}


def load_value(text: str, name: str = "value") -> Any:
    """Return the value of a text in YAML, including numbers such as 3e-4.

    Args:
        text: A value.
        name: Its setting, for the error.

    Raises:
        SettingsError: If it has no value: an unmatched bracket, a tag that creates an object, the 30th of February, a
            number of thousands of digits.
    """
    _compose(name, text)
    return _load(name, text)


def _load(name: str, text: str) -> Any:
    try:
        return get_loader("yaml")(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        problem = one_line(getattr(error, "problem", None) or error)
        raise SettingsError(f"{name} cannot be read as YAML: {problem}; put text in quotes") from error


def _compose(name: str, text: str) -> yaml.Node | None:
    """Return a YAML text as nodes, none of which contains itself; None if it is empty.

    Raises:
        SettingsError: If it is not YAML, or larger or more deeply nested than anything that a person writes.
    """
    try:
        document = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None or "\n" not in text else f" line {error.problem_mark.line + 1}"
        problem = error.problem or error.context
        remedy = "indent with spaces, close brackets, and put text" if where else "put text"
        raise SettingsError(f"{name}{where} is not YAML: {problem}; {remedy} in quotes") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{name} is not YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise SettingsError(f"{name} nests values more than {_DEEPEST} levels deep") from error
    if document is not None:
        _refuse_bombs(document, name, {}, 0)
    return document


def _refuse_bombs(node: yaml.Node, name: str, sizes: dict[int, int | None], depth: int) -> int:
    # Return the number of nodes with every alias expanded. Meeting a node without a size, which is still being counted,
    # means that it contains itself.
    where = f"{name} line {node.start_mark.line + 1}"
    if id(node) in sizes:
        if (size := sizes[id(node)]) is None:
            raise SettingsError(f"{where} has a value that contains itself; write it out")
        return size
    if depth > _DEEPEST:
        raise SettingsError(f"{where} nests values more than {_DEEPEST} levels deep")
    sizes[id(node)] = None
    inner = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    size = 1 + sum(_refuse_bombs(part, name, sizes, depth + 1) for part in inner)
    if size > _LARGEST:
        raise SettingsError(f"{where} has more than {_LARGEST} values with its aliases written out")
    sizes[id(node)] = size
    return size


def _note_lines(node: yaml.Node, name: str, prefix: str, lines: dict[str, int]) -> None:
    for key, line, value in _entries(node, name):
        setting = f"{prefix}{key}"
        if setting in lines:
            raise SettingsError(f"{name} line {line} repeats {setting} from line {lines[setting]}; remove one of them")
        if value.tag in _FOREIGN_TAGS:
            raise SettingsError(
                f"{name} line {line} gives {setting} as {_FOREIGN_TAGS[value.tag]}; write a plain value"
            )
        lines[setting] = line
        _note_lines(value, name, f"{setting}.", lines)


def _entries(node: yaml.Node, name: str) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield key or index, line and value of everything in a mapping or a list."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield str(index), item.start_mark.line + 1, item
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag not in _TEXT_TAGS:
                shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise SettingsError(
                    f"{name} line {line} has the key {shown}, which is not text; put it in quotes if it is a name"
                )
            yield key.value, line, value
