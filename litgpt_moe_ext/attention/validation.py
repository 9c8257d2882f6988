"""What a configuration of the attention layer may say.

Nothing here imports torch or LitGPT, so that reading a configuration stays cheap.
"""

import math
from typing import Any, Literal

RopeKind = Literal["plain", "linear", "llama3", "yarn"]

_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor")
_YARN_KEYS = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
_KNOWN_KEYS = ("factor", "original_max_seq_len", *_LLAMA3_KEYS, *_YARN_KEYS)
_MAY_BE_ZERO = ("mscale", "mscale_all_dim")

# Names that other libraries use for the same things, and what to write instead.
_FOREIGN_KEYS = {
    "original_max_position_embeddings": "LitGPT calls it original_max_seq_len",
    "rope_theta": "set the field rope_base of the model configuration instead",
    "rope_type": "remove it: the other keys decide between linear, Llama-3 and YaRN",
    "type": "remove it: the other keys decide between linear, Llama-3 and YaRN",
}

# YaRN's rotation counts where a configuration names none (Peng et al. 2023, section 3.2).
DEFAULT_BETA_FAST = 32
DEFAULT_BETA_SLOW = 1


def present_adjustments(rope_adjustments: dict[str, Any] | None) -> dict[str, Any]:
    """Return the keys that say something: a key set to `None` (YAML: `null`) counts as absent."""
    return {key: value for key, value in (rope_adjustments or {}).items() if value is not None}


def rope_kind(rope_adjustments: dict[str, Any] | None) -> RopeKind:
    """Tell which rule a dictionary of RoPE adjustments asks for.

    Args:
        rope_adjustments: A dictionary that `validate_rope_adjustments` accepts, or `None`.

    Returns:
        `"plain"` without keys, `"llama3"` or `"yarn"` if a key that only this rule has is there, else `"linear"`.
    """
    keys = present_adjustments(rope_adjustments)
    if any(key in keys for key in _LLAMA3_KEYS):
        return "llama3"
    if any(key in keys for key in _YARN_KEYS):
        return "yarn"
    return "linear" if keys else "plain"


def validate_rope_adjustments(rope_adjustments: dict[str, Any] | None) -> None:
    """Check `Config.rope_adjustments`.

    Accepted are `None` and `{}` (plain RoPE), `factor` alone (linear), `factor`, `low_freq_factor`, `high_freq_factor`,
    `original_max_seq_len` (Llama-3), and `factor`, `original_max_seq_len` with at least one of `beta_fast`,
    `beta_slow`, `truncate`, `attention_factor`, `mscale`, `mscale_all_dim` (YaRN).

    Args:
        rope_adjustments: The dictionary to check. Keys set to `None` count as absent, except `truncate`.

    Raises:
        ValueError: For unknown, missing or contradicting keys and for values out of range. The message names the key,
            its value and the remedy.
    """
    if rope_adjustments is None:
        return
    if not isinstance(rope_adjustments, dict):
        raise ValueError(f"rope_adjustments: {rope_adjustments!r} must be a dictionary or null")
    _check_keys(rope_adjustments)
    _check_values(rope_adjustments)


def _check_keys(rope_adjustments: dict[str, Any]) -> None:
    for key, value in rope_adjustments.items():
        if key not in _KNOWN_KEYS:
            remedy = _FOREIGN_KEYS.get(key, f"known keys are {', '.join(_KNOWN_KEYS)}")
            raise ValueError(f"rope_adjustments.{key}: {value!r} is an unknown key; {remedy}")

    keys = present_adjustments(rope_adjustments)
    llama3_keys = [key for key in _LLAMA3_KEYS if key in keys]
    yarn_keys = [key for key in _YARN_KEYS if key in keys]
    if llama3_keys and yarn_keys:
        raise ValueError(
            f"rope_adjustments: {rope_adjustments!r} mixes Llama-3 keys ({', '.join(llama3_keys)}) with YaRN keys "
            f"({', '.join(yarn_keys)}); keep one set"
        )
    kind = rope_kind(keys)
    if kind == "linear" and "original_max_seq_len" in keys:
        raise ValueError(
            f"rope_adjustments.original_max_seq_len: {keys['original_max_seq_len']!r} does not say how to rescale; add "
            "beta_fast and beta_slow for YaRN (usually 32 and 1), add low_freq_factor and high_freq_factor for "
            "Llama-3, or remove it for linear scaling"
        )
    required = {
        "plain": (),
        "linear": ("factor",),
        "llama3": ("factor", *_LLAMA3_KEYS, "original_max_seq_len"),
        "yarn": ("factor", "original_max_seq_len"),
    }
    missing = [key for key in required[kind] if key not in keys]
    if missing:
        name = {"linear": "linear scaling", "llama3": "Llama-3 scaling", "yarn": "YaRN"}[kind]
        raise ValueError(f"rope_adjustments: {rope_adjustments!r} lacks {', '.join(missing)}; {name} needs it, add it")


def _check_values(rope_adjustments: dict[str, Any]) -> None:
    # An absent `truncate` means yes, while Hugging Face reads a null as no: insist on an explicit answer.
    truncate = rope_adjustments.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"rope_adjustments.truncate: {truncate!r} must be true or false; leave it out for true")

    keys = present_adjustments(rope_adjustments)
    for key, value in keys.items():
        if key != "truncate":
            _require_number(f"rope_adjustments.{key}", value, zero_allowed=key in _MAY_BE_ZERO)
    if keys.get("factor", 1) < 1:
        raise ValueError(
            f"rope_adjustments.factor: {keys['factor']!r} must be at least 1: it is the context length divided by the "
            "one before the extension"
        )
    kind = rope_kind(keys)
    if kind == "llama3" and keys["high_freq_factor"] <= keys["low_freq_factor"]:
        raise ValueError(
            f"rope_adjustments.high_freq_factor: {keys['high_freq_factor']!r} must be greater than low_freq_factor "
            f"({keys['low_freq_factor']!r}); Llama 3.1 has 4 and 1"
        )
    if kind == "yarn":
        fast, slow = keys.get("beta_fast", DEFAULT_BETA_FAST), keys.get("beta_slow", DEFAULT_BETA_SLOW)
        if fast <= slow:
            raise ValueError(
                f"rope_adjustments.beta_fast: {fast!r} must be greater than beta_slow ({slow!r}); the YaRN paper has "
                f"{DEFAULT_BETA_FAST} and {DEFAULT_BETA_SLOW}, which are also the defaults"
            )


def _require_number(name: str, value: Any, zero_allowed: bool = False) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and not zero_allowed):
        hint = " (YAML reads 1e4 as text, 1.0e4 as a number)" if isinstance(value, str) else ""
        raise ValueError(f"{name}: {value!r} must be a number {'of at least' if zero_allowed else 'above'} 0{hint}")


def validate_attention_config(config: Any) -> None:
    """Check that `SinkAttention` can do what a model configuration asks of it.

    Args:
        config: A `litgpt.Config` whose derived fields are set.

    Raises:
        ValueError: If a setting is out of range or the layer does not have it. The message names the field, its value
            and the remedy.
    """
    for name in ("latent_attention", "attention_logit_softcapping"):
        value = getattr(config, name)
        if value is not None:
            raise ValueError(
                f"{name}: {value!r} is not supported by attention_class_name: SinkAttention; set {name} to null, or "
                "leave attention_class_name out for LitGPT's own attention"
            )
    attention_sinks = getattr(config, "attention_sinks", None)
    if attention_sinks not in (None, True, False):
        raise ValueError(f"attention_sinks: {attention_sinks!r} must be true or false; leave it out for true")

    window = config.sliding_window_size
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(
            f"sliding_window_size: {window!r} must be an integer of at least 1 (the token itself counts); set it to "
            "null for full attention"
        )
    if config.norm_qk and config.norm_qk_type not in ("default", "olmo2"):
        raise ValueError(f"norm_qk_type: {config.norm_qk_type!r} is unknown; choose from default, olmo2")
    if config.rope_interleave and config.rope_n_elem % 2:
        raise ValueError(
            f"rope_interleave: True needs an even number of rotated elements, but rotary_percentage "
            f"{config.rotary_percentage!r} of head_size {config.head_size!r} gives {config.rope_n_elem}; change either"
        )
    if config.attention_scores_scalar is not None:
        _require_number("attention_scores_scalar", config.attention_scores_scalar)
    _require_number("rope_condense_ratio", config.rope_condense_ratio)
    _require_rope_base("rope_base", config.rope_base)
    if config.rope_local_base_freq is not None:
        _require_rope_base("rope_local_base_freq", config.rope_local_base_freq)
    validate_rope_adjustments(config.rope_adjustments)


def _require_rope_base(name: str, value: Any) -> None:
    _require_number(name, value)
    if value <= 1:
        raise ValueError(f"{name}: {value!r} must be greater than 1, or all positions would look alike; usual is 10000")
