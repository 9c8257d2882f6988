"""The entries of each class's `config.json` for a model, explicit wherever transformers' defaults would be wrong."""

import math
from dataclasses import asdict
from typing import Any

from litgpt_moe_ext.config.features import is_dense_layer
from litgpt_moe_ext.config.fields import BACKEND_FIELDS
from litgpt_moe_ext.config.rope import present_adjustments
from litgpt_moe_ext.export.facts import Facts, layer_has_sinks, leading_dense_layers, window_of

REMOTE_CODE = "modeling_litgpt_moe"
# The entry of our own class's `config.json` that holds the fields of `litgpt.Config`.
OWN_SETTINGS = "litgpt_config"
_OF_ONE_PLACE = ("name", "hf_config", *BACKEND_FIELDS)
_Json = dict[str, Any]


def _sizes(facts: Facts) -> _Json:
    config = facts.config
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "max_position_embeddings": config.block_size,
    }


def llama(facts: Facts) -> _Json:
    """Return entries under Llama's names, which most classes share."""
    config = facts.config
    return _sizes(facts) | {
        "intermediate_size": config.intermediate_size or config.moe_intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": float(config.rope_base),
        "rope_scaling": _rope_scaling(facts),
        "attention_bias": facts.attention_bias != "none",
        "attention_dropout": 0.0,
    }


def _rope_scaling(facts: Facts) -> _Json | None:
    if facts.rope == "default":
        return None
    keys = present_adjustments(facts.config.rope_adjustments)
    original = keys.pop("original_max_seq_len", None)
    keys.pop("dynamic", None)
    # transformers warns of whole numbers, which recipes may have.
    numbers = {name: float(value) for name, value in keys.items() if type(value) is int}
    scaling: _Json = {"rope_type": facts.rope, **keys, **numbers}
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def moe_sizes(facts: Facts) -> _Json:
    """Return entries that classes with experts share."""
    config = facts.config
    return {
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts_per_tok": config.n_expert_per_token,
        "norm_topk_prob": facts.norm_topk,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
    }


def qwen_layers(facts: Facts) -> _Json:
    """Return Qwen's entries for the number of experts and for layers without experts."""
    config = facts.config
    dense = [i for i in range(config.n_layer) if is_dense_layer(config, i)]
    return {"num_experts": config.n_expert, "decoder_sparse_step": 1, "mlp_only_layers": dense}


def mixtral(facts: Facts) -> _Json:
    """Return the entries of Mixtral alone."""
    return {
        "num_local_experts": facts.config.n_expert,
        "intermediate_size": facts.config.moe_intermediate_size,
        "sliding_window": window_of(facts.config, 0),
    }


def olmoe(facts: Facts) -> _Json:
    """Return the entries of OLMoE alone."""
    return {
        "num_experts": facts.config.n_expert,
        "intermediate_size": facts.config.moe_intermediate_size,
        "clip_qkv": facts.config.clip_qkv,
    }


def no_window(facts: Facts) -> _Json:
    """Return entries that switch off Qwen's sliding window."""
    return {"use_sliding_window": False, "sliding_window": None}


def glm(facts: Facts) -> _Json:
    """Return the entries that GLM-4-MoE and DeepSeek share."""
    config = facts.config
    return {
        "n_routed_experts": config.n_expert,
        "n_shared_experts": config.n_shared_expert,
        "n_group": config.n_expert_groups or 1,
        "topk_group": config.n_topk_groups or 1,
        "routed_scaling_factor": config.routed_scaling_factor,
        "first_k_dense_replace": leading_dense_layers(config),
        "partial_rotary_factor": _share(config.rope_n_elem, config.head_size),
        "use_qk_norm": facts.qk_norm == "head",
        # Otherwise llama.cpp would count a layer for multi-token prediction.
        "num_nextn_predict_layers": 0,
    }


def _share(part: int, whole: int) -> float:
    # Readers multiply by the whole again and truncate.
    share = part / whole
    return share if int(share * whole) == part else math.nextafter(share, 1)


def latent(facts: Facts) -> _Json:
    """Return the entries of latent attention."""
    config = facts.config
    sizes = {"head_dim": config.rope_n_elem, "num_key_value_heads": config.n_head, "partial_rotary_factor": 1.0}
    return facts.latent_sizes | sizes | _temperature(facts)


def deepseek_v2(facts: Facts) -> _Json:
    """Return the entries of DeepSeek-V2 alone."""
    return _routing("greedy" if facts.groups == "none" else "group_limited_greedy", "softmax")


def _temperature(facts: Facts) -> _Json:
    """Return `rope_scaling` with both of DeepSeek's factors or neither: readers interpret one alone differently."""
    scaling = _rope_scaling(facts)
    if scaling is None or bool(scaling.get("mscale")) == bool(scaling.get("mscale_all_dim")):
        return {}
    # Alone, `mscale` is ignored by transformers, and `mscale_all_dim` does not affect cosine and sine.
    scaling.pop("mscale", None)
    if all_dim := scaling.pop("mscale_all_dim", 0):
        slope = 0.1 * math.log(max(scaling["factor"], 1))
        scaling |= {"mscale": 1 + all_dim + slope * all_dim, "mscale_all_dim": all_dim}
    return {"rope_scaling": scaling}


def _routing(method: str, score: str) -> _Json:
    # Implied by the class in transformers, but read by vLLM, SGLang and llama.cpp.
    return {"topk_method": method, "scoring_func": score, "moe_layer_freq": 1}


def deepseek_v3(facts: Facts) -> _Json:
    """Return the entries of DeepSeek-V3 alone."""
    # Always stored interleaved, because vLLM does not read this entry.
    return _routing("noaux_tc", "sigmoid") | {"rope_interleave": True}


def gpt_oss(facts: Facts) -> _Json:
    """Return the entries of GPT-OSS alone."""
    config = facts.config
    windows = [window_of(config, i) for i in range(config.n_layer)]
    return {
        "num_local_experts": config.n_expert,
        "intermediate_size": config.moe_intermediate_size,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": config.sliding_window_size or config.block_size,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        # Without an entry the default would be YaRN.
        "rope_scaling": _rope_scaling(facts) or {"rope_type": "default"},
    }


def ernie(facts: Facts) -> _Json:
    """Return the entries of ERNIE-4.5-MoE alone."""
    config = facts.config
    return {
        "use_bias": facts.mlp_bias,
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_k": config.n_expert_per_token,
        "moe_num_experts": config.n_expert,
        "moe_num_shared_experts": config.n_shared_expert or 0,
        "moe_layer_start_index": leading_dense_layers(config),
        "moe_layer_end_index": config.n_layer - 1,
        "moe_layer_interval": 1,
    }


def gpt2(facts: Facts) -> _Json:
    """Return the entries of GPT-2."""
    config = facts.config
    return {
        "vocab_size": config.padded_vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.intermediate_size,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(facts.activation, facts.activation),
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def own(facts: Facts) -> _Json:
    """Return the entries of `modeling_litgpt_moe.py`."""
    config = facts.config
    frequencies, factor = facts.rope_tables
    scale = config.attention_scores_scalar or config.head_size
    return (
        _sizes(facts)
        | (_own_moe(facts) if facts.moe else {})
        | {
            "auto_map": {
                "AutoConfig": f"{REMOTE_CODE}.LitGPTMoEConfig",
                "AutoModel": f"{REMOTE_CODE}.LitGPTMoEModel",
                "AutoModelForCausalLM": f"{REMOTE_CODE}.LitGPTMoEForCausalLM",
            },
            "norm": facts.norm,
            "norm_eps": config.norm_eps,
            "attention_bias": facts.attention_bias != "none",
            "attention_out_bias": facts.attention_bias == "all",
            "attention_scale": scale**-0.5,
            "attention_windows": [window_of(config, i) for i in range(config.n_layer)],
            "attention_sinks": [layer_has_sinks(config, i) for i in range(config.n_layer)],
            "qk_norm": facts.qk_norm,
            "clip_qkv": config.clip_qkv,
            "learned_positions": facts.positions == "learned",
            "rope_inv_freq": frequencies,
            "rope_dim": config.rope_n_elem,
            "rope_attention_factor": factor,
            "rope_interleave": facts.rope_layout == "interleaved",
            "hidden_act": _GATED.get(facts.activation) or _gelu(facts),
            "gated": is_gated(facts),
            "mlp_bias": facts.mlp_bias,
            "intermediate_size": config.intermediate_size or 0,
            "moe_layers": [facts.moe and not is_dense_layer(config, i) for i in range(config.n_layer)],
            "lm_head_bias": facts.head_bias,
            # For importing it again; the entries above do not hold everything.
            OWN_SETTINGS: {name: value for name, value in asdict(config).items() if name not in _OF_ONE_PLACE},
        }
    )


def _own_moe(facts: Facts) -> _Json:
    config = facts.config
    return {
        "moe_intermediate_size": config.moe_intermediate_size,
        "shared_expert_intermediate_size": facts.shared_width if facts.shared != "none" else 0,
        "shared_expert_gate": facts.shared == "gated",
        "num_experts": config.n_expert,
        "num_experts_per_tok": config.n_expert_per_token,
        "router": facts.router,
        "router_score_function": facts.score,
        "router_bias": facts.router_bias,
        "gate_on_input": facts.gate_on_input,
        "n_group": config.n_expert_groups or 1,
        "topk_group": config.n_topk_groups or 1,
        "topk_scores_per_group": config.n_topk_scores_per_group or 1,
        "norm_topk_prob": facts.norm_topk,
        "routed_scaling_factor": config.routed_scaling_factor,
    }


# The functions of the gate in gated activations.
_GATED = {"swiglu": "silu", "clamped_swiglu": "clamped_silu", "geglu": None}


def is_gated(facts: Facts) -> bool:
    """Return whether feed-forward layers have a gate."""
    return facts.activation in _GATED


def _gelu(facts: Facts) -> str:
    if facts.activation != "geglu":
        return facts.activation
    return "gelu_tanh" if facts.config.gelu_approximate == "tanh" else "gelu"
