"""The fields of the attention layer, and what a configuration may say in them.

Nothing here imports torch or LitGPT, so that reading a configuration stays cheap.
"""

import math
from typing import Any, Literal

from litgpt_moe_ext.attention.kernels.registry import KERNELS

CLASS_NAMES = ("SinkAttention",)

# In the order of preference. Other packages may add to it.
BACKENDS = KERNELS

FIELDS: dict[str, Any] = {
    # Attention layer to use in place of LitGPT's own. The others need it.
    "attention_class_name": Literal["SinkAttention"] | None,
    # Whether `SinkAttention` learns a sink logit per head (default: true), for all layers or in a list, one per layer.
    "attention_sinks": bool | list[bool] | None,
    # Value of the sink logits before training (default: 0, the weight of one token of score 0).
    "attention_sink_init": float | None,
    # The only kernel allowed (default: the fastest one that works).
    "attention_backend": str | None,
    # Probability of dropping an attention weight, and an element of the embeddings, in training (default: 0).
    "attention_dropout": float | None,
    "embedding_dropout": float | None,
    # "learned" adds an embedding of the absolute position to that of the token; needs rotary_percentage: 0.
    "position_embedding": Literal["learned"] | None,
    # Tokens see only their own document. A document ends with the token "eos", or begins with the token "bos", whose
    # id the second field gives. The third makes positions start at 0 in every document (default: false).
    "attention_document_boundary": Literal["eos", "bos"] | None,
    "attention_document_token_id": int | None,
    "attention_document_restart_positions": bool | None,
    # Generation of any length: the cache keeps this many first tokens (usually 4), and this many of the last ones.
    "streaming_cache_first": int | None,
    "streaming_cache_window": int | None,
}

RopeKind = Literal["plain", "linear", "dynamic", "llama3", "yarn"]

_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor")
_YARN_KEYS = ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")
_KNOWN_KEYS = ("factor", "original_max_seq_len", "dynamic", *_LLAMA3_KEYS, *_YARN_KEYS)
_BOOLEAN_KEYS = ("truncate", "dynamic")
_MAY_BE_ZERO = ("mscale", "mscale_all_dim")

# Names that other libraries use for the same things, and what to write instead.
_FOREIGN_KEYS = {
    "original_max_position_embeddings": "LitGPT calls it original_max_seq_len",
    "rope_theta": "set the field rope_base of the model configuration instead",
    "rope_type": "remove it: the other keys decide between linear, dynamic, Llama-3 and YaRN",
    "type": "remove it: the other keys decide between linear, dynamic, Llama-3 and YaRN",
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
        `"plain"` without keys, `"llama3"`, `"yarn"` or `"dynamic"` if a key that only this rule has is there, else
        `"linear"`.
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

    Accepted are `None` and `{}` (plain RoPE), `factor` alone (linear), `factor`, `low_freq_factor`, `high_freq_factor`,
    `original_max_seq_len` (Llama-3), `factor`, `original_max_seq_len` with at least one of `beta_fast`, `beta_slow`,
    `truncate`, `attention_factor`, `mscale`, `mscale_all_dim` (YaRN), and `factor`, `original_max_seq_len`,
    `dynamic: true` (dynamic NTK).

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
    if kind == "dynamic" and (llama3_keys or yarn_keys):
        raise ValueError(
            f"rope_adjustments.dynamic: True does not go with {', '.join(llama3_keys + yarn_keys)}; remove either"
        )
    if kind == "linear" and "original_max_seq_len" in keys:
        raise ValueError(
            f"rope_adjustments.original_max_seq_len: {keys['original_max_seq_len']!r} does not say how to rescale; add "
            "beta_fast and beta_slow for YaRN (usually 32 and 1), add low_freq_factor and high_freq_factor for "
            "Llama-3, add dynamic: true for dynamic NTK, or remove it for linear scaling"
        )
    required = {
        "plain": (),
        "linear": ("factor",),
        "dynamic": ("factor", "original_max_seq_len"),
        "llama3": ("factor", *_LLAMA3_KEYS, "original_max_seq_len"),
        "yarn": ("factor", "original_max_seq_len"),
    }
    missing = [key for key in required[kind] if key not in keys]
    if missing:
        name = {
            "linear": "linear scaling",
            "dynamic": "dynamic NTK",
            "llama3": "Llama-3 scaling",
            "yarn": "YaRN",
        }[kind]
        raise ValueError(f"rope_adjustments: {rope_adjustments!r} lacks {', '.join(missing)}; {name} needs it, add it")


def _check_values(rope_adjustments: dict[str, Any]) -> None:
    # An absent `truncate` means yes, while Hugging Face reads a null as no: insist on an explicit answer.
    truncate = rope_adjustments.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"rope_adjustments.truncate: {truncate!r} must be true or false; leave it out for true")

    keys = present_adjustments(rope_adjustments)
    if not isinstance(keys.get("dynamic", False), bool):
        raise ValueError(f"rope_adjustments.dynamic: {keys['dynamic']!r} must be true or false")
    for key, value in keys.items():
        if key not in _BOOLEAN_KEYS:
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


def resolve_attention_fields(config: Any) -> None:
    """Fill in defaults, and refuse what would be ignored or is unknown, before derived fields are set.

    Args:
        config: A `litgpt.Config` with the `FIELDS`.

    Raises:
        ValueError: The message names the field, its value and the remedy.
    """
    name = config.attention_class_name
    if name is None:
        for field in FIELDS:
            value = getattr(config, field)
            if value is not None:
                raise ValueError(
                    f"{field}: {value!r} would be ignored because attention_class_name is not set; set it to "
                    f"SinkAttention. Or remove {field} from the model configuration."
                )
        return
    if name not in CLASS_NAMES:
        raise ValueError(
            f"attention_class_name: {name!r} is unknown; choose from {', '.join(CLASS_NAMES)}, or leave it out for "
            "LitGPT's own attention"
        )
    if config.attention_sinks is None:
        config.attention_sinks = True
    if config.attention_document_boundary is not None and config.attention_document_restart_positions is None:
        config.attention_document_restart_positions = False


def has_sinks(config: Any, block_idx: int) -> bool:
    """Whether the layer `block_idx` of a valid configuration has sinks."""
    sinks = getattr(config, "attention_sinks", None)
    return sinks[block_idx] if isinstance(sinks, list) else sinks is not False


def changes_model(config: Any) -> bool:
    """Whether a configuration has settings that concern more of a model than its attention layers."""
    return config.attention_class_name is not None and (
        config.position_embedding is not None
        or bool(config.embedding_dropout)
        or config.attention_document_boundary is not None
        or config.streaming_cache_window is not None
    )


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
    _check_sinks(config)
    _check_backend_and_dropout(config)
    _check_position_embedding(config)
    _check_documents(config)
    _check_streaming(config)
    window = config.sliding_window_size
    if window is not None and (not _is_integer(window) or window < 1):
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


def _check_sinks(config: Any) -> None:
    sinks = config.attention_sinks
    if not isinstance(sinks, (bool, list)):
        raise ValueError(f"attention_sinks: {sinks!r} must be true or false or a list; leave it out for true")
    if isinstance(sinks, list) and (len(sinks) != config.n_layer or not all(isinstance(x, bool) for x in sinks)):
        raise ValueError(
            f"attention_sinks: {sinks!r} must have {config.n_layer} entries true or false, one for each of n_layer: "
            f"{config.n_layer}"
        )
    value = config.attention_sink_init
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"attention_sink_init: {value!r} must be a number; leave it out for 0")
    if sinks is False:
        raise ValueError(f"attention_sink_init: {value!r} would be ignored because attention_sinks is false; remove it")


def _check_backend_and_dropout(config: Any) -> None:
    if config.attention_backend not in (None, *BACKENDS):
        raise ValueError(
            f"attention_backend: {config.attention_backend!r} is unknown; choose from {', '.join(BACKENDS)}, or leave "
            "it out for the fastest one that works"
        )
    for name in ("attention_dropout", "embedding_dropout"):
        value = getattr(config, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1):
            raise ValueError(f"{name}: {value!r} must be a number from 0 to below 1; leave it out for 0")


def _check_position_embedding(config: Any) -> None:
    kind = config.position_embedding
    if kind is None:
        return
    if kind != "learned":
        raise ValueError(f"position_embedding: {kind!r} is unknown; set it to learned, or leave it out")
    if config.rotary_percentage:
        raise ValueError(
            f"rotary_percentage: {config.rotary_percentage!r} must be 0 with position_embedding: learned; positions "
            "would be counted twice"
        )
    if config.scale_embeddings:
        raise ValueError(
            "scale_embeddings: True does not go with position_embedding: learned, whose embeddings would be scaled "
            "too; set it to false"
        )


def _check_documents(config: Any) -> None:
    boundary, token_id = config.attention_document_boundary, config.attention_document_token_id
    if boundary is None:
        for name in ("attention_document_token_id", "attention_document_restart_positions"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}: {getattr(config, name)!r} would be ignored because attention_document_boundary is not "
                    "set; set it to eos or bos"
                )
        return
    if boundary not in ("eos", "bos"):
        raise ValueError(
            f"attention_document_boundary: {boundary!r} must be eos (the token ends a document) or bos (it begins one)"
        )
    if not _is_integer(token_id) or not 0 <= token_id < config.padded_vocab_size:
        raise ValueError(
            f"attention_document_token_id: {token_id!r} must be the id of the tokenizer's {boundary} token, an integer "
            f"from 0 to {config.padded_vocab_size - 1} (padded_vocab_size: {config.padded_vocab_size})"
        )
    if not isinstance(config.attention_document_restart_positions, bool):
        raise ValueError(
            f"attention_document_restart_positions: {config.attention_document_restart_positions!r} must be true or "
            "false"
        )


def _check_streaming(config: Any) -> None:
    first, window = config.streaming_cache_first, config.streaming_cache_window
    if first is None and window is None:
        return
    if not _is_integer(first) or not _is_integer(window) or first < 0 or window < 1:
        raise ValueError(
            f"streaming_cache_first: {first!r} and streaming_cache_window: {window!r} must both be set, to integers of "
            "at least 0 and 1 (usual are 4 and the rest of block_size)"
        )
    if first + window > config.block_size:
        raise ValueError(
            f"streaming_cache_window: {window} and streaming_cache_first: {first} are {first + window} tokens "
            f"together, more than the model's context (block_size: {config.block_size}); use at most "
            f"{config.block_size - first}"
        )
    for name in ("position_embedding", "attention_document_boundary", "rope_local_base_freq"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"streaming_cache_window: {window} does not go with {name}: {getattr(config, name)!r}; remove either"
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_rope_base(name: str, value: Any) -> None:
    _require_number(name, value)
    if value <= 1:
        raise ValueError(f"{name}: {value!r} must be greater than 1, or all positions would look alike; usual is 10000")
