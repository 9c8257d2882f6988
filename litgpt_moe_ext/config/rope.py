"""The keys of `rope_adjustments`: which rule they select, and their allowed values.

Accepted are no keys (plain RoPE), `factor` alone (linear), and `factor` and `original_max_seq_len` with `dynamic: true`
(dynamic NTK), with both of Llama 3's keys, or with at least one of YaRN's. Imports neither torch nor LitGPT.
"""

from collections.abc import Iterator
from typing import Any, Literal

from litgpt_moe_ext.errors import SettingsError, refuse_first
from litgpt_moe_ext.field_types import AtLeastOne, NonNegativeFloat, PositiveFloat, checked

RopeKind = Literal["plain", "linear", "dynamic", "llama3", "yarn"]

# YaRN's default numbers of rotations (Peng et al. 2023, section 3.2).
DEFAULT_BETA_FAST = 32
DEFAULT_BETA_SLOW = 1

_LLAMA3_KEYS: dict[str, type] = {"low_freq_factor": PositiveFloat, "high_freq_factor": PositiveFloat}
_YARN_KEYS: dict[str, type] = {
    "beta_fast": PositiveFloat,
    "beta_slow": PositiveFloat,
    "truncate": bool,
    "attention_factor": PositiveFloat,
    "mscale": NonNegativeFloat,
    "mscale_all_dim": NonNegativeFloat,
}
KEYS: dict[str, type] = {
    "factor": AtLeastOne,
    "original_max_seq_len": PositiveFloat,
    "dynamic": bool,
    **_LLAMA3_KEYS,
    **_YARN_KEYS,
}

_NAMES = {"linear": "linear scaling", "dynamic": "dynamic NTK", "llama3": "Llama-3 scaling", "yarn": "YaRN"}
_REQUIRED: dict[RopeKind, tuple[str, ...]] = {
    "plain": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_seq_len"),
    "llama3": ("factor", *_LLAMA3_KEYS, "original_max_seq_len"),
    "yarn": ("factor", "original_max_seq_len"),
}
# Two keys of a rule, the first of which must be greater than the second, and their usual values.
_DESCENDING: dict[RopeKind, tuple[str, str, str]] = {
    "llama3": ("high_freq_factor", "low_freq_factor", "Llama 3.1 has 4 and 1"),
    "yarn": ("beta_fast", "beta_slow", "the YaRN paper and the defaults have 32 and 1"),
}

# Other libraries' names for the same keys, and what to write instead.
_FOREIGN_KEYS = {
    "original_max_position_embeddings": "LitGPT calls it original_max_seq_len",
    "rope_theta": "set the field rope_base of the model configuration instead",
    "rope_type": "remove it: the other keys decide between linear, dynamic, Llama-3 and YaRN",
    "type": "remove it: the other keys decide between linear, dynamic, Llama-3 and YaRN",
}


def present_adjustments(rope_adjustments: dict[str, Any] | None) -> dict[str, Any]:
    """Return the keys that are set: a key set to `None` (YAML: `null`) counts as absent."""
    return {key: value for key, value in (rope_adjustments or {}).items() if value is not None}


def rope_kind(rope_adjustments: dict[str, Any] | None) -> RopeKind:
    """Return which rule a dictionary of RoPE adjustments selects.

    Args:
        rope_adjustments: A dictionary that `validate_rope_adjustments` accepts, or `None`.
    """
    keys = present_adjustments(rope_adjustments)
    if keys.get("dynamic"):
        return "dynamic"
    if any(key in keys for key in _LLAMA3_KEYS):
        return "llama3"
    if any(key in keys for key in _YARN_KEYS):
        return "yarn"
    return "linear" if keys else "plain"


def validate_rope_adjustments(rope_adjustments: dict[str, Any] | None) -> None:
    """Check `Config.rope_adjustments`.

    Args:
        rope_adjustments: The dictionary to check. Keys set to `None` count as absent, except `truncate`.

    Raises:
        SettingsError: For unknown, missing or contradicting keys and for values out of range.
    """
    if rope_adjustments is None:
        return
    if not isinstance(rope_adjustments, dict):
        raise SettingsError(f"rope_adjustments: {rope_adjustments!r} must be a dictionary or null")
    for key, value in rope_adjustments.items():
        if key not in KEYS:
            remedy = _FOREIGN_KEYS.get(key, f"known keys are {', '.join(KEYS)}")
            raise SettingsError(f"rope_adjustments.{key}: {value!r} is an unknown key; {remedy}")
        # An absent `truncate` means true, but Hugging Face reads null as false: require an explicit value.
        if value is not None or key == "truncate":
            checked(f"rope_adjustments.{key}", value, KEYS[key])
    refuse_first(f"rope_adjustments{problem}" for problem in _problems(present_adjustments(rope_adjustments)))


def _problems(keys: dict[str, Any]) -> Iterator[str]:
    kind = rope_kind(keys)
    llama3 = ", ".join(key for key in _LLAMA3_KEYS if key in keys)
    yarn = ", ".join(key for key in _YARN_KEYS if key in keys)
    if llama3 and yarn:
        yield f": {keys!r} mixes Llama-3 keys ({llama3}) with YaRN keys ({yarn}); keep one set"
    if kind == "dynamic" and (llama3 or yarn):
        yield f".dynamic: True does not go with {llama3 or yarn}; remove either"
    if kind == "linear" and "original_max_seq_len" in keys:
        yield (
            f".original_max_seq_len: {keys['original_max_seq_len']!r} does not say how to rescale; add beta_fast and "
            "beta_slow for YaRN (usually 32 and 1), add low_freq_factor and high_freq_factor for Llama-3, add dynamic: "
            "true for dynamic NTK, or remove it for linear scaling"
        )
    if missing := [key for key in _REQUIRED[kind] if key not in keys]:
        yield f": {keys!r} lacks {', '.join(missing)}; {_NAMES[kind]} needs it, add it"
    if kind in _DESCENDING:
        higher, lower, usual = _DESCENDING[kind]
        values = {"beta_fast": DEFAULT_BETA_FAST, "beta_slow": DEFAULT_BETA_SLOW} | keys
        if values[higher] <= values[lower]:
            yield f".{higher}: {values[higher]!r} must be greater than {lower} ({values[lower]!r}); {usual}"
