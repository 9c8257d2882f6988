"""Small models of every kind, as checkpoints with random weights."""

from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config
from litgpt.utils import save_config

SIZES: dict[str, Any] = {
    "n_layer": 3,
    "n_embd": 48,
    "n_head": 4,
    "n_query_groups": 2,
    "head_size": 12,
    "block_size": 96,
    "vocab_size": 97,
    "padded_vocab_size": 97,
    "rotary_percentage": 1.0,
    "rope_base": 5000,
    "norm_class_name": "RMSNorm",
    "parallel_residual": False,
    "bias": False,
    "attention_class_name": "SinkAttention",
    "attention_sinks": False,
}
MOE: dict[str, Any] = {
    **SIZES,
    "mlp_class_name": "SharedExpertMoE",
    "n_expert": 7,
    "n_expert_per_token": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}
SOFTMAX = {**MOE, "router_score_function": "softmax", "router_bias_update_rate": 0.0}
DENSE = {**SIZES, "mlp_class_name": "FeedForward", "intermediate_size": 40}
LEARNED = {"position_embedding": "learned", "rotary_percentage": 0.0, "norm_class_name": "LayerNorm"}
YARN = {"factor": 4.0, "original_max_seq_len": 16, "beta_fast": 32.0, "beta_slow": 1.0}
GPT_OSS: dict[str, Any] = {
    **SOFTMAX,
    "bias": True,
    "attention_sinks": True,
    "router_bias": True,
    "mlp_activation": "clamped_swiglu",
}
MOE_OF_LITGPT = {name: value for name, value in MOE.items() if not name.startswith("attention")}
LATENT_SIZES: dict[str, Any] = {
    "n_query_groups": 4,
    "norm_eps": 1e-6,
    "latent_attention": {
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 10,
        "v_head_dim": 14,
    },
}
LATENT: dict[str, Any] = {
    **MOE_OF_LITGPT,
    **LATENT_SIZES,
    "rope_interleave": True,
    "n_shared_expert": 1,
    "n_expert": 8,
    "n_expert_groups": 4,
    "n_topk_groups": 2,
    "routed_scaling_factor": 2.5,
}

# Name of a case: the class it must become, its settings, and whether its balancing bias distinguishes experts.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        {**DENSE, **LEARNED, "n_query_groups": 4, "bias": True, "mlp_activation": "gelu", "gelu_approximate": "tanh"},
        False,
    ),
    "gpt2-relu": (
        "GPT2LMHeadModel",
        {**DENSE, **LEARNED, "n_query_groups": 4, "mlp_activation": "relu"},
        False,
    ),
    "llama": ("LlamaForCausalLM", {**DENSE, "rope_adjustments": YARN}, False),
    "qwen3": ("Qwen3ForCausalLM", {**DENSE, "norm_qk": True, "head_size": 16}, False),
    "mixtral": ("MixtralForCausalLM", SOFTMAX, False),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        {**SOFTMAX, "norm_qk": True, "norm_topk_prob": False, "decoder_sparse_step": 2, "intermediate_size": 40},
        False,
    ),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        {
            **SOFTMAX,
            "attn_bias": True,
            "norm_topk_prob": False,
            "n_shared_expert": 1,
            "shared_expert_gate": True,
            "shared_expert_intermediate_size": 28,
        },
        False,
    ),
    "olmoe": ("OlmoeForCausalLM", {**SOFTMAX, "norm_qk": True, "norm_qk_type": "olmo2"}, False),
    "olmoe-clipped": (
        "OlmoeForCausalLM",
        {**SOFTMAX, "norm_qk": True, "norm_qk_type": "olmo2", "clip_qkv": 0.7},
        False,
    ),
    "qwen3-moe-irregular": (
        "Qwen3MoeForCausalLM",
        {**SOFTMAX, "n_layer": 4, "norm_qk": True, "mlp_only_layers": [2, 0], "intermediate_size": 40},
        False,
    ),
    "ernie": (
        "Ernie4_5_MoeForCausalLM",
        {**SOFTMAX, "router_bias_update_rate": 0.01, "first_k_dense_replace": 1, "intermediate_size": 40},
        True,
    ),
    "glm": (
        "Glm4MoeForCausalLM",
        {
            **MOE,
            "n_shared_expert": 1,
            "n_expert": 8,
            "n_expert_groups": 4,
            "n_topk_groups": 2,
            "n_topk_scores_per_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_adjustments": YARN,
        },
        True,
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            **GPT_OSS,
            "sliding_window_size": 9,
            "sliding_window_indices": [1, 0, 1],
            "rope_adjustments": {**YARN, "truncate": False},
        },
        False,
    ),
    "gpt-oss-without-router-bias": ("GptOssForCausalLM", {**GPT_OSS, "router_bias": None}, False),
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        {
            **LATENT,
            "router_score_function": "softmax",
            "norm_topk_prob": False,
            "router_bias_update_rate": 0.0,
            "n_topk_scores_per_group": 1,
            "rope_adjustments": {**YARN, "beta_fast": 16.0},
        },
        False,
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        {
            **LATENT,
            "n_topk_scores_per_group": 2,
            "mlp_only_layers": [0],
            "intermediate_size": 40,
            "rope_adjustments": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
        True,
    ),
    "deepseek-v3-half": (
        "DeepseekV3ForCausalLM",
        {**MOE_OF_LITGPT, **LATENT_SIZES, "n_shared_expert": 2, "rope_adjustments": {**YARN, "mscale_all_dim": 0.7}},
        True,
    ),
    "quickstart": ("LitGPTMoEForCausalLM", {**MOE, "attention_sinks": True, "n_shared_expert": 1}, True),
    "code-moe": (
        "LitGPTMoEForCausalLM",
        {
            **MOE,
            "attention_sinks": [True, False, True],
            "n_expert": 6,
            "n_expert_groups": 3,
            "n_topk_groups": 2,
            "n_topk_scores_per_group": 2,
            "routed_scaling_factor": 1.7,
            "rope_adjustments": YARN,
            "sliding_window_size": 9,
            "sliding_window_indices": [0, 1, 1],
        },
        True,
    ),
    "gpt-moe": (
        "LitGPTMoEForCausalLM",
        {**SOFTMAX, **LEARNED, "bias": True, "mlp_activation": "gelu", "gelu_approximate": "tanh"},
        True,
    ),
    "nanogpt-moe": (
        "LitGPTMoEForCausalLM",
        {**MOE, **LEARNED, "mlp_class_name": "NoisyTopKMoE", "mlp_activation": "relu", "norm_topk_prob": False},
        False,
    ),
    "partial-rotary-geglu": (
        "LitGPTMoEForCausalLM",
        {
            **MOE,
            "mlp_activation": "geglu",
            "gelu_approximate": "tanh",
            "attention_scores_scalar": 7,
            "router_bias": True,
            "expert_gate_on_input": True,
            "clip_qkv": 1.5,
            "rotary_percentage": 0.5,
            "first_k_dense_replace": 1,
            "intermediate_size": 40,
        },
        True,
    ),
}
# One of each family of classes: dense, routed, with biases, latent attention, and the model's own code.
SOON = ("gpt2", "qwen3", "mixtral", "glm", "gpt-oss", "deepseek-v3", "quickstart", "nanogpt-moe")

# Those whose output head is tried as one table with the embeddings besides: a class of each kind, and one without.
TIED = ("gpt2", "llama", "qwen3", "mixtral", "qwen3-moe", "qwen2-moe", "ernie", "quickstart", "glm")


def make_checkpoint(folder: Path, settings: dict[str, Any], biased: bool, tied: bool = False) -> GPT:
    """Write a checkpoint with random weights, every bias and sink nonzero, and return its model in float32.

    Args:
        folder: The new directory.
        settings: Of the model.
        biased: Whether balancing biases distinguish experts.
        tied: Whether output head and token embeddings are one table.
    """
    torch.manual_seed(0)
    config = Config(**settings)
    model = GPT(config)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.3) if biased else buffer.zero_()
    folder.mkdir(parents=True)
    save_config(config, folder)
    torch.save(model.state_dict(), folder / "lit_model.pth")
    return model.eval()
