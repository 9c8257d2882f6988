"""Ranges of the fields of LitGPT's own configuration.

LitGPT takes any number of the right type: a head count of 0 ends in a division by zero, a rotary percentage of infinity
in an overflow, and a negative norm epsilon trains. The ranges are checked before and after a `litgpt.Config` is
created. Importing this module loads neither torch nor LitGPT.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from litgpt_moe_ext.config.types import check_field
from litgpt_moe_ext.errors import PERHAPS_OF_AN_EXTENSION, SettingsError, did_you_mean, refuse_first
from litgpt_moe_ext.field_types import Inside, LayerCount, PositiveFloat, PositiveInt, RotaryBase, UnitInterval

_OPTIONAL_COUNTS = (
    *("padded_vocab_size", "head_size", "n_query_groups"),
    *("intermediate_size", "moe_intermediate_size", "sliding_window_size"),
)
_OPTIONAL_NUMBERS = (
    *("final_logit_softcapping", "attention_logit_softcapping"),
    "attention_scores_scalar",
)

RANGES: dict[str, Any] = {
    "name": str,
    "n_layer": LayerCount,
    **dict.fromkeys(("block_size", "n_embd", "n_head", "vocab_size", "padding_multiple"), PositiveInt),
    **dict.fromkeys(_OPTIONAL_COUNTS, PositiveInt | None),
    "norm_class_name": Literal["RMSNorm", "LayerNorm"],
    "norm_eps": Inside,
    "rotary_percentage": UnitInterval,
    "rope_base": RotaryBase,
    "rope_condense_ratio": PositiveFloat,
    "rope_local_base_freq": RotaryBase | None,
    **dict.fromkeys(_OPTIONAL_NUMBERS, PositiveFloat | None),
    **dict.fromkeys(("sliding_window_indices", "rope_indices"), list[int] | None),
}
"""The type of each."""


def check_ranges(values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise SettingsError unless the fields of a model are in their ranges.

    Args:
        values: Some or all fields of a configuration.
        prefix: Prefix of their names in an error.

    Raises:
        SettingsError: If one is out of its range, or a number of heads does not divide evenly.
    """
    for name, kind in RANGES.items():
        if name in values:
            check_field(prefix + name, values[name], kind)
    refuse_first(prefix + problem for problem in _problems(values))


def check_names(values: Mapping[str, Any]) -> None:
    """Raise SettingsError if a `model_config` has a name that no field of a model has. Imports LitGPT."""
    from litgpt import Config

    for name in values:
        if name not in (known := Config.__dataclass_fields__):
            hint = did_you_mean(name, known) or PERHAPS_OF_AN_EXTENSION
            raise SettingsError(f"model_config.{name}: no setting has this name{hint}")


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    width, heads, groups = (values.get(name) for name in ("n_embd", "n_head", "n_query_groups"))
    if width and heads and values.get("head_size") is None and width % heads:
        yield f"n_head: {heads} must divide n_embd: {width}, unless head_size says how wide a head is"
    if heads and groups and heads % groups:
        yield f"n_query_groups: {groups} must divide n_head: {heads}; leave it out for {heads}"
    for name in ("sliding_window_indices", "rope_indices"):
        indices, layers = values.get(name), values.get("n_layer")
        if indices is not None and layers and not (len(indices) >= layers and set(indices) <= {0, 1}):
            yield f"{name}: {indices!r} must have a 0 or a 1 for each layer (n_layer: {layers})"
