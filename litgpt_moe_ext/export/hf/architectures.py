"""The table of classes: what each can express, and how its `config.json` expresses it.

The first class that can express every fact of a model is chosen; if there is none, `modeling_litgpt_moe.py` goes with
the weights.
"""

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.architecture import Architecture, choose, nearest
from litgpt_moe_ext.export.facts import Facts
from litgpt_moe_ext.export.families import BALANCED, GLM, GPT2, GPT2_BIASES, GPT_OSS, LATENT, LLAMA_LIKE, SOFTMAX
from litgpt_moe_ext.export.hf import config_json, names

_DENSE = LLAMA_LIKE | {"layers": ("dense",)}
_DEEPSEEK = SOFTMAX | LATENT | {"latent_norm_eps": (True,)}
_QWEN_LAYERS = ("moe", "mixed", "alternating")

# The entries of `config.json` by their parts.
_MOE = (config_json.llama, config_json.moe_sizes)
_QWEN_MOE = (*_MOE, config_json.qwen_layers, config_json.no_window)
_LATENT = (*_MOE, config_json.glm, config_json.latent)

ARCHITECTURES = (
    Architecture("GPT2LMHeadModel", "gpt2", GPT2, (config_json.gpt2,), names.GPT2, GPT2_BIASES),
    Architecture(
        "LlamaForCausalLM",
        "llama",
        _DENSE | {"attention_bias": ("none", "all"), "mlp_bias": (False, True)},
        (config_json.llama, lambda facts: {"mlp_bias": facts.mlp_bias}),
        names.LLAMA,
    ),
    Architecture(
        "Qwen3ForCausalLM",
        "qwen3",
        _DENSE | {"qk_norm": ("head",)},
        (config_json.llama, config_json.no_window),
        names.LLAMA,
    ),
    Architecture(
        "MixtralForCausalLM",
        "mixtral",
        SOFTMAX | {"layers": ("moe",), "window": ("none", "all")},
        (*_MOE, config_json.mixtral),
        names.MIXTRAL,
    ),
    Architecture(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        SOFTMAX | {"layers": _QWEN_LAYERS, "qk_norm": ("head",), "norm_topk": (True, False)},
        _QWEN_MOE,
        names.LLAMA,
    ),
    Architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        SOFTMAX
        | {
            "layers": _QWEN_LAYERS,
            "attention_bias": ("qkv",),
            "norm_topk": (True, False),
            "shared": ("gated",),
            "free_head_size": (False,),
        },
        (*_QWEN_MOE, lambda facts: {"shared_expert_intermediate_size": facts.shared_width}),
        names.QWEN2_MOE,
    ),
    Architecture(
        "OlmoeForCausalLM",
        "olmoe",
        SOFTMAX
        | {
            "layers": ("moe",),
            "clipped": (True, False),
            "qk_norm": ("whole",),
            "norm_topk": (True, False),
            "free_head_size": (False,),
        },
        (*_MOE, config_json.olmoe),
        names.LLAMA,
        ties=False,
        # vLLM's class reads neither entry.
        vllm={"clipped": (False,), "norm_topk": (False,)},
    ),
    Architecture(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        SOFTMAX | {"layers": ("moe", "mixed"), "balancing_bias": (True, False), "shared": ("none", "plain")},
        (config_json.llama, config_json.ernie),
        names.ERNIE,
        rotates_neighbours=True,
        # vLLM ignores the bias on CPUs.
        vllm={"balancing_bias": (False,)},
    ),
    Architecture("Glm4MoeForCausalLM", "glm4_moe", SOFTMAX | GLM, (*_MOE, config_json.glm), names.DEEPSEEK, ties=False),
    Architecture(
        "GptOssForCausalLM",
        "gpt_oss",
        SOFTMAX | GPT_OSS,
        (*_MOE, config_json.gpt_oss),
        names.GPT_OSS,
        ("mlp.gate.bias",),
        ties=False,
        vllm={"rope": ("yarn",)},
    ),
    Architecture(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        # transformers 4 ignores YaRN's scale of the scores.
        _DEEPSEEK | {"scaled_by_yarn": (False,), "norm_topk": (False,), "groups": ("none", "best_one")},
        (*_LATENT, config_json.deepseek_v2),
        names.LLAMA,
        rotates_neighbours=True,
        ties=False,
    ),
    Architecture(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        _DEEPSEEK | BALANCED,
        (*_LATENT, config_json.deepseek_v3),
        names.DEEPSEEK,
        rotates_neighbours=True,
        ties=False,
    ),
    Architecture(
        "LitGPTMoEForCausalLM",
        "litgpt_moe",
        {"attention": ("grouped",), "activation": ("swiglu",), "mlp_bias": (False,), "gate_on_input": (False,)},
        (config_json.own,),
        names.OWN,
    ),
    Architecture(
        "LitGPTMoEForCausalLM", "litgpt_moe", {"attention": ("grouped",)}, (config_json.own,), names.OWN_PLAIN
    ),
)


def choose_class(facts: Facts) -> tuple[Architecture, dict[str, list[str]]]:
    """Return the class of transformers, or ours, that computes a model, and what each one before it lacks.

    Raises:
        SettingsError: If none does.
    """
    architecture, rejected = choose(facts, ARCHITECTURES)
    if architecture is None:
        raise SettingsError(f"format: hf: no class of transformers computes this model ({nearest(rejected)})")
    return architecture, rejected
