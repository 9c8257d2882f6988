"""Ranges of the fields that LitGPT's configuration has by itself.

LitGPT takes any number of the right type: a head count of 0 ends in a division by zero, a rotary percentage of infinity
in an overflow, and a negative norm epsilon trains. Checked before a `litgpt.Config` is made, and of one that is made.
Imports neither torch nor LitGPT.
"""

from collections.abc import Mapping
from typing import Any

from litgpt_moe_ext.config.types import POSITIVE, FieldType, integer, number
from litgpt_moe_ext.errors import SettingsError

_COUNT = integer(1)
# As many as nobody builds, and few enough that an error comes before the memory is full of empty layers.
_LAYERS = FieldType(
    int, lambda value, _: _COUNT.accepts(value, None) and value <= 10_000, lambda _: "an integer from 1 to 10000"
)

RANGES: dict[str, FieldType] = {
    "n_layer": _LAYERS,
    **dict.fromkeys(("block_size", "n_embd", "n_head", "vocab_size", "padding_multiple"), _COUNT),
    **dict.fromkeys(("padded_vocab_size", "head_size", "n_query_groups"), _COUNT),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "sliding_window_size"), _COUNT),
    "norm_eps": number(lambda value: 0 < value < 1, "a number above 0 and below 1"),
    "rotary_percentage": number(lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "final_logit_softcapping": POSITIVE,
    "attention_logit_softcapping": POSITIVE,
    "attention_scores_scalar": POSITIVE,
    "rope_base": POSITIVE,
    "rope_condense_ratio": POSITIVE,
    "rope_local_base_freq": POSITIVE,
}
"""What a value must be; null is allowed where LitGPT has it as default."""

_OPTIONAL = {name for name in RANGES if name.endswith(("softcapping", "scalar", "freq", "_size", "groups"))}
_OPTIONAL -= {"block_size", "vocab_size"}


def check_ranges(values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise SettingsError unless the fields of a model are numbers that a model can have.

    Args:
        values: Some or all fields of a configuration.
        prefix: What comes before their names in an error.

    Raises:
        SettingsError: If one is out of its range, or heads do not divide what they share.
    """
    for name, kind in RANGES.items():
        if name in values and not (values[name] is None and name in _OPTIONAL):
            kind.check(prefix + name, values[name])
    width, heads, groups = (values.get(name) for name in ("n_embd", "n_head", "n_query_groups"))
    if width and heads and values.get("head_size") is None and width % heads:
        raise SettingsError(
            f"{prefix}n_head: {heads} must divide n_embd: {width}, unless head_size says how wide a head is"
        )
    if heads and groups and heads % groups:
        raise SettingsError(f"{prefix}n_query_groups: {groups} must divide n_head: {heads}; leave it out for {heads}")
    for name in ("sliding_window_indices", "rope_indices"):
        indices, layers = values.get(name), values.get("n_layer")
        if indices is not None and layers and not (len(indices) >= layers and set(indices) <= {0, 1}):
            raise SettingsError(f"{prefix}{name}: {indices!r} must have a 0 or a 1 for each layer (n_layer: {layers})")
