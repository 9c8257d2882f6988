"""From the entries of a `config.json` to the settings of the model that computes the same with this package's layers.

Entries are complete: missing ones have the defaults of the class, `rope_theta` and `partial_rotary_factor` are entries
of their own, and `rope` holds the file's other settings of rotary positions.
"""

from collections.abc import Callable
from typing import Any

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.facts import DEEPSEEK_EPS
from litgpt_moe_ext.export.hf.config_json import OWN_SETTINGS

_Json = dict[str, Any]


def _common(hf: _Json) -> _Json:
    head_size = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    if hf.get("hidden_act", "silu") != "silu":
        raise SettingsError(f"hf_dir: hidden_act: {hf['hidden_act']} must be silu; this class is known with it only")
    base = float(hf["rope_theta"])
    return {
        "block_size": hf["max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        "padded_vocab_size": hf["vocab_size"],
        "n_layer": hf["num_hidden_layers"],
        "n_embd": hf["hidden_size"],
        "n_head": hf["num_attention_heads"],
        "n_query_groups": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_size": head_size,
        "rope_base": int(base) if base.is_integer() else base,
        "rotary_percentage": 1.0,
        "rope_adjustments": _rope_adjustments(hf["rope"], hf["max_position_embeddings"]),
        "norm_class_name": "RMSNorm",
        "norm_eps": hf["rms_norm_eps"],
        "parallel_residual": False,
        "bias": False,
        "attention_class_name": "SinkAttention",
        "attention_sinks": False,
        "mlp_activation": "swiglu",
    }


# The keys that are read for each kind of `rope_scaling`; transformers ignores all others.
_ORIGINAL = "original_max_position_embeddings"
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": (
        *("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
        *("truncate", _ORIGINAL),
    ),
}


def _rope_adjustments(rope: _Json, length: int) -> _Json | None:
    said = {key: value for key, value in rope.items() if value is not None}
    kind = said.get("rope_type", said.get("type", None if said else "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise SettingsError(f"hf_dir: rope_type: {kind} must be one of {', '.join(_ROPE_KEYS)}")
    keys = {key: said[key] for key in _ROPE_KEYS[kind] if key in said}
    if kind != "default" and "factor" not in keys:
        raise SettingsError(f"hf_dir: rope_scaling: {rope} has no factor; copy config.json again")
    if kind == "yarn":
        # Marks the rule as YaRN even if all of its keys have their defaults.
        keys = {"beta_fast": 32.0, _ORIGINAL: length} | keys
        if rope.get("truncate", True) is None:
            keys["truncate"] = False
    if _ORIGINAL in keys:
        keys["original_max_seq_len"] = keys.pop(_ORIGINAL)
    return keys or None


def _dense(hf: _Json) -> _Json:
    return _common(hf) | {"mlp_class_name": "FeedForward", "intermediate_size": hf["intermediate_size"]}


def _llama(hf: _Json) -> _Json:
    _require_alike(hf, "attention_bias", "mlp_bias")
    return _dense(hf) | {"bias": hf["attention_bias"]}


def _qwen3(hf: _Json) -> _Json:
    _refuse(hf, "attention_bias", "use_sliding_window")
    return _dense(hf) | {"norm_qk": True}


def _moe(hf: _Json, n_expert: str = "num_experts", width: str = "moe_intermediate_size") -> _Json:
    return _common(hf) | {
        "mlp_class_name": "SharedExpertMoE",
        "n_expert": hf[n_expert],
        "n_expert_per_token": hf["num_experts_per_tok"],
        "moe_intermediate_size": hf[width],
        "norm_topk_prob": hf.get("norm_topk_prob", True),
        "router_score_function": "softmax",
        "router_bias_update_rate": 0.0,
    }


def _mixtral(hf: _Json) -> _Json:
    settings = _moe(hf, "num_local_experts", "intermediate_size")
    return settings | {"norm_topk_prob": True, "sliding_window_size": hf.get("sliding_window")}


def _qwen3_moe(hf: _Json) -> _Json:
    _refuse(hf, "attention_bias", "use_sliding_window")
    return _moe(hf) | {"norm_qk": True} | _qwen_pattern(hf)


def _qwen2_moe(hf: _Json) -> _Json:
    _refuse(hf, "use_sliding_window")
    shared = {
        "n_shared_expert": 1,
        "shared_expert_gate": True,
        "shared_expert_intermediate_size": hf["shared_expert_intermediate_size"],
    }
    return _moe(hf) | {"attn_bias": hf.get("qkv_bias", True)} | shared | _qwen_pattern(hf)


def _olmoe(hf: _Json) -> _Json:
    _refuse(hf, "attention_bias")
    norms = {"norm_qk": True, "norm_qk_type": "olmo2"}
    return _moe(hf, width="intermediate_size") | norms | {"clip_qkv": hf.get("clip_qkv")}


def _ernie(hf: _Json) -> _Json:
    _refuse(hf, "use_bias")
    last = hf["num_hidden_layers"] - 1
    if hf["moe_layer_interval"] != 1 or hf["moe_layer_end_index"] not in (-1, last):
        raise SettingsError("hf_dir: moe_layer_interval and moe_layer_end_index must make all last layers MoE layers")
    settings = _moe(hf | {"num_experts": hf["moe_num_experts"], "num_experts_per_tok": hf["moe_k"]})
    return settings | {
        "norm_topk_prob": True,
        "router_bias_update_rate": 0.001,
        "n_shared_expert": hf["moe_num_shared_experts"] or None,
        **_first_dense(hf, hf["moe_layer_start_index"]),
    }


def _glm(hf: _Json) -> _Json:
    groups = (hf["n_group"] or 1) > 1
    return _moe(hf, "n_routed_experts") | {
        "rotary_percentage": hf["partial_rotary_factor"],
        "norm_qk": hf["use_qk_norm"],
        "attn_bias": hf["attention_bias"],
        "router_score_function": "sigmoid",
        "router_bias_update_rate": 0.001,
        "n_shared_expert": hf["n_shared_experts"],
        "n_expert_groups": hf["n_group"] if groups else None,
        "n_topk_groups": hf["topk_group"] if groups else None,
        "n_topk_scores_per_group": 2 if groups else None,
        "routed_scaling_factor": hf["routed_scaling_factor"],
        **_first_dense(hf, hf["first_k_dense_replace"]),
    }


def _gpt_oss(hf: _Json) -> _Json:
    for name, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0), ("attention_bias", True)):
        if hf.get(name, value) != value:
            raise SettingsError(f"hf_dir: {name}: {hf[name]} must be {value}; this package has no other")
    windows = [int(kind == "sliding_attention") for kind in hf["layer_types"]]
    window = {"sliding_window_size": hf["sliding_window"], "sliding_window_indices": windows} if any(windows) else {}
    return (
        _moe(hf, "num_local_experts", "intermediate_size")
        | {"bias": True, "attention_sinks": True, "router_bias": True, "mlp_activation": "clamped_swiglu"}
        | {"norm_topk_prob": True}
        | window
    )


def _deepseek(hf: _Json) -> _Json:
    _refuse(hf, "attention_bias", "mlp_bias")
    if hf["q_lora_rank"] is None:
        raise SettingsError("hf_dir: q_lora_rank: null must be a number; LitGPT's latent attention compresses queries")
    if hf["rms_norm_eps"] != DEEPSEEK_EPS:
        raise SettingsError(
            f"hf_dir: rms_norm_eps: {hf['rms_norm_eps']} must be {DEEPSEEK_EPS}; this package has one for all norms"
        )
    if hf.get("moe_layer_freq", 1) != 1:
        raise SettingsError(f"hf_dir: moe_layer_freq: {hf['moe_layer_freq']} must be 1")
    names = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    settings = _glm(hf | {"use_qk_norm": False, "partial_rotary_factor": 1.0})
    # transformers multiplies the scores by this for every kind of scaling.
    if (all_dim := hf["rope"].get("mscale_all_dim")) and "mscale_all_dim" not in (settings["rope_adjustments"] or {}):
        raise SettingsError(
            f"hf_dir: rope_scaling.mscale_all_dim: {all_dim} needs rope_type: yarn; this package has no other"
        )
    # The attention is LitGPT's.
    for name in ("attention_class_name", "attention_sinks", "norm_qk", "attn_bias"):
        del settings[name]
    return settings | {"latent_attention": {name: hf[name] for name in names}, "head_size": hf["qk_rope_head_dim"]}


def _deepseek_v2(hf: _Json) -> _Json:
    methods = {"greedy": False, "group_limited_greedy": True}
    if hf["topk_method"] not in methods:
        raise SettingsError(f"hf_dir: topk_method: {hf['topk_method']} must be {' or '.join(methods)}")
    groups = methods[hf["topk_method"]]
    settings = _deepseek(hf if groups else hf | {"n_group": 1})
    return settings | {
        "rope_interleave": True,
        "router_score_function": "softmax",
        "norm_topk_prob": False,
        "router_bias_update_rate": 0.0,
        "n_topk_scores_per_group": 1 if settings["n_expert_groups"] else None,
    }


def _deepseek_v3(hf: _Json) -> _Json:
    return _deepseek(hf) | {"rope_interleave": hf["rope_interleave"]}


def _gpt2(hf: _Json) -> _Json:
    _refuse(hf, "scale_attn_by_inverse_layer_idx", "add_cross_attention")
    if not hf["scale_attn_weights"]:
        raise SettingsError("hf_dir: scale_attn_weights: False must be True; this package has no other attention")
    activation = {"gelu_new": "gelu", "gelu": "gelu", "relu": "relu"}.get(hf["activation_function"])
    if activation is None:
        raise SettingsError(f"hf_dir: activation_function: {hf['activation_function']} must be gelu_new, gelu or relu")
    return {
        "block_size": hf["n_positions"],
        "vocab_size": hf["vocab_size"],
        "padded_vocab_size": hf["vocab_size"],
        "n_layer": hf["n_layer"],
        "n_embd": hf["n_embd"],
        "n_head": hf["n_head"],
        "n_query_groups": hf["n_head"],
        "position_embedding": "learned",
        "rotary_percentage": 0.0,
        "norm_class_name": "LayerNorm",
        "norm_eps": hf["layer_norm_epsilon"],
        "parallel_residual": False,
        "bias": True,
        "attention_class_name": "SinkAttention",
        "attention_sinks": False,
        "mlp_class_name": "FeedForward",
        "mlp_activation": activation,
        "gelu_approximate": "tanh" if hf["activation_function"] == "gelu_new" else "none",
        "intermediate_size": hf["n_inner"] or 4 * hf["n_embd"],
    }


def _qwen_pattern(hf: _Json) -> _Json:
    n_layer, step = hf["num_hidden_layers"], hf["decoder_sparse_step"]
    only = hf.get("mlp_only_layers") or []
    if not (isinstance(only, list) and all(type(layer) is int for layer in only)):
        raise SettingsError(f"hf_dir: mlp_only_layers: {only!r} must be a list of layers; copy config.json again")
    dense = [i for i in range(n_layer) if i in only or (i + 1) % step != 0]
    if len(dense) == n_layer:
        raise SettingsError(f"hf_dir: mlp_only_layers: {sorted(only)} leaves no layer with experts")
    return {"mlp_only_layers": dense, "intermediate_size": hf["intermediate_size"]} if dense else {}


def _first_dense(hf: _Json, first: int) -> _Json:
    return {"first_k_dense_replace": first, "intermediate_size": hf["intermediate_size"]} if first else {}


def _refuse(hf: _Json, *names: str) -> None:
    for name in names:
        if hf.get(name):
            raise SettingsError(f"hf_dir: {name}: {hf[name]} must be off; this package computes the class without it")


def _require_alike(hf: _Json, first: str, second: str) -> None:
    if bool(hf.get(first)) != bool(hf.get(second)):
        raise SettingsError(f"hf_dir: {first}: {hf.get(first)} and {second}: {hf.get(second)} must be alike")


def _own(hf: _Json) -> _Json:
    settings = hf.get(OWN_SETTINGS)
    if not isinstance(settings, dict):
        raise SettingsError(
            f"hf_dir: {OWN_SETTINGS}: {settings!r} must be the fields of the model that was exported; export it again"
        )
    return dict(settings)


# By architecture.
READERS: dict[str, Callable[[_Json], _Json]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen3": _qwen3,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "ernie4_5_moe": _ernie,
    "glm4_moe": _glm,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "litgpt_moe": _own,
}
