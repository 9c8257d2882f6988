"""The table of llama.cpp's graphs: what each computes, and its metadata.

Taken from the graphs themselves (`src/models/*.cpp` as of llama-cpp-python 0.3.36). A graph silently ignores the
metadata of other graphs, so only the values in `can` are safe.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from litgpt_moe_ext.attention.rope import rope_frequencies
from litgpt_moe_ext.config.rope import DEFAULT_BETA_FAST, DEFAULT_BETA_SLOW, present_adjustments, rope_kind
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.architecture import Architecture
from litgpt_moe_ext.export.facts import Facts, leading_dense_layers, window_of
from litgpt_moe_ext.export.families import BALANCED, GLM, GPT2, GPT2_BIASES, GPT_OSS, LATENT, LLAMA_LIKE, SOFTMAX
from litgpt_moe_ext.export.gguf import names
from litgpt_moe_ext.export.tensors import Names

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config

# llama.cpp's numbers of gating functions.
_GATING = {"softmax": 1, "sigmoid": 2}


def _sizes(facts: Facts) -> dict[str, Any]:
    config = facts.config
    return {
        "vocab_size": config.padded_vocab_size,
        "context_length": config.block_size,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer,
        "feed_forward_length": config.intermediate_size or config.moe_intermediate_size,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": config.n_query_groups,
    }


def _heads(facts: Facts) -> dict[str, Any]:
    config = facts.config
    return {
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.dimension_count": config.rope_n_elem,
        "rope.freq_base": float(config.rope_base),
    }


def _rope_scaling(facts: Facts) -> dict[str, Any]:
    if facts.rope not in ("linear", "yarn"):
        return {"rope.scaling.type": "none"}
    keys = present_adjustments(facts.config.rope_adjustments)
    scaling: dict[str, Any] = {"rope.scaling.type": facts.rope, "rope.scaling.factor": float(keys["factor"])}
    if facts.rope == "yarn":
        _, wanted = facts.rope_tables
        config = facts.config
        plain = {"factor": keys["factor"], "original_max_seq_len": keys["original_max_seq_len"], "beta_fast": 32.0}
        _, own = rope_frequencies(config.rope_n_elem, config.rope_base, plain)
        scaling |= {
            "rope.scaling.original_context_length": int(keys["original_max_seq_len"]),
            "rope.scaling.yarn_beta_fast": float(keys.get("beta_fast", DEFAULT_BETA_FAST)),
            "rope.scaling.yarn_beta_slow": float(keys.get("beta_slow", DEFAULT_BETA_SLOW)),
            # Multiplied by YaRN's own factor.
            "rope.scaling.attn_factor": wanted / own,
        }
    return scaling


def _experts(facts: Facts) -> dict[str, Any]:
    config = facts.config
    return {
        "expert_count": config.n_expert,
        "expert_used_count": config.n_expert_per_token,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _one_width(facts: Facts) -> dict[str, Any]:
    return {"feed_forward_length": facts.config.moe_intermediate_size}


def _shared_width(facts: Facts) -> dict[str, Any]:
    return {"expert_shared_feed_forward_length": facts.shared_width} if facts.shared != "none" else {}


def _glm(facts: Facts) -> dict[str, Any]:
    config = facts.config
    groups = {"expert_group_count": config.n_expert_groups, "expert_group_used_count": config.n_topk_groups}
    return {
        "expert_shared_count": config.n_shared_expert,
        "leading_dense_block_count": leading_dense_layers(config),
        "expert_gating_func": _GATING[facts.score],
        "expert_weights_norm": facts.norm_topk,
        "expert_weights_scale": float(config.routed_scaling_factor),
        **(groups if facts.groups != "none" else {}),
    }


def _latent(facts: Facts) -> dict[str, Any]:
    _require_full_depth(facts.config)
    sizes = facts.latent_sizes
    rank, rotated = sizes["kv_lora_rank"], sizes["qk_rope_head_dim"]
    return {
        # The graph attends to the latent keys as to a single head shared by all queries.
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": sizes["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": sizes["v_head_dim"],
        "attention.q_lora_rank": sizes["q_lora_rank"],
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rotated,
    }


def _require_full_depth(config: "Config") -> None:
    if config.n_layer in (26, 27) or (config.n_layer, config.padded_vocab_size) == (48, 128256):
        raise SettingsError(
            f"format: gguf: n_layer: {config.n_layer} with latent attention is a model without compressed queries to "
            "llama.cpp, whatever else the file says; export with --format hf"
        )


def _yarn_of_latent_attention(facts: Facts) -> dict[str, Any]:
    # The graph multiplies cosines and sines by A, and scores by (A (1 + L / 10 ln factor))^2. A is `attn_factor`, times
    # YaRN's own factor if L is 0, and L is ten times `yarn_log_multiplier`.
    if facts.rope != "yarn":
        return {}
    keys = present_adjustments(facts.config.rope_adjustments)
    logarithm = math.log(keys["factor"])
    _, tables = facts.rope_tables
    scores = 1 + 0.1 * keys.get("mscale_all_dim", 0.0) * logarithm
    if not logarithm and tables != 1:
        raise SettingsError(
            f"format: gguf: rope_adjustments.attention_factor: {tables} needs a factor above 1 with latent attention "
            "in llama.cpp; export with --format hf"
        )
    multiplier = (scores / tables - 1) / logarithm if logarithm else 0.0
    if multiplier:
        return {"rope.scaling.attn_factor": tables, "rope.scaling.yarn_log_multiplier": multiplier}
    return {}


def _ernie(facts: Facts) -> dict[str, Any]:
    return {"interleave_moe_layer_step": 1, "leading_dense_block_count": leading_dense_layers(facts.config)}


def _gpt_oss(facts: Facts) -> dict[str, Any]:
    config = facts.config
    windows = [window_of(config, i) is not None for i in range(config.n_layer)]
    # The graph requires a layer with a window; a window as long as the context hides nothing.
    windows[0] = windows[0] or not any(windows)
    return {
        "attention.sliding_window": config.sliding_window_size or config.block_size,
        "attention.sliding_window_pattern": windows,
    }


def _gpt2(facts: Facts) -> dict[str, Any]:
    return {"attention.layer_norm_epsilon": facts.config.norm_eps}


def _llama3_factors(config: "Config") -> dict[str, Tensor]:
    if rope_kind(config.rope_adjustments) != "llama3":
        return {}
    # The graph divides plain frequencies by these.
    plain_F, _ = rope_frequencies(config.rope_n_elem, config.rope_base)
    ours_F, _ = rope_frequencies(config.rope_n_elem, config.rope_base, config.rope_adjustments)
    return {"rope_freqs.weight": plain_F / ours_F}


_COMMON: dict[str, tuple[Any, ...]] = LLAMA_LIKE | {"rope": ("default", "linear", "yarn"), "yarn_rounds": (True,)}
_MOE = SOFTMAX | _COMMON
_ANY_LLAMA: dict[str, tuple[Any, ...]] = {
    "rope": ("default", "linear", "llama3", "yarn"),
    "attention_bias": ("none", "qkv", "all"),
}


# The metadata by its parts.
_DECODER_PARTS = (_sizes, _heads, _rope_scaling)
_MOE_PARTS = (*_DECODER_PARTS, _experts)


def _graph(
    name: str,
    can: dict[str, tuple[Any, ...]],
    metadata: tuple[Callable[[Facts], dict[str, Any]], ...],
    tensors: Names,
    **more: Any,
) -> Architecture:
    return Architecture(name, name.split()[0], can, metadata, tensors, **more)


GRAPHS = (
    _graph("gpt2", GPT2 | {"activation": ("gelu_tanh",)}, (_sizes, _gpt2), names.GPT2, biases=GPT2_BIASES),
    _graph(
        "llama",
        _COMMON | _ANY_LLAMA | {"layers": ("dense",), "mlp_bias": (False, True)},
        _DECODER_PARTS,
        names.DECODER,
        rotates_neighbours=True,
        more=_llama3_factors,
    ),
    _graph("qwen3", _COMMON | {"layers": ("dense",), "qk_norm": ("head",)}, _DECODER_PARTS, names.DECODER),
    _graph(
        "llama with experts",
        _MOE | _ANY_LLAMA | {"layers": ("moe",)},
        (*_MOE_PARTS, _one_width),
        names.DECODER,
        rotates_neighbours=True,
        more=_llama3_factors,
    ),
    _graph("qwen3moe", _MOE | {"layers": ("moe",), "qk_norm": ("head",)}, _MOE_PARTS, names.DECODER),
    _graph(
        "qwen2moe",
        _MOE
        | {
            "layers": ("moe",),
            "attention_bias": ("none", "qkv"),
            "norm_topk": (False,),
            "shared": ("gated",),
            "free_head_size": (False,),
        },
        (*_MOE_PARTS, _shared_width),
        names.DECODER,
        ties=False,
    ),
    _graph(
        "olmoe",
        _MOE
        | {
            "layers": ("moe",),
            "qk_norm": ("whole",),
            "norm_topk": (False,),
            "grouped": (False,),
            "free_head_size": (False,),
        },
        (*_MOE_PARTS, _one_width),
        names.DECODER,
        ties=False,
    ),
    _graph(
        "ernie4_5-moe",
        _MOE
        | {
            "layers": ("moe", "mixed"),
            "balancing_bias": (True, False),
            "shared": ("none", "plain", "plain_other_width"),
        },
        (*_MOE_PARTS, _ernie, _shared_width),
        names.BALANCED,
        rotates_neighbours=True,
    ),
    _graph("glm4moe", _MOE | GLM, (*_MOE_PARTS, _glm), names.GLM),
    _graph(
        "deepseek2",
        _MOE | LATENT | BALANCED | {"rope": ("default", "yarn"), "score": ("softmax", "sigmoid")},
        (*_MOE_PARTS, _glm, _latent, _yarn_of_latent_attention),
        names.BALANCED,
        rotates_neighbours=True,
    ),
    _graph("gpt-oss", _MOE | GPT_OSS, (*_MOE_PARTS, _gpt_oss), names.GPT_OSS, biases=("mlp.gate.bias",), ties=False),
)
