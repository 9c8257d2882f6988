"""The keys of `rope_adjustments`: which rule they ask for, and what they may say.

Accepted are nothing (plain RoPE), `factor` alone (linear), and `factor` and `original_max_seq_len` with `dynamic: true`
(dynamic NTK), with both of Llama-3's keys, or with at least one of YaRN's. Imports neither torch nor LitGPT.
"""

from typing import Any, Literal

from litgpt_moe_ext.config import types
from litgpt_moe_ext.errors import SettingsError

RopeKind = Literal["plain", "linear", "dynamic", "llama3", "yarn"]

# YaRN's numbers of rotations where a configuration names none (Peng et al. 2023, section 3.2).
DEFAULT_BETA_FAST = 32
DEFAULT_BETA_SLOW = 1

_LLAMA3_KEYS = {"low_freq_factor": types.POSITIVE, "high_freq_factor": types.POSITIVE}
_YARN_KEYS = {
    "beta_fast": types.POSITIVE,
    "beta_slow": types.POSITIVE,
    "truncate": types.BOOLEAN,
    "attention_factor": types.POSITIVE,
    "mscale": types.NON_NEGATIVE,
    "mscale_all_dim": types.NON_NEGATIVE,
}
KEYS = {
    "factor": types.AT_LEAST_ONE,
    "original_max_seq_len": types.POSITIVE,
    "dynamic": types.BOOLEAN,
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

# Names that other libraries use for the same things, and what to write instead.
_FOREIGN_KEYS = {
    "original_max_position_embeddings": "LitGPT calls it original_max_seq_len",
    "rope_theta": "set the field rope_base of the model configuration instead",
    "rope_type": "remove it: the other keys decide between linear, dynamic, Llama-3 and YaRN",
    "type": "remove it: the other keys decide between linear, dynamic, Llama-3 and YaRN",
}


def present_adjustments(rope_adjustments: dict[str, Any] | None) -> dict[str, Any]:
    """Return the keys that say something: a key set to `None` (YAML: `null`) counts as absent."""
    return {key: value for key, value in (rope_adjustments or {}).items() if value is not None}


def rope_kind(rope_adjustments: dict[str, Any] | None) -> RopeKind:
    """Return which rule a dictionary of RoPE adjustments asks for.

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
        # An absent `truncate` means true, while Hugging Face reads a null as false: insist on an explicit answer.
        if value is not None or key == "truncate":
            KEYS[key].check(f"rope_adjustments.{key}", value)
    keys = present_adjustments(rope_adjustments)
    _check_combination(keys)
    _check_order(keys)


def _check_combination(keys: dict[str, Any]) -> None:
    kind = rope_kind(keys)
    llama3 = ", ".join(key for key in _LLAMA3_KEYS if key in keys)
    yarn = ", ".join(key for key in _YARN_KEYS if key in keys)
    if llama3 and yarn:
        raise SettingsError(
            f"rope_adjustments: {keys!r} mixes Llama-3 keys ({llama3}) with YaRN keys ({yarn}); keep one set"
        )
    if kind == "dynamic" and (llama3 or yarn):
        raise SettingsError(f"rope_adjustments.dynamic: True does not go with {llama3 or yarn}; remove either")
    if kind == "linear" and "original_max_seq_len" in keys:
        raise SettingsError(
            f"rope_adjustments.original_max_seq_len: {keys['original_max_seq_len']!r} does not say how to rescale; add "
            "beta_fast and beta_slow for YaRN (usually 32 and 1), add low_freq_factor and high_freq_factor for "
            "Llama-3, add dynamic: true for dynamic NTK, or remove it for linear scaling"
        )
    if missing := [key for key in _REQUIRED[kind] if key not in keys]:
        raise SettingsError(f"rope_adjustments: {keys!r} lacks {', '.join(missing)}; {_NAMES[kind]} needs it, add it")


def _check_order(keys: dict[str, Any]) -> None:
    kind = rope_kind(keys)
    if kind == "llama3":
        higher, lower, usual = "high_freq_factor", "low_freq_factor", "Llama 3.1 has 4 and 1"
    elif kind == "yarn":
        higher, lower, usual = "beta_fast", "beta_slow", "the YaRN paper and the defaults have 32 and 1"
    else:
        return
    values = {"beta_fast": DEFAULT_BETA_FAST, "beta_slow": DEFAULT_BETA_SLOW} | keys
    if values[higher] <= values[lower]:
        raise SettingsError(
            f"rope_adjustments.{higher}: {values[higher]!r} must be greater than {lower} ({values[lower]!r}); {usual}"
        )


class _Adjustments(types.FieldType):
    def check(self, name: str, value: Any, config: "types.Config | None" = None, remedy: str = "") -> None:
        validate_rope_adjustments(value)


ADJUSTMENTS = _Adjustments(dict, lambda _value, _: True, lambda _: f"a dictionary with keys among {', '.join(KEYS)}")
