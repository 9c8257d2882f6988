"""Types of settings with a range, and how errors describe them.

A type is the annotation of a setting. Besides Python's own there are numbers with a range (`PositiveInt`), integers up
to another setting (`UpTo`), the names of a registry (`OneOf`), dictionaries with known keys (`TypedDict`), and types
with a description of their own (`Annotated[list[int], "a list of ..."]`).

Imports neither torch nor LitGPT, because parsers that only print their help use it too.
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from litgpt_moe_ext.errors import PERHAPS_OF_AN_EXTENSION, SettingsError

_LARGEST = 2**63 - 1
_LONGEST = 200  # characters of a value in an error
_WRONG = object()


@dataclasses.dataclass(frozen=True, eq=False)
class OneOf:
    """The type of one of several names: of a tuple, or of a registry, to which extensions may add."""

    names: Collection[str]

    def __str__(self) -> str:
        return ", ".join(self.names)


@dataclasses.dataclass(frozen=True)
class UpTo:
    """The type of an integer that another field limits.

    Attributes:
        lowest: Smallest value.
        field: Name of the field that holds the largest value.
        limit: Largest value, if known.
    """

    lowest: int
    field: str
    limit: int | None = None

    def beside(self, owner: Any) -> "UpTo":
        """Return the same with the limit from an object that has the field."""
        return dataclasses.replace(self, limit=getattr(owner, self.field))

    def __str__(self) -> str:
        most = self.field if self.limit is None else f"{self.limit} ({self.field})"
        return f"an integer from {self.lowest} to {most}"


NUMBERS: dict[type, str] = {}
"""The types of numbers with a range, and descriptions of their values."""

if TYPE_CHECKING:
    PositiveInt = NonNegativeInt = AtLeastTwo = LayerCount = ExpertCount = Seed = int
    PositiveFloat = NonNegativeFloat = AtLeastOne = AboveOne = RotaryBase = Minutes = float
    Fraction = Share = UnitInterval = Inside = float
else:
    from jsonargparse.typing import restricted_number_type

    def _type(name, kind, words, *limits):
        # Nothing works with infinity, or with integers beyond the sizes of tensors.
        highest = ("<=", _LARGEST) if kind is int else ("<", math.inf)
        made = restricted_number_type(name, kind, [*limits, highest])
        NUMBERS[made] = words
        return made

    PositiveInt = _type("PositiveCount", int, "an integer of at least 1", (">=", 1))
    NonNegativeInt = _type("Count", int, "an integer of at least 0", (">=", 0))
    AtLeastTwo = _type("AtLeastTwo", int, "an integer of at least 2", (">=", 2))
    LayerCount = _type("LayerCount", int, "an integer from 1 to 10000", (">=", 1), ("<=", 10_000))
    ExpertCount = _type("ExpertCount", int, "an integer from 1 to 100000", (">=", 1), ("<=", 100_000))
    Seed = _type("Seed", int, "an integer from 0 to 4294967295", (">=", 0), ("<=", 2**32 - 1))
    PositiveFloat = _type("PositiveFinite", float, "a number above 0", (">", 0))
    NonNegativeFloat = _type("NonNegativeFinite", float, "a number of at least 0", (">=", 0))
    AtLeastOne = _type("AtLeastOne", float, "a number of at least 1", (">=", 1))
    AboveOne = _type("AboveOne", float, "a number above 1", (">", 1))
    RotaryBase = _type("RotaryBase", float, "a number above 1 and at most 1e18", (">", 1), ("<=", 1e18))
    Fraction = _type("Fraction", float, "a number above 0 and at most 1", (">", 0), ("<=", 1))
    Share = _type("Share", float, "a number of at least 0 and below 1", (">=", 0), ("<", 1))
    UnitInterval = _type("UnitInterval", float, "a number from 0 to 1", (">=", 0), ("<=", 1))
    Inside = _type("Inside", float, "a number above 0 and below 1", (">", 0), ("<", 1))
    Minutes = _type("Minutes", float, "a number above 0 and at most 525600, a year", (">", 0), ("<=", 525_600))

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
    """Return the types in a union, null last; of any other type, only itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(sorted(get_args(annotation), key=lambda kind: kind is type(None)))
    return (annotation,)


def without_range(annotation: Any) -> Any:
    """Return Python's own type for a type with a range, for a parser; the range is checked later."""
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    if annotation in NUMBERS:
        return int if issubclass(annotation, int) else float
    if isinstance(annotation, (OneOf, UpTo)):
        return str if isinstance(annotation, OneOf) else int
    return dict if is_typeddict(annotation) else annotation


def describe(annotation: Any) -> str:
    """Return a description of a type's values, in words that fit after "must be"."""
    kinds = members(annotation)
    if len(kinds) > 1:
        # Integers are numbers.
        words = list(dict.fromkeys(describe(kind) for kind in kinds if not (kind is int and float in kinds)))
        return " or ".join(words) if words[-1] != "null" else f"{' or '.join(words[:-1])}, or null"
    origin = get_origin(annotation)
    if origin is Annotated:
        return get_args(annotation)[1]
    if isinstance(annotation, (OneOf, UpTo)):
        return str(annotation)
    if is_typeddict(annotation):
        among = "the keys" if annotation.__total__ else "keys among"
        return f"a dictionary with {among} {', '.join(get_type_hints(annotation))}"
    if origin is Literal:
        *others, last = (str(choice) for choice in get_args(annotation))
        return f"one of {', '.join(others)} or {last}" if others else last
    if origin is list:
        (inner,) = get_args(annotation) or (Any,)
        return f"a list with any of {', '.join(get_args(inner))}" if get_origin(inner) is Literal else _PLAIN[list]
    kind = origin or annotation
    if dataclasses.is_dataclass(kind):
        return _PLAIN[dict]
    if kind in NUMBERS or kind in _PLAIN:
        return NUMBERS.get(kind) or _PLAIN[kind]
    if inspect.isclass(kind):
        return f"a {kind.__name__}, by class_path and init_args"
    return str(annotation)


def checked(name: str, value: Any, annotation: Any) -> Any:
    """Return a value, checked against its type: a number in its range, a word among its choices, text, a path, a list.

    Args:
        name: The setting, for the error.
        value: Its value.
        annotation: Its type; for classes other than Python's own, only `isinstance` is checked.

    Returns:
        The value; a number as a plain `int` or `float`, a path as `Path`.

    Raises:
        SettingsError: If it is not allowed.
    """
    found = _as_any(name, value, annotation)
    if found is _WRONG:
        raise SettingsError(refusal(name, value, annotation))
    return found


def check_fields(settings: Any, prefix: str) -> None:
    """Replace the value of every field of a dataclass, frozen or not, by the result of `checked`.

    Args:
        settings: The dataclass. Fields whose types are text, because only type checkers import them, are not checked.
        prefix: Prefix of their names in errors.

    Raises:
        SettingsError: If a value is not allowed.
    """
    for field in dataclasses.fields(settings):
        if not isinstance(field.type, str):
            value = checked(f"{prefix}{field.name}", getattr(settings, field.name), field.type)
            object.__setattr__(settings, field.name, value)


def refusal(name: str, value: Any, annotation: Any) -> str:
    """Return the message of the error for a value of the wrong type."""
    shown = "null" if value is None else repr(value)
    if len(shown) > _LONGEST:
        shown = f"{shown[:_LONGEST]} ..."
    if isinstance(annotation, OneOf):
        perhaps = "" if isinstance(annotation.names, tuple) else PERHAPS_OF_AN_EXTENSION
        return f"{name}: {shown} is unknown; choose from {describe(annotation)}{perhaps}"
    return f"{name}: {shown} must be {describe(annotation)}{_addition(value, annotation)}"


def _addition(value: Any, annotation: Any) -> str:
    kinds = {without_range(kind) for kind in members(annotation)}
    if value == math.inf:
        return ", and finite"
    if isinstance(value, (int, float)) and value > _LARGEST and int in kinds:
        return ", and below 2**63"
    if value is None and inspect.isclass(annotation) and dataclasses.is_dataclass(annotation):
        return "; remove the line, or write settings below it"
    if isinstance(value, str) and kinds & {int, float} and _is_number(value):
        return " (YAML reads 1e4 as text, 1.0e4 as a number)"
    return ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _as_any(name: str, value: Any, annotation: Any) -> Any:
    # Return the value as one of the types of a union, or _WRONG.
    found = (_as(name, value, kind) for kind in members(annotation))
    return next((one for one in found if one is not _WRONG), _WRONG)


def _as(name: str, value: Any, kind: Any) -> Any:
    # Return the value as one of a single type, or _WRONG.
    plain = get_origin(kind) or kind
    if plain is Annotated:
        return _as_any(name, value, get_args(kind)[0])
    if isinstance(kind, UpTo):
        found, most = _as(name, value, int), _LARGEST if kind.limit is None else kind.limit
        return found if found is not _WRONG and kind.lowest <= found <= most else _WRONG
    if isinstance(kind, OneOf):
        return value if isinstance(value, str) and value in kind.names else _WRONG
    if is_typeddict(kind):
        return _as_typed_dict(name, value, kind)
    if plain is Literal:
        # To Python True equals 1, but not to a reader.
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


def _as_typed_dict(name: str, value: Any, kind: Any) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(value, dict) or not value or not kind.__required_keys__ <= set(value) <= set(hints):
        return _WRONG
    return {key: checked(f"{name}.{key}", item, hints[key]) for key, item in value.items()}


def _number(value: Any, kind: Any) -> Any:
    try:
        number = kind(value)
    except (ValueError, TypeError, OverflowError):  # OverflowError: an infinite integer
        return _WRONG
    if not math.isfinite(number) or number != value or (issubclass(kind, int) and abs(number) > _LARGEST):
        return _WRONG  # 1.5 is not an integer
    return int(number) if issubclass(kind, int) else float(number)
