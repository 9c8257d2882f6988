"""Which class of transformers and which graph of llama.cpp one difference leaves, each of them silent about it."""

from typing import Any

import pytest
import torch
from litgpt import Config

from litgpt_moe_ext.export.architecture import choose
from litgpt_moe_ext.export.facts import facts_of
from litgpt_moe_ext.export.gguf.architectures import GRAPHS
from litgpt_moe_ext.export.hf.architectures import ARCHITECTURES
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


def test_a_balancing_bias_counts_where_it_distinguishes_experts():
    settings = CASES["mixtral"][1]
    assert chosen(settings, correction_bias=torch.tensor([1.0, 1.0])) == ("MixtralForCausalLM", "llama with experts")
    balanced = ("Ernie4_5_MoeForCausalLM", "ernie4_5-moe")
    assert chosen(settings, correction_bias=torch.tensor([0.0, 1.0])) == balanced
