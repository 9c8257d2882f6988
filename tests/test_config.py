"""Every wrong setting is refused when the configuration is made, with the field, the value and the remedy."""

import re

import pytest
from litgpt import Config
from litgpt.model import GPT, LLaMAMLP

from litgpt_moe_ext.model_size import count_parameters
from litgpt_moe_ext.moe.layer import NoisyTopKMoE, SharedExpertMoE
from tests.models import moe_config, noisy_config

GROUPS = {"n_expert_groups": 4, "n_topk_groups": 1, "n_topk_scores_per_group": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_expert": 0}, "n_expert: 0 must be an integer of at least 1"),
        ({"n_expert": True}, "n_expert: True must be an integer"),
        ({"n_expert_per_token": 0}, "n_expert_per_token: 0 must be an integer from 1 to 8"),
        ({"n_expert_per_token": 9}, "n_expert_per_token: 9 must be an integer from 1 to 8"),
        ({"n_shared_expert": -1}, "n_shared_expert: -1 must be an integer of at least 0"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size: None must be set"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: 0 must be an integer of at least 1"),
        ({**GROUPS, "n_expert_groups": 3}, r"n_expert_groups: 3 must divide n_expert: 8; choose one of \[2, 4, 8\]"),
        ({**GROUPS, "n_expert_groups": 1}, "n_expert_groups: 1 must be an integer of at least 2"),
        ({**GROUPS, "n_topk_groups": None}, "n_topk_groups: None must be an integer from 1 to 4"),
        ({**GROUPS, "n_topk_groups": 5}, "n_topk_groups: 5 must be an integer from 1 to 4"),
        ({**GROUPS, "n_topk_scores_per_group": 3}, "n_topk_scores_per_group: 3 must be an integer from 1 to 2"),
        ({**GROUPS, "n_topk_scores_per_group": None}, "n_topk_scores_per_group: None must be"),
        (
            {**GROUPS, "n_expert_per_token": 3},
            "n_expert_per_token: 3 is more than the 1 chosen groups of 2 experts hold; use at most 2",
        ),
        ({"n_topk_groups": 2}, "n_topk_groups: 2 would be ignored because n_expert_groups is not set"),
        ({"router_score_function": "relu"}, "router_score_function: 'relu' is unknown; choose from sigmoid, softmax"),
        ({"router_bias_update_rate": -0.1}, "router_bias_update_rate: -0.1 must be a number of at least 0"),
        ({"router_bias_update_rate": float("nan")}, "router_bias_update_rate: nan must be"),
        (
            {"gelu_approximate": "tanh"},
            "gelu_approximate: 'tanh' would be ignored because mlp_activation is swiglu",
        ),
        ({"router_load_loss_coef": 0.1}, "router_load_loss_coef: 0.1 would be ignored"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace: 3 must be an integer from 0 to 2"),
        ({"first_k_dense_replace": 1}, "intermediate_size: None must be set because first_k_dense_replace is 1"),
        ({"attention_sinks": True}, "attention_sinks: True would be ignored because attention_class_name is not set"),
        ({"attention_class_name": "Sink"}, "attention_class_name: 'Sink' is unknown; choose from SinkAttention"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_config(**changes)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"router_bias_update_rate": 0.001}, "router_bias_update_rate: 0.001"),
        ({"router_score_function": "softmax"}, "router_score_function: 'softmax'"),
        (GROUPS, "n_expert_groups: 4"),
        ({"norm_topk_prob": True}, "norm_topk_prob: True"),
        ({"n_expert_per_token": 9}, "n_expert_per_token: 9"),
        ({"router_load_loss_coef": -1}, "router_load_loss_coef: -1"),
    ],
    ids=str,
)
def test_refused_by_the_noisy_router(changes, field):
    with pytest.raises(ValueError, match=re.escape(field)):
        noisy_config(**changes)


@pytest.mark.parametrize("name", ["LLaMAMLP", "LLaMAMoE", "GptNeoxMLP"])
@pytest.mark.parametrize("field", [{"router_score_function": "sigmoid"}, {"router_bias_update_rate": 0.1}])
def test_other_classes_refuse_router_settings(name, field):
    with pytest.raises(ValueError, match=f"would be ignored because mlp_class_name: {name} has no such setting"):
        moe_config(mlp_class_name=name, intermediate_size=16, **field)


def test_unknown_class_is_named():
    with pytest.raises(ValueError, match="mlp_class_name: 'SharedExprtMoE' is unknown; choose from .*SharedExpertMoE"):
        moe_config(mlp_class_name="SharedExprtMoE")


def test_defaults_of_the_classes():
    config = moe_config()
    assert (config.router_score_function, config.router_bias_update_rate) == ("sigmoid", 0.001)
    config = noisy_config()
    assert (config.router_score_function, config.router_bias_update_rate) == (None, None)
    assert (config.router_importance_loss_coef, config.router_load_loss_coef) == (0.1, 0.1)
    assert moe_config(moe_intermediate_size=None, intermediate_size=20).moe_intermediate_size == 20


def test_classes_are_found_by_name():
    assert moe_config().mlp_class is SharedExpertMoE
    assert noisy_config().mlp_class is NoisyTopKMoE


@pytest.mark.parametrize("make", [moe_config, noisy_config])
def test_leading_dense_layers(make):
    model = GPT(make(first_k_dense_replace=1, intermediate_size=24))
    assert isinstance(model.transformer.h[0].mlp, LLaMAMLP)
    assert model.transformer.h[0].mlp.fc_1.out_features == 24
    assert isinstance(model.transformer.h[1].mlp, (SharedExpertMoE, NoisyTopKMoE))


def test_subclasses_know_the_fields():
    from litgpt.lora import Config as LoraConfig

    assert LoraConfig(**vars_of(moe_config(router_bias_update_rate=0.5)), lora_r=4).router_bias_update_rate == 0.5


def vars_of(config: Config) -> dict:
    from dataclasses import fields

    return {field.name: getattr(config, field.name) for field in fields(config)}


def test_lora_says_that_it_cannot():
    from litgpt.lora import GPT as LoraGPT
    from litgpt.lora import Config as LoraConfig

    config = LoraConfig(
        **vars_of(moe_config(mlp_class_name="LLaMAMLP", intermediate_size=8, attention_class_name="SinkAttention"))
    )
    with pytest.raises(ValueError, match="attention_class_name: 'SinkAttention' cannot be combined with litgpt.lora"):
        LoraGPT(config)


@pytest.mark.parametrize("make", [moe_config, noisy_config])
def test_parameter_counts_by_hand(make):
    config = make(n_shared_expert=1, first_k_dense_replace=1, intermediate_size=24)
    embeddings = 2 * 64 * 16
    attention = 16 * (16 + 8 + 8) + 16 * 16
    norms = 2 * 16
    expert, dense = 3 * 16 * 12, 3 * 16 * 24
    router = 8 * 16 * (2 if make is noisy_config else 1)
    common = embeddings + 2 * (attention + norms) + 16 + dense + router + expert
    assert count_parameters(config) == (common + 8 * expert, common + 2 * expert)


def test_parameter_counts_of_litgpts_classes():
    dense = moe_config(mlp_class_name="LLaMAMLP", intermediate_size=8)
    assert count_parameters(dense).total == count_parameters(dense).active
    routed = moe_config(mlp_class_name="LLaMAMoE")
    assert count_parameters(routed).total - count_parameters(routed).active == 2 * 6 * 3 * 16 * 12
