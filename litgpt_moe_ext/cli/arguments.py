"""Parses a command line into the dataclass that describes a command's arguments.

Fields without a default, and those made by `positional`, are positional. Every other field is an option of its name;
those made by `required_option` must be given.
The type of a field defines its values: the ranges of `field_types` (`PositiveInt`), `Literal`, `Path`, a list of any of
these for several values, `| None` if `null` is allowed. Its line in the docstring is its help.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from litgpt_moe_ext.cli.paths import check_path
from litgpt_moe_ext.errors import SettingsError, did_you_mean
from litgpt_moe_ext.field_types import describe, members, without_range

Arguments = TypeVar("Arguments")


def positional(default: Any) -> Any:
    """Return a dataclass field for an optional positional argument."""
    return dataclasses.field(default=default, metadata={"positional": True})


def required_option() -> Any:
    """Return a dataclass field for a required option."""
    return dataclasses.field(metadata={"positional": False})


def read_arguments(command: type[Arguments], program: str, given: Sequence[str]) -> Arguments:
    """Read a command line.

    Args:
        command: A dataclass.
        program: Name of the program and its command, for the help.
        given: The rest of the command line.

    Raises:
        SettingsError: If an argument is missing, unknown, or not of its field's type, or if a path cannot be read or
            written to.
        SystemExit: After printing the help for `--help`.
    """
    parser = build_parser(command, program)
    arguments = [_with_underscores(argument) for argument in given]
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise SettingsError(_describe_unknown(unknown[0], arguments, command))
    types_ = get_type_hints(command)
    made = command(**{name: _convert(name, types_[name], value) for name, value in vars(values).items()})
    for name, value in vars(made).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                check_path(name, path)
    return made


def build_parser(command: type, program: str) -> argparse.ArgumentParser:
    """Return the parser that splits a command line; all its values are strings."""
    from docstring_parser import DocstringStyle, parse

    description = parse(command.__doc__ or "", DocstringStyle.GOOGLE)
    texts = {param.arg_name: " ".join((param.description or "").split()) for param in description.params}
    parser = _Parser(
        prog=program,
        description="\n\n".join(filter(None, (description.short_description, description.long_description))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    hints = get_type_hints(command)
    for field in dataclasses.fields(command):
        options: dict[str, Any] = {"help": _help(texts[field.name], field), "metavar": _placeholder(hints[field.name])}
        is_positional = _is_positional(field)
        if is_positional:
            options["metavar"] = field.name.upper()
        elif _is_required(field):
            options["required"] = True
        if _is_list(hints[field.name]):
            options["nargs"] = "+"
            if not is_positional:
                options["action"] = "extend"  # if given twice, it has the values of both
        elif is_positional and not _is_required(field):
            options["nargs"] = "?"
        elif hints[field.name] is bool:
            options |= {"nargs": "?", "const": "true"}
        parser.add_argument(field.name if is_positional else f"--{field.name}", **options)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; `{self.prog} --help` explains")


def _with_underscores(argument: str) -> str:
    # `--max-tokens` is `--max_tokens`.
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _describe_unknown(argument: str, arguments: list[str], command: type) -> str:
    if not argument.startswith("--"):
        # For example, the shell expanded an asterisk to several values.
        *_, option, value = ["", "", *arguments[: arguments.index(argument)]]
        if option in [f"--{field.name}" for field in dataclasses.fields(command)]:
            return f"{option} takes one value: {value!r} or {argument!r}"
        return f"{argument!r} is one argument too many"
    name = argument[2:].partition("=")[0]
    fields = dataclasses.fields(command)
    if any(field.name == name for field in fields if _is_positional(field)):
        return f"--{name} is unknown; {name.upper()} is given by its place, without a name"
    flags = [f"--{field.name}" for field in fields if not _is_positional(field)]
    hint = did_you_mean(f"--{name}", flags) or f"; known are {', '.join(flags)}"
    return f"--{name} is unknown{hint}"


def _is_positional(field: dataclasses.Field) -> bool:
    return field.metadata.get("positional", _is_required(field))


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _help(text: str, field: dataclasses.Field) -> str:
    text = text.replace("%", "%%")
    if any(field.default is nothing for nothing in (dataclasses.MISSING, None, False)):  # 0 is something
        if field.default_factory is dataclasses.MISSING:
            return text
        return f"{text} [{' '.join(map(str, field.default_factory()))}]"
    return f"{text} [{field.default}]"


def _is_list(annotation: Any) -> bool:
    return get_origin(members(annotation)[0]) is list


def _placeholder(annotation: Any) -> str:
    kind = members(annotation)[0]
    if _is_list(kind):
        return _placeholder(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if kind is bool:
        return "{true,false}"
    return "N" if issubclass(kind, (int, float)) else "PATH" if kind.__name__ == "Path" else "TEXT"


def _convert(name: str, annotation: Any, given: str | list[str]) -> Any:
    kind = members(annotation)[0]
    if isinstance(given, list):
        return [_convert(name, get_args(kind)[0], value) for value in given]
    if kind is not annotation and given == "null":
        return None
    words = {"true": True, "false": False} if kind is bool else {word: word for word in get_args(kind)}
    try:
        return words[given] if words else without_range(kind)(kind(given))
    except (KeyError, ValueError):
        too_large = without_range(kind) is int and given.isdecimal() and len(given) > 18
        beyond = ", and below 2**63" if too_large else ""
        shown = given or "''"
        raise SettingsError(f"{name}: {shown} must be {describe(kind)}{beyond}") from None
