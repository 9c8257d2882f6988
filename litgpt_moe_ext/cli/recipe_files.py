"""Recipe files: mistakes that a YAML parser lets pass or describes without naming the file, and lines of keys."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from litgpt_moe_ext.errors import SettingsError, did_you_mean_recipe, one_line

_DEEPEST, _LARGEST = 50, 100_000
"""How deep the nodes of a recipe may lie in one another, and how many it may have with every alias written out."""


_TEXT_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def check_recipe(file: Path) -> None:
    """Raise SettingsError with the file and the line unless it holds settings as keys and values, each key once."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"--config: {str(file)!r} is not a text file ({error})") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        hint = did_you_mean_recipe(file) if isinstance(error, FileNotFoundError) else ""
        raise SettingsError(f"--config: {str(file)!r} cannot be read ({_reason(error)}){hint}") from error
    document = compose(f"--config: {str(file)!r}", text)
    if not isinstance(document, yaml.MappingNode):
        holds = "is empty" if document is None else "holds no settings"
        raise SettingsError(f"--config: {str(file)!r} {holds}; it must consist of lines KEY: VALUE, as in configs/")
    _refuse_repeated_keys(document, file, "")


def compose(name: str, text: str) -> yaml.Node | None:
    """Return a YAML text as nodes, none of which contains itself; None if it is empty.

    Args:
        name: What the text stands for, for the error.
        text: A value, or a whole recipe.

    Raises:
        SettingsError: If it is not YAML, or larger or deeper than anything that a person writes.
    """
    try:
        document = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None or "\n" not in text else f" line {error.problem_mark.line + 1}"
        raise SettingsError(f"{name}{where} is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{name} is not YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise SettingsError(f"{name} has values nested more than {_DEEPEST} deep") from error
    if document is not None:
        _refuse_bombs(document, name, {}, 0)
    return document


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _refuse_bombs(node: yaml.Node, name: str, sizes: dict[int, int | None], depth: int) -> int:
    # Return the number of nodes with every alias written out. A node that is being counted has no size yet: it is part
    # of itself.
    where = f"{name} line {node.start_mark.line + 1}"
    if id(node) in sizes:
        if (size := sizes[id(node)]) is None:
            raise SettingsError(f"{where} has a value that contains itself; write it out")
        return size
    if depth > _DEEPEST:
        raise SettingsError(f"{where} has values nested more than {_DEEPEST} deep")
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


def _refuse_repeated_keys(node: yaml.Node, file: Path, prefix: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, file, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _TEXT_TAGS:
            shown = key.value if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            raise SettingsError(
                f"--config: {str(file)!r} line {line} has the key {shown}, which is no text; put it in quotes if it is "
                "a name"
            )
        if name in lines:
            raise SettingsError(
                f"--config: {str(file)!r} line {line} gives {name} again, after line {lines[name]}; remove one of them"
            )
        lines[name] = line
        _refuse_repeated_keys(value, file, f"{name}.")


def lines_of(text: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the line of every key, and of every item of a list, in a YAML text."""
    yield from _lines(yaml.compose(text, yaml.SafeLoader), "")


def _lines(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{prefix}{index}", item.start_mark.line + 1
            yield from _lines(item, f"{prefix}{index}.")
