"""Types of configuration fields, each with its range: they check a value and say what it must be.

Imports neither torch nor LitGPT.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.errors import SettingsError

if TYPE_CHECKING:
    import litgpt

    class Config(litgpt.Config):
        """A `litgpt.Config` with the fields that this package adds, for annotations."""

        # None only until a configuration is resolved.
        router_type: Any
        head_size: Any
        n_query_groups: Any
        n_shared_expert: Any
        attention_scores_scalar: Any
        intermediate_size: Any
        moe_intermediate_size: Any
        n_topk_groups: Any
        n_topk_scores_per_group: Any
        padded_vocab_size: Any
        rope_n_elem: Any

        def __getattr__(self, name: str) -> Any:
            """Return the value of an added field."""


_TOO_LARGE = 2**31


@dataclass(frozen=True)
class FieldType:
    """What a field may hold.

    Attributes:
        annotation: The type that the command line parses.
        accepts: Returns whether a value is right, given the configuration it is part of.
        describe: Returns what follows "must be", in a given configuration or (None) in any.
    """

    annotation: Any
    accepts: "Callable[[Any, Config | None], bool]"
    describe: "Callable[[Config | None], str]"

    def check(self, name: str, value: Any, config: "Config | None" = None, remedy: str = "") -> None:
        """Raise an error unless `value` is right.

        Args:
            name: The field, for the message.
            value: Its value.
            config: The configuration that has it.
            remedy: What to do, for the end of the message.

        Raises:
            SettingsError: If the value is wrong.
        """
        if not self.accepts(value, config):
            hint = ""
            if isinstance(value, str) and self.annotation in (int, float):
                hint = " (YAML reads 1e4 as text, 1.0e4 as a number)"
            elif self.annotation is int and isinstance(value, (int, float)) and value >= _TOO_LARGE:
                hint = " and below 2**31"
            raise SettingsError(f"{name}: {value!r} must be {self.describe(config)}{hint}{remedy}")


class _Choice(FieldType):
    def check(self, name: str, value: Any, config: "Config | None" = None, remedy: str = "") -> None:
        if not self.accepts(value, config):
            raise SettingsError(f"{name}: {value!r} is unknown; choose from {self.describe(config)}{remedy}")


def choice(names: Iterable[str]) -> FieldType:
    """Return the type of one name among `names`, which may be a registry that grows."""
    # Parsed as text, so that there is one check, and its message lists the names.
    return _Choice(str, lambda value, _: isinstance(value, str) and value in tuple(names), lambda _: ", ".join(names))


def integer(low: int, high: str | None = None) -> FieldType:
    """Return the type of an integer from `low` to the value of the field `high`, or without upper limit."""

    def accepts(value: Any, config: "Config | None") -> bool:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value < _TOO_LARGE:
            return False
        return high is None or value <= getattr(config, high)

    def describe(config: "Config | None") -> str:
        if high is None:
            return f"an integer of at least {low}"
        return f"an integer from {low} to {high if config is None else f'{getattr(config, high)} ({high})'}"

    return FieldType(int, accepts, describe)


def number(in_range: Callable[[float], bool], text: str) -> FieldType:
    """Return the type of a finite number in a range that `text` describes."""

    def accepts(value: Any, _config: "Config | None") -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return is_number and in_range(value)

    return FieldType(float, accepts, lambda _: text)


NUMBER = number(lambda _value: True, "a number")
NON_NEGATIVE = number(lambda value: value >= 0, "a number of at least 0")
POSITIVE = number(lambda value: value > 0, "a number above 0")
AT_LEAST_ONE = number(lambda value: value >= 1, "a number of at least 1")
ABOVE_ONE = number(lambda value: value > 1, "a number above 1")
SHARE = number(lambda value: 0 <= value < 1, "a number of at least 0 and below 1")

BOOLEAN = FieldType(bool, lambda value, _: isinstance(value, bool), lambda _: "true or false")
UNSUPPORTED = FieldType(Any, lambda _value, _: False, lambda _: "null")


def per_layer(kind: FieldType) -> FieldType:
    """Return the type of one value for all layers, or a list with one for each of them."""

    def accepts(value: Any, config: "Config | None") -> bool:
        if not isinstance(value, list):
            return kind.accepts(value, config)
        return config is not None and len(value) == config.n_layer and all(kind.accepts(x, config) for x in value)

    def describe(config: "Config | None") -> str:
        length = "n_layer" if config is None else f"{config.n_layer} (n_layer)"
        return f"{kind.describe(config)}, or a list of {length} such entries"

    return FieldType(kind.annotation | list[kind.annotation], accepts, describe)


def layer_indices() -> FieldType:
    """Return the type of a list of different layers, not all of them."""

    def accepts(value: Any, config: "Config | None") -> bool:
        if not isinstance(value, list) or not value or not all(type(index) is int for index in value):
            return False
        n_layer = len(value) + 1 + max(value) if config is None else config.n_layer
        return len(set(value)) == len(value) < n_layer and all(0 <= index < n_layer for index in value)

    def describe(config: "Config | None") -> str:
        last = "n_layer - 1" if config is None else f"{config.n_layer - 1} (n_layer - 1)"
        return f"a list of different integers from 0 to {last}, not all of them"

    return FieldType(list[int], accepts, describe)


def mapping(values: dict[str, FieldType]) -> FieldType:
    """Return the type of a dictionary that has some of the keys of `values`, at least one."""
    keys = ", ".join(values)

    class Mapping(FieldType):
        def check(self, name: str, value: Any, config: "Config | None" = None, remedy: str = "") -> None:
            super().check(name, value, config, remedy)
            for key, entry in value.items():
                values[key].check(f"{name}.{key}", entry, config, remedy)

    return Mapping(
        dict,
        lambda value, _: isinstance(value, dict) and bool(value) and set(value) <= set(values),
        lambda _: f"a dictionary with keys among {keys}",
    )
