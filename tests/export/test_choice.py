"""Which class of transformers and which graph of llama.cpp one difference leaves, each of them silent about it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from litgpt import Config

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.architecture import choose
from litgpt_moe_ext.export.facts import facts_of
from litgpt_moe_ext.export.gguf.architectures import GRAPHS
from litgpt_moe_ext.export.hf.architectures import ARCHITECTURES
from litgpt_moe_ext.moe.activations import Pointwise
from litgpt_moe_ext.moe.registry import ACTIVATIONS, ActivationType
from tests.export.hf.models import CASES, YARN

OWN = "LitGPTMoEForCausalLM"
DENSE_LAYER = {"intermediate_size": 40}
CHOICES: list[tuple[str, dict[str, Any], str | None, str | None]] = [
    ("mixtral", {}, "MixtralForCausalLM", "llama with experts"),
    ("mixtral", {"head_size": 16}, "MixtralForCausalLM", "llama with experts"),
    ("mixtral", {"attention_scores_scalar": 12}, "MixtralForCausalLM", "llama with experts"),
    ("mixtral", {"attention_scores_scalar": 9}, OWN, None),
    ("mixtral", {"attention_sinks": True}, OWN, None),
    ("mixtral", {"attn_bias": True}, OWN, "llama with experts"),
    ("mixtral", {"bias": True}, OWN, None),
    ("mixtral", {"clip_qkv": 1.0}, OWN, None),
    ("mixtral", {"expert_gate_on_input": True}, OWN, None),
    ("mixtral", {"lm_head_bias": True}, OWN, None),
    ("mixtral", {"mlp_activation": "geglu"}, OWN, None),
    ("mixtral", {"mlp_only_layers": [0], **DENSE_LAYER}, "Ernie4_5_MoeForCausalLM", "ernie4_5-moe"),
    ("mixtral", {"mlp_only_layers": [1], **DENSE_LAYER}, OWN, None),
    ("mixtral", {"n_shared_expert": 1}, "Ernie4_5_MoeForCausalLM", "ernie4_5-moe"),
    ("mixtral", {"n_shared_expert": 2, "shared_expert_intermediate_size": 28}, OWN, "ernie4_5-moe"),
    ("mixtral", {"norm_class_name": "LayerNorm"}, OWN, None),
    ("mixtral", {"norm_qk": True}, "Qwen3MoeForCausalLM", "qwen3moe"),
    ("mixtral", {"norm_topk_prob": False}, OWN, None),
    ("mixtral", {"rope_adjustments": {**YARN, "truncate": False}}, "MixtralForCausalLM", None),
    ("mixtral", {"rope_interleave": True}, OWN, None),
    ("mixtral", {"rotary_percentage": 0.5}, OWN, None),
    ("mixtral", {"routed_scaling_factor": 2.0}, OWN, None),
    ("mixtral", {"router_bias": True}, OWN, None),
    ("mixtral", {"router_score_function": "sigmoid"}, OWN, None),
    ("mixtral", {"sliding_window_size": 9}, "MixtralForCausalLM", None),
    ("mixtral", {"sliding_window_size": 9, "sliding_window_indices": [1, 0, 1]}, OWN, None),
    ("llama", {"attn_bias": True}, OWN, "llama"),
    ("llama", {"bias": True}, "LlamaForCausalLM", "llama"),
    ("llama", {"lm_head_bias": True}, OWN, None),
    ("llama", {"norm_qk": True}, "Qwen3ForCausalLM", "qwen3"),
    ("llama", {"sliding_window_size": 9}, OWN, None),
    ("qwen3", {"attn_bias": True}, OWN, None),
    ("gpt2", {"attention_scores_scalar": 9}, OWN, None),
    ("gpt2", {"attention_sinks": True}, OWN, None),
    ("gpt2", {"clip_qkv": 1.0}, OWN, None),
    ("gpt2", {"gelu_approximate": "none"}, "GPT2LMHeadModel", None),
    ("gpt2", {"gelu_approximate": "none", "mlp_activation": "relu2"}, OWN, None),
    ("gpt2", {"head_size": 16}, OWN, None),
    ("gpt2", {"lm_head_bias": True}, OWN, None),
    ("gpt2", {"n_query_groups": 2}, OWN, None),
    ("gpt2", {"norm_class_name": "RMSNorm"}, OWN, None),
    ("gpt2", {"norm_qk": True}, OWN, None),
    ("gpt2", {"sliding_window_size": 9}, OWN, None),
    ("olmoe", {"head_size": 16}, OWN, None),
    ("olmoe", {"norm_topk_prob": False}, "OlmoeForCausalLM", None),
    ("olmoe", {"norm_topk_prob": False, "n_query_groups": 4}, "OlmoeForCausalLM", "olmoe"),
    ("ernie", {"attn_bias": True}, OWN, None),
    ("ernie", {"bias": True}, OWN, None),
    ("ernie", {"norm_topk_prob": False}, OWN, None),
    ("glm", {"attn_bias": True}, "Glm4MoeForCausalLM", "glm4moe"),
    ("glm", {"bias": True}, OWN, None),
    ("glm", {"n_shared_expert": None}, OWN, None),
    ("glm", {"n_topk_scores_per_group": 1}, OWN, None),
    ("glm", {"norm_qk": True}, "Glm4MoeForCausalLM", "glm4moe"),
    ("glm", {"rotary_percentage": 0.5}, "Glm4MoeForCausalLM", "glm4moe"),
    ("gpt-oss", {"attention_sinks": [True, False, True]}, OWN, None),
    ("gpt-oss", {"mlp_activation": "swiglu"}, OWN, None),
    ("gpt-oss", {"norm_topk_prob": False}, OWN, None),
    ("qwen2-moe", {}, "Qwen2MoeForCausalLM", "qwen2moe"),
    ("qwen2-moe", {"head_size": 16}, OWN, None),
    ("deepseek-v2", {"norm_topk_prob": True}, None, None),
    ("deepseek-v2", {"rope_adjustments": {**YARN, "mscale_all_dim": 0.7}}, None, None),
    ("deepseek-v3", {"n_shared_expert": 1, "shared_expert_intermediate_size": 28}, None, None),
    ("deepseek-v3", {"n_topk_scores_per_group": 1}, None, None),
    ("deepseek-v3", {"norm_eps": 1e-5}, None, "deepseek2"),
]


def chosen(settings: dict[str, Any], **state: torch.Tensor) -> tuple[str | None, str | None]:
    facts = facts_of(Config(**settings), state)
    return tuple(found and found.class_name for found, _ in (choose(facts, table) for table in (ARCHITECTURES, GRAPHS)))


@pytest.mark.parametrize(("base", "change", "cls", "graph"), CHOICES, ids=lambda value: str(value)[:60])
def test_one_difference(base, change, cls, graph):
    assert chosen({**CASES[base][1], **change}) == (cls, graph)


DENSE = {**CASES["llama"][1], **dict.fromkeys(("attention_class_name", "attention_sinks", "rope_adjustments"))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel_residual": True}, "parallel_residual: True must be false for an export"),
        ({"parallel_residual": True, "shared_attention_norm": True}, "parallel_residual: True must be false"),
        ({"post_attention_norm": True}, "post_attention_norm: True must be false"),
        ({"post_mlp_norm": True}, "post_mlp_norm: True must be false"),
        ({"norm_1": False}, "norm_1: False must be true"),
        ({"norm_2": False}, "norm_2: False must be true"),
        ({"scale_embeddings": True}, "scale_embeddings: True must be false"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 must be null"),
        ({"attention_logit_softcapping": 50.0}, "attention_logit_softcapping: 50.0 must be null"),
        ({"rope_local_base_freq": 1000.0, "rope_indices": [0, 1, 0]}, "rope_local_base_freq: 1000.0 must be null"),
        ({"rope_condense_ratio": 2}, "rope_condense_ratio: 2 must be 1"),
        ({"mlp_class_name": "GemmaMLP"}, "mlp_class_name: GemmaMLP must be one of .*, LLaMAMLP, "),
        ({"rotary_percentage": 0.75, "head_size": 4}, "rotary_percentage: 3 rotated elements must be even"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_what_no_format_expresses_is_refused(change, message):
    """Weights of the same names and shapes as without it, which would compute something else there."""
    with pytest.raises(SettingsError, match=rf"^model_config\.{message}"):
        chosen({**DENSE, "mlp_class_name": "LLaMAMLP", **change})


def test_a_dynamic_base_is_refused():
    """Of which classes disagree on the length that chooses it."""
    dynamic = {"dynamic": True, "factor": 4.0, "original_max_seq_len": 16}
    with pytest.raises(SettingsError, match=r"^model_config\.rope_adjustments\.dynamic: true must be left out"):
        chosen({**CASES["llama"][1], "rope_adjustments": dynamic})


def test_an_extensions_activation_is_refused(monkeypatch):
    """No class has its code, and the code that an export may bring has only this package's own."""
    monkeypatch.setitem(ACTIVATIONS, "mishglu", ActivationType(Pointwise(F.mish), gated=True))
    with pytest.raises(SettingsError, match=r"^model_config\.mlp_activation: mishglu must be one of swiglu, .*export$"):
        chosen({**CASES["mixtral"][1], "mlp_activation": "mishglu"})


def test_a_balancing_bias_counts_where_it_distinguishes_experts():
    settings = CASES["mixtral"][1]
    assert chosen(settings, correction_bias=torch.tensor([1.0, 1.0])) == ("MixtralForCausalLM", "llama with experts")
    balanced = ("Ernie4_5_MoeForCausalLM", "ernie4_5-moe")
    assert chosen(settings, correction_bias=torch.tensor([0.0, 1.0])) == balanced
