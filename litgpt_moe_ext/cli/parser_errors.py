"""jsonargparse's errors as one sentence: the setting, its value, and what would be right.

jsonargparse 4.37 nests an explanation for every type that a setting may have, leaves out the value where a setting has
a list of choices, and names Python's classes.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

# The lines around the sentence that matters.
_NOISE = re.compile(
    r"\s*(Does not validate against any of|Subtypes:|Errors:$|- Expected a <class 'NoneType'>|Given value)"
)
_KEY = re.compile(r'Parser key "([^"]+)":')
_VALUE = re.compile(r"(?:Got value|Given value): (?!NestedArg)(.*)")
_NESTED_VALUE = re.compile(r"Given value: NestedArg\(key='[^']*', val=(.*)\)")
_EXPECTED = re.compile(r"Expected an? <class '(\w+)'>")
_WRONG_TYPE = re.compile(r"Union of no types|Expected an? <class|expects a dict or Namespace")
_UNKNOWN_KEY = re.compile(r"(?:arguments: --|nested key '|Key ')([\w.]+)")
_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list such as [a, b]",
    dict: "keys and values",
    Path: "a path",
    type(None): "null",
}


def plain_error(message: str, annotation_of: Callable[[str], Any], value_of: Callable[[str], Any]) -> str:
    """Return the part of a jsonargparse error that tells the user something.

    Args:
        message: The error.
        annotation_of: Returns the type of a setting by its path with dots, or None if it is not known.
        value_of: Returns what was given for a setting, or None.
    """
    keys = _KEY.findall(message)
    unknown = _UNKNOWN_KEY.search(message) or "Problem with given class_path" in message.replace("\n", "")
    if keys and _WRONG_TYPE.search(message) and not (unknown and len(keys) == 1):
        path = ".".join(keys)
        value = _given(message) or value_of(path)
        annotation = annotation_of(path)
        right = _describe(annotation) if annotation is not None else _describe_classes(message)
        if right:
            shown = "" if value is None else f": {_shown(value)}"
            return f"{path}{shown} must be {right}"
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if not _NOISE.match(line)]
    return " ".join(lines)


def near_name(message: str, known: Iterable[str]) -> str:
    """Return a suggestion for the unknown key that a jsonargparse error names, or nothing.

    Args:
        message: The error.
        known: All keys, with dots where they are nested.
    """
    found = _UNKNOWN_KEY.search(message)
    if found is None:
        return ""
    wanted, names = found[1], list(known)
    if close := difflib.get_close_matches(wanted, names, n=1, cutoff=0.75):
        return f"; did you mean {close[0]}?"
    by_last = {name.rpartition(".")[2]: name for name in names}
    close = difflib.get_close_matches(wanted.rpartition(".")[2], by_last, n=1, cutoff=0.75)
    return f"; did you mean {by_last[close[0]]}?" if close else ""


def annotation_in(annotations: Mapping[str, Any], path: str) -> Any:
    """Return the type of a setting, or None if there is none of this path.

    Args:
        annotations: Types of the settings of the first level; dataclasses have further ones as fields.
        path: Names with dots between them.
    """
    first, *rest = path.split(".")
    annotation = annotations.get(first)
    for name in rest:
        classes = [annotation, *get_args(annotation)]
        fields = {f.name: f.type for cls in classes if dataclasses.is_dataclass(cls) for f in dataclasses.fields(cls)}
        annotation = fields.get(name)
    return None if isinstance(annotation, str) else annotation


def value_in(arguments: list[str], path: str) -> Any:
    """Return what a command line, or a YAML file that it names, says about a setting; None if they do not.

    Args:
        arguments: As `--NAME VALUE` or `--NAME=VALUE`.
        path: Names with dots between them.
    """
    import yaml

    values: dict[str, list[str]] = {}
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if equals or i + 1 < len(arguments):
            values.setdefault(name, []).append(value if equals else arguments[i + 1])
    if f"--{path}" in values:
        return values[f"--{path}"][-1]
    for file in reversed(values.get("--config", [])):
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        for key in path.split("."):
            content = content.get(key) if isinstance(content, dict) else None
        if content is not None:
            return content
    return None


def _given(message: str) -> str | None:
    # The innermost comes first.
    if found := _VALUE.search(message):
        return found[1].rstrip()
    if found := _NESTED_VALUE.search(message):
        return found[1].strip("'\"")
    return None


def _shown(value: Any) -> str:
    return "null" if value == "None" else repr(value)


def _describe(annotation: Any) -> str:
    # Empty for a type that has no plain name.
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [_describe(kind) for kind in sorted(get_args(annotation), key=lambda kind: kind is type(None))]
        return " or ".join(dict.fromkeys(kinds)) if all(kinds) else ""
    if get_origin(annotation) is list and get_origin(get_args(annotation)[0]) is Literal:
        return f"a list with any of {', '.join(get_args(get_args(annotation)[0]))}"
    if dataclasses.is_dataclass(annotation):
        return _NAMES[dict]
    return _NAMES.get(get_origin(annotation) or annotation, "")


def _describe_classes(message: str) -> str:
    # Without null, which the outer setting of a nested one may be.
    by_name = {cls.__name__: text for cls, text in _NAMES.items() if cls is not type(None)}
    return " or ".join(dict.fromkeys(by_name[name] for name in _EXPECTED.findall(message) if name in by_name))
