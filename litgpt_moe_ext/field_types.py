"""Types of settings with a range, and how an error says what a value of a type must be.

Imports neither torch nor LitGPT: parsers that only print their help use it as well.
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from litgpt_moe_ext.errors import SettingsError

_LARGEST = 2**63 - 1
_LONGEST = 200  # characters of a value in an error
_WRONG = object()

if TYPE_CHECKING:
    PositiveInt = NonNegativeInt = Seed = int
    PositiveFloat = NonNegativeFloat = AboveOne = Fraction = Share = Minutes = float
else:
    from jsonargparse.typing import restricted_number_type

    # Neither infinity nor what no tensor can count: nothing that they are given to works with them.
    PositiveInt = restricted_number_type("PositiveCount", int, [(">=", 1), ("<=", _LARGEST)])
    NonNegativeInt = restricted_number_type("Count", int, [(">=", 0), ("<=", _LARGEST)])
    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
    PositiveFloat = restricted_number_type("PositiveFinite", float, [(">", 0), ("<", math.inf)])
    NonNegativeFloat = restricted_number_type("NonNegativeFinite", float, [(">=", 0), ("<", math.inf)])
    AboveOne = restricted_number_type("AboveOne", float, [(">", 1), ("<", math.inf)])
    Fraction = restricted_number_type("Fraction", float, [(">", 0), ("<=", 1)])
    Share = restricted_number_type("Share", float, [(">=", 0), ("<", 1)])
    Minutes = restricted_number_type("Minutes", float, [(">", 0), ("<=", 525_600)])

NUMBERS: dict[type, str] = {
    PositiveInt: "an integer of at least 1",
    NonNegativeInt: "an integer of at least 0",
    Seed: f"an integer from 0 to {2**32 - 1}",
    PositiveFloat: "a number above 0",
    NonNegativeFloat: "a number of at least 0",
    AboveOne: "a number above 1",
    Fraction: "a number above 0 and at most 1",
    Share: "a number of at least 0 and below 1",
    Minutes: "a number above 0 and at most 525600, a year",
}
"""What a value of each type must be."""

_PLAIN: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list such as [a, b]",
    dict: "keys and values",
    Path: "a path",
    type(None): "null",
    Sequence: "a list such as [a, b]",
}


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the types that a union allows; a type that is no union by itself. Null comes last."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(sorted(get_args(annotation), key=lambda kind: kind is type(None)))
    return (annotation,)


def describe(annotation: Any) -> str:
    """Return what a value of a type must be, in words that fit after "must be"."""
    kinds = members(annotation)
    if len(kinds) > 1:
        words = list(dict.fromkeys(describe(kind) for kind in kinds))
        return " or ".join(words) if words[-1] != "null" else f"{' or '.join(words[:-1])}, or null"
    if get_origin(annotation) is Literal:
        *others, last = (str(choice) for choice in get_args(annotation))
        return f"one of {', '.join(others)} or {last}" if others else last
    if get_origin(annotation) is list:
        (inner,) = get_args(annotation) or (Any,)
        return f"a list with any of {', '.join(get_args(inner))}" if get_origin(inner) is Literal else _PLAIN[list]
    kind = get_origin(annotation) or annotation
    if dataclasses.is_dataclass(kind):
        return _PLAIN[dict]
    if kind in NUMBERS or kind in _PLAIN:
        return NUMBERS.get(kind) or _PLAIN[kind]
    if inspect.isclass(kind):
        return f"a {kind.__name__}, by class_path and init_args"
    return str(annotation)


def checked(name: str, value: Any, annotation: Any) -> Any:
    """Return a value that is of its type: a number in its range, a word among its choices, text, a path, a list.

    Args:
        name: The setting, for the error.
        value: Its value.
        annotation: Its type; of classes other than Python's own only whether it is an instance of them.

    Returns:
        The value; a number as a plain `int` or `float`, a path as `Path`.

    Raises:
        SettingsError: If it is not allowed.
    """
    for kind in members(annotation):
        found = _as(name, value, kind)
        if found is not _WRONG:
            return found
    raise SettingsError(refusal(name, value, annotation))


def check_fields(settings: Any, prefix: str) -> None:
    """Replace the value of every field of a dataclass, frozen or not, by what `checked` returns for it.

    Args:
        settings: The dataclass. Fields whose types are text, since only type checkers import them, stay as they are.
        prefix: What comes before their names in errors.

    Raises:
        SettingsError: If a value is not allowed.
    """
    for field in dataclasses.fields(settings):
        if not isinstance(field.type, str):
            value = checked(f"{prefix}{field.name}", getattr(settings, field.name), field.type)
            object.__setattr__(settings, field.name, value)


def refusal(name: str, value: Any, annotation: Any) -> str:
    """Return the message of the error that refuses a value for its type."""
    shown = "null" if value is None else repr(value)
    if len(shown) > _LONGEST:
        shown = f"{shown[:_LONGEST]} ..."
    addition = ""
    if value == math.inf:
        addition = ", and finite"
    elif isinstance(value, (int, float)) and value > _LARGEST:
        counts = any(inspect.isclass(kind) and issubclass(kind, int) for kind in members(annotation))
        addition = ", and below 2**63" if counts else ""
    elif value is None and dataclasses.is_dataclass(annotation):
        addition = "; remove the line, or write settings below it"
    return f"{name}: {shown} must be {describe(annotation)}{addition}"


def _as(name: str, value: Any, kind: Any) -> Any:
    # Return the value as one of a single type, or _WRONG.
    plain = get_origin(kind) or kind
    if plain is Literal:
        # True is 1 for Python, but not for a reader.
        return value if any(value == one and type(value) is type(one) for one in get_args(kind)) else _WRONG
    if kind in NUMBERS or kind in (int, float):
        return _WRONG if isinstance(value, (str, bool)) else _number(value, kind)
    if plain is Path:
        usable = isinstance(value, Path) or (isinstance(value, str) and bool(value))
        return Path(value) if usable and "\0" not in str(value) else _WRONG
    if plain in (list, Sequence):
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            return _WRONG
        inner = (get_args(kind) or (Any,))[0]
        return type(value)(checked(f"{name}.{index}", item, inner) for index, item in enumerate(value))
    if kind is Any or not inspect.isclass(plain):
        return value
    return value if isinstance(value, plain) else _WRONG


def _number(value: Any, kind: Any) -> Any:
    try:
        number = kind(value)
    except (ValueError, TypeError, OverflowError):  # OverflowError: no integer is infinite
        return _WRONG
    if not math.isfinite(number) or number != value or (issubclass(kind, int) and abs(number) > _LARGEST):
        return _WRONG  # 1.5 is not an integer
    return int(number) if issubclass(kind, int) else float(number)
