"""Types of settings with a range, and how an error says what a value of a type must be.

Imports neither torch nor LitGPT: parsers that only print their help use it as well.
"""

import dataclasses
import inspect
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from litgpt_moe_ext.errors import SettingsError

if TYPE_CHECKING:
    PositiveInt = NonNegativeInt = Seed = EvenInt = int
    PositiveFloat = NonNegativeFloat = AboveOne = Fraction = Decay = float
else:
    from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type

    Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**32)])
    AboveOne = restricted_number_type("AboveOne", float, (">", 1))
    Fraction = restricted_number_type("Fraction", float, [(">", 0), ("<=", 1)])
    Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)])

NUMBERS: dict[type, str] = {
    PositiveInt: "an integer of at least 1",
    NonNegativeInt: "an integer of at least 0",
    Seed: f"an integer from 0 to {2**32 - 1}",
    PositiveFloat: "a number above 0",
    NonNegativeFloat: "a number of at least 0",
    AboveOne: "a number above 1",
    Fraction: "a number above 0 and at most 1",
    Decay: "a number of at least 0 and below 1",
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
    """Return a value whose number is in the range, and whose word among the choices, of its type.

    Args:
        name: The setting, for the error.
        value: Its value.
        annotation: Its type; only ranges and choices are looked at.

    Returns:
        The value; a number as a plain `int` or `float`.

    Raises:
        SettingsError: If it is not allowed.
    """
    kinds = members(annotation)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
        if kind in NUMBERS and not isinstance(value, (str, bool)):
            try:
                number = kind(value)
            except (ValueError, TypeError):
                continue
            return int(number) if issubclass(kind, int) else float(number)
    if value is None or all(kind in NUMBERS or kind is type(None) or get_origin(kind) is Literal for kind in kinds):
        raise SettingsError(f"{name}: {'null' if value is None else repr(value)} must be {describe(annotation)}")
    return value
