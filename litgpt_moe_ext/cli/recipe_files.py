"""Recipe files: mistakes that a YAML parser lets pass or describes without naming the file, and lines of keys."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from litgpt_moe_ext.errors import SettingsError


def check_recipe(file: Path) -> None:
    """Raise SettingsError with the file and the line unless it holds settings as keys and values, each key once."""
    try:
        document = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise SettingsError(f"--config: {str(file)!r} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"--config: {str(file)!r} is not a text file ({error})") from error
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f" line {error.problem_mark.line + 1}"
        raise SettingsError(f"--config: {str(file)!r}{where} is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"--config: {str(file)!r} is not YAML: {error}") from error
    if not isinstance(document, yaml.MappingNode):
        holds = "is empty" if document is None else "holds no settings"
        raise SettingsError(f"--config: {str(file)!r} {holds}; it must consist of lines KEY: VALUE, as in configs/")
    _refuse_repeated_keys(document, file, "")


def _refuse_repeated_keys(node: yaml.Node, file: Path, prefix: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, file, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
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
