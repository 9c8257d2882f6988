"""The table of classes: what each can express, and how its `config.json` says it.

The first class that can express every fact of a model is the one; where none can, `modeling_litgpt_moe.py` goes with
the weights. What transformers' own defaults would get wrong is written out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from litgpt_moe_ext.config.features import is_dense_layer
from litgpt_moe_ext.config.rope import present_adjustments
from litgpt_moe_ext.export.hf import names
from litgpt_moe_ext.export.hf.facts import Facts, layer_has_sinks, window_of
from litgpt_moe_ext.export.hf.tensors import Layout, Rule

REMOTE_CODE = "modeling_litgpt_moe"


@dataclass(frozen=True)
class Architecture:
    """A class of transformers, or ours.

    Attributes:
        class_name: The class with an output head.
        model_type: Its name in `config.json`.
        can: Values of each fact that it can express; a fact that is not named is free.
        config: Returns the entries of `config.json` beyond the common ones.
        entries: Returns the map of tensors.
    """

    class_name: str
    model_type: str
    can: Mapping[str, tuple[Any, ...]]
    config: Callable[[Facts], dict[str, Any]]
    entries: Callable[[Facts], names.Entries]

    def lacks(self, facts: Facts) -> list[str]:
        """Return what the class cannot express, as `fact: value`; empty if it computes this model."""
        return [
            f"{fact}: {_words(value)}"
            for fact, allowed in self.can.items()
            if (value := getattr(facts, fact)) not in allowed
        ]


def choose(facts: Facts, architectures: tuple[Architecture, ...]) -> tuple[Architecture | None, dict[str, list[str]]]:
    """Return the first class of a table that computes a model, and what each one before it lacks."""
    rejected: dict[str, list[str]] = {}
    for architecture in architectures:
        lacking = architecture.lacks(facts)
        if not lacking:
            return architecture, rejected
        rejected[architecture.class_name] = lacking
    return None, rejected


def _words(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sizes(facts: Facts) -> dict[str, Any]:
    config = facts.config
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "max_position_embeddings": config.block_size,
        "tie_word_embeddings": False,
    }


def _llama(facts: Facts) -> dict[str, Any]:
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


def _rope_scaling(facts: Facts) -> dict[str, Any] | None:
    if facts.rope == "default":
        return None
    keys = present_adjustments(facts.config.rope_adjustments)
    original = keys.pop("original_max_seq_len", None)
    keys.pop("dynamic", None)
    scaling: dict[str, Any] = {"rope_type": facts.rope, **keys}
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _moe_sizes(facts: Facts) -> dict[str, Any]:
    config = facts.config
    return {
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts_per_tok": config.n_expert_per_token,
        "norm_topk_prob": facts.norm_topk,
        "router_aux_loss_coef": 0.0,
        "output_router_logits": False,
    }


def _qwen_layers(facts: Facts) -> dict[str, Any]:
    config = facts.config
    dense = [i for i in range(config.n_layer) if is_dense_layer(config, i)]
    return {"num_experts": config.n_expert, "decoder_sparse_step": 1, "mlp_only_layers": dense}


def _window_key(facts: Facts) -> dict[str, Any]:
    return {"sliding_window": window_of(facts.config, 0)}


def _qwen_window(facts: Facts) -> dict[str, Any]:
    return {"use_sliding_window": False, "sliding_window": None}


def shared_width(facts: Facts) -> int:
    """Return the hidden width of all shared experts together."""
    config = facts.config
    return config.shared_expert_intermediate_size or config.n_shared_expert * config.moe_intermediate_size


def _glm(facts: Facts) -> dict[str, Any]:
    config = facts.config
    return (
        _llama(facts)
        | _moe_sizes(facts)
        | {
            "n_routed_experts": config.n_expert,
            "n_shared_experts": config.n_shared_expert,
            "n_group": config.n_expert_groups or 1,
            "topk_group": config.n_topk_groups or 1,
            "routed_scaling_factor": config.routed_scaling_factor,
            "first_k_dense_replace": config.first_k_dense_replace or 0,
            "partial_rotary_factor": config.rope_n_elem / config.head_size,
            "use_qk_norm": facts.qk_norm == "head",
            # llama.cpp would count a layer for multi-token prediction otherwise.
            "num_nextn_predict_layers": 0,
        }
    )


def _ernie(facts: Facts) -> dict[str, Any]:
    config = facts.config
    first = config.first_k_dense_replace or 0
    return _llama(facts) | {
        "use_bias": facts.mlp_bias,
        "moe_intermediate_size": config.moe_intermediate_size,
        "moe_k": config.n_expert_per_token,
        "moe_num_experts": config.n_expert,
        "moe_num_shared_experts": config.n_shared_expert or 0,
        "moe_layer_start_index": first,
        "moe_layer_end_index": config.n_layer - 1,
        "moe_layer_interval": 1,
    }


def _gpt2(facts: Facts) -> dict[str, Any]:
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
        "tie_word_embeddings": False,
    }


def _own(facts: Facts) -> dict[str, Any]:
    config = facts.config
    frequencies, factor = facts.rope_tables
    scale = config.attention_scores_scalar or config.head_size
    moe = {}
    if facts.moe:
        moe = {
            "moe_intermediate_size": config.moe_intermediate_size,
            "shared_expert_intermediate_size": shared_width(facts) if facts.shared != "none" else 0,
            "shared_expert_gate": facts.shared == "gated",
            "num_experts": config.n_expert,
            "num_experts_per_tok": config.n_expert_per_token,
            "router": facts.router,
            "router_score_function": facts.score,
            "n_group": config.n_expert_groups or 1,
            "topk_group": config.n_topk_groups or 1,
            "topk_scores_per_group": config.n_topk_scores_per_group or 1,
            "norm_topk_prob": facts.norm_topk,
            "routed_scaling_factor": config.routed_scaling_factor,
        }
    return (
        _sizes(facts)
        | moe
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
            "learned_positions": facts.positions == "learned",
            "rope_inv_freq": frequencies,
            "rope_dim": config.rope_n_elem,
            "rope_attention_factor": factor,
            "rope_interleave": facts.rope_layout == "interleaved",
            "hidden_act": {"swiglu": "silu", "geglu": _gelu(facts)}.get(facts.activation, facts.activation),
            "gated": facts.activation in ("swiglu", "geglu"),
            "mlp_bias": facts.mlp_bias,
            "intermediate_size": config.intermediate_size or 0,
            "moe_layers": [facts.moe and not is_dense_layer(config, i) for i in range(config.n_layer)],
            "lm_head_bias": facts.head_bias,
        }
    )


def _gelu(facts: Facts) -> str:
    return "gelu_tanh" if facts.config.gelu_approximate == "tanh" else "gelu"


def _dense_names(facts: Facts) -> names.Entries:
    return names.llama_like(facts) + names.gated_mlps(facts)


def _moe_names(**layer: str) -> Callable[[Facts], names.Entries]:
    return lambda facts: names.llama_like(facts) + names.gated_mlps(facts, **layer)


_ROW = Layout(lambda bias_E: bias_E.unsqueeze(0), lambda bias_1E: bias_1E.squeeze(0))


def _ernie_names(facts: Facts) -> names.Entries:
    bias = "mlp.moe_statics.e_score_correction_bias"
    entries = _moe_names(experts="mlp.experts.{e}", router="mlp.gate", bias=bias, shared="mlp.shared_experts")(facts)
    entries = names.with_interleaved_rotation(facts, entries)
    return [
        Rule(e.ours, e.theirs, layouts={e.theirs[0]: _ROW}) if isinstance(e, Rule) and e.theirs[0].endswith(bias) else e
        for e in entries
    ]


ROPES = ("default", "linear", "llama3", "yarn")
# What Llama's relatives have in common.
LLAMA_LIKE: dict[str, tuple[Any, ...]] = {
    "norm": ("rms",),
    "positions": ("rotary",),
    "rope": ROPES,
    "rope_layout": ("half",),
    "sinks": (False,),
    "window": ("none",),
    "qk_norm": ("none",),
    "attention_bias": ("none",),
    "activation": ("swiglu",),
    "mlp_bias": (False,),
    "head_bias": (False,),
    "scale": ("head",),
}
_DENSE = LLAMA_LIKE | {"layers": ("dense",)}
SOFTMAX = LLAMA_LIKE | {
    "router": ("topk",),
    "score": ("softmax",),
    "norm_topk": (True,),
    "balancing_bias": (False,),
    "groups": ("none",),
    "scaled": (False,),
    "shared": ("none",),
}

ARCHITECTURES = (
    Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        {
            "layers": ("dense",),
            "norm": ("layer",),
            "positions": ("learned",),
            "sinks": (False,),
            "window": ("none",),
            "qk_norm": ("none",),
            "attention_bias": ("none", "all"),
            "grouped": (False,),
            "free_head_size": (False,),
            "activation": ("gelu", "gelu_tanh", "relu"),
            "head_bias": (False,),
            "scale": ("head",),
        },
        _gpt2,
        names.gpt2,
    ),
    Architecture(
        "LlamaForCausalLM",
        "llama",
        _DENSE | {"attention_bias": ("none", "all"), "mlp_bias": (False, True)},
        lambda facts: _llama(facts) | {"mlp_bias": facts.mlp_bias},
        _dense_names,
    ),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        _DENSE | {"qk_norm": ("head",)},
        lambda facts: _llama(facts) | _qwen_window(facts),
        _dense_names,
    ),
    Architecture(
        "MixtralForCausalLM",
        "mixtral",
        SOFTMAX | {"layers": ("moe",), "window": ("none", "all")},
        lambda facts: (
            _llama(facts)
            | _moe_sizes(facts)
            | _window_key(facts)
            | {"num_local_experts": facts.config.n_expert, "intermediate_size": facts.config.moe_intermediate_size}
        ),
        _moe_names(experts="block_sparse_moe.experts.{e}", router="block_sparse_moe.gate", parts=".w1 .w3 .w2"),
    ),
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        SOFTMAX | {"layers": ("moe", "mixed", "alternating"), "qk_norm": ("head",), "norm_topk": (True, False)},
        lambda facts: _llama(facts) | _moe_sizes(facts) | _qwen_layers(facts) | _qwen_window(facts),
        _moe_names(experts="mlp.experts.{e}", router="mlp.gate"),
    ),
    Architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        SOFTMAX
        | {
            "layers": ("moe", "mixed", "alternating"),
            "attention_bias": ("qkv",),
            "norm_topk": (True, False),
            "shared": ("gated",),
            "free_head_size": (False,),
        },
        lambda facts: (
            _llama(facts)
            | _moe_sizes(facts)
            | _qwen_layers(facts)
            | _qwen_window(facts)
            | {"shared_expert_intermediate_size": shared_width(facts)}
        ),
        _moe_names(experts="mlp.experts.{e}", router="mlp.gate", shared="mlp.shared_expert"),
    ),
    Architecture(
        "OlmoeForCausalLM",
        "olmoe",
        SOFTMAX | {"layers": ("moe",), "qk_norm": ("whole",), "norm_topk": (True, False), "free_head_size": (False,)},
        lambda facts: (
            _llama(facts)
            | _moe_sizes(facts)
            | {
                "num_experts": facts.config.n_expert,
                "intermediate_size": facts.config.moe_intermediate_size,
                "clip_qkv": None,
            }
        ),
        _moe_names(experts="mlp.experts.{e}", router="mlp.gate"),
    ),
    Architecture(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        SOFTMAX | {"layers": ("moe", "mixed"), "balancing_bias": (True, False), "shared": ("none", "plain")},
        _ernie,
        _ernie_names,
    ),
    Architecture(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        SOFTMAX
        | {
            "layers": ("moe", "mixed"),
            "positions": ("rotary", "partial_rotary"),
            "qk_norm": ("none", "head"),
            "attention_bias": ("none", "qkv"),
            "score": ("sigmoid",),
            "norm_topk": (True, False),
            "balancing_bias": (True, False),
            "groups": ("none", "best_two"),
            "scaled": (True, False),
            "shared": ("plain",),
        },
        _glm,
        _moe_names(
            experts="mlp.experts.{e}",
            router="mlp.gate",
            bias="mlp.gate.e_score_correction_bias",
            shared="mlp.shared_experts",
        ),
    ),
    Architecture(
        "LitGPTMoEForCausalLM",
        "litgpt_moe",
        {},
        _own,
        names.own,
    ),
)

assert all(fact in {f.name for f in fields(Facts)} for a in ARCHITECTURES for fact in a.can), "a fact is misspelt"
