"""Recipe files: mistakes that a YAML parser lets pass or describes without naming the file."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from litgpt_moe_ext.errors import SettingsError


def check_recipe(file: Path) -> None:
    """Raise SettingsError, naming the file and the line, unless it holds settings as keys and values, each key once."""
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


def place_of(message: str, files: Sequence[Path], arguments: Sequence[str]) -> str:
    """Return where the setting that an error is about stands, as ` (FILE:LINE)`, or nothing.

    What stands innermost is named last in the errors of jsonargparse, in quotes; our own begin with the setting.

    Args:
        message: The error.
        files: The recipes, of which a later one beats those before.
        arguments: The command line; a setting that is given there is not to be looked for in a file.
    """
    first = re.match(r"([\w.]+):", message)
    if first and _is_given(first[1], arguments):
        return ""
    words = ([first[1]] if first else []) + re.findall(r"""['"]([\w.]+)['"]""", message)
    for word in reversed(words):
        if _is_given(word, arguments):
            return ""
        for file in reversed(files):
            document = yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader)
            for name, value, line in _settings(document, ""):
                if f".{name}".endswith(f".{word}") or value == word:
                    return f" ({file}:{line})"
    return ""


def _is_given(setting: str, arguments: Sequence[str]) -> bool:
    # Also where only something inside the setting is given.
    return any(a.startswith("--") and f".{setting}." in f".{a[2:].partition('=')[0]}." for a in arguments)


def _settings(node: yaml.Node, prefix: str) -> Iterator[tuple[str, str | None, int]]:
    """Yield name, text (of a scalar) and line of every setting below a node; names as on the command line."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name = prefix if key.value == "init_args" else f"{prefix}{key.value}."
        if key.value != "init_args":
            text = value.value if isinstance(value, yaml.ScalarNode) else None
            yield name.removesuffix("."), text, key.start_mark.line + 1
        yield from _settings(value, name)
