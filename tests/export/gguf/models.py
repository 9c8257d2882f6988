"""The small models that some graph of llama.cpp computes."""

from typing import Any

from tests.export.hf.models import CASES, GPT_OSS, LATENT, LATENT_SIZES, MOE, MOE_OF_LITGPT, SOFTMAX, YARN

_SOFTMAX_OF_LATENT: dict[str, Any] = {
    **MOE_OF_LITGPT,
    **LATENT_SIZES,
    "n_shared_expert": 2,
    "norm_eps": 1e-5,
    "rope_interleave": True,
    "router_score_function": "softmax",
    "norm_topk_prob": False,
    "router_bias_update_rate": 0.0,
}

# Name of a case: the graph, the settings, and whether the balancing bias distinguishes experts.
GRAPH_CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "gpt2": ("gpt2", CASES["gpt2"][1], False),
    "gpt2-without-biases": ("gpt2", {**CASES["gpt2"][1], "bias": False}, False),
    "llama-yarn": ("llama", CASES["llama"][1], False),
    "llama-biased-llama3": (
        "llama",
        {
            **CASES["llama"][1],
            "bias": True,
            "rope_adjustments": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_seq_len": 16,
            },
        },
        False,
    ),
    "qwen3": ("qwen3", {**CASES["qwen3"][1], "rope_adjustments": {"factor": 2.0}}, False),
    "mixtral": ("llama", {**SOFTMAX, "attn_bias": True}, False),
    "qwen3-moe": ("qwen3moe", {**SOFTMAX, "norm_qk": True, "head_size": 16}, False),
    "qwen2-moe": ("qwen2moe", CASES["qwen2-moe"][1], False),
    "olmoe": (
        "olmoe",
        {**SOFTMAX, "norm_qk": True, "norm_qk_type": "olmo2", "n_query_groups": 4, "norm_topk_prob": False},
        False,
    ),
    "ernie": (
        "ernie4_5-moe",
        {**CASES["ernie"][1], "n_shared_expert": 1, "rope_adjustments": {**YARN, "attention_factor": 1.3}},
        True,
    ),
    "glm": ("glm4moe", {**CASES["glm"][1], "head_size": 16, "rotary_percentage": 0.5}, True),
    "deepseek-v3": ("deepseek2", CASES["deepseek-v3"][1], True),
    "deepseek-v3-half": ("deepseek2", CASES["deepseek-v3-half"][1], True),
    "deepseek-plain-rope": ("deepseek2", {**LATENT, "n_topk_scores_per_group": 2}, True),
    "deepseek-softmax": ("deepseek2", _SOFTMAX_OF_LATENT, False),
    "deepseek-softmax-yarn": ("deepseek2", {**_SOFTMAX_OF_LATENT, "rope_adjustments": YARN}, False),
    "deepseek-as-one-factor": (
        "deepseek2",
        {**_SOFTMAX_OF_LATENT, "rope_adjustments": {**YARN, "mscale_all_dim": 1.0}},
        False,
    ),
    "gpt-oss": (
        "gpt-oss",
        {**GPT_OSS, "sliding_window_size": 9, "sliding_window_indices": [1, 0, 1], "rope_adjustments": YARN},
        False,
    ),
    "gpt-oss-without-router-bias": ("gpt-oss", {**GPT_OSS, "router_bias": None}, False),
    "quickstart-without-sinks": ("glm4moe", {**MOE, "n_shared_expert": 2, "norm_qk": True}, True),
}
