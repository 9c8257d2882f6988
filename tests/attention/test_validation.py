"""Every mistake in a configuration gives an error that names the field, the value and the remedy."""

import sys
from typing import Any

import pytest

from litgpt_moe_ext.config.rope import rope_kind, validate_rope_adjustments
from tests.models import attention_config
from tests.runs import run_command

DYNAMIC = {"factor": 2.0, "original_max_seq_len": 64, "dynamic": True}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_seq_len": 64}


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (None, "plain"),
        ({}, "plain"),
        ({"factor": 2}, "linear"),
        ({"factor": 2, "attention_factor": None}, "linear"),
        (LLAMA3, "llama3"),
        (YARN, "yarn"),
        ({"factor": 4.0, "original_max_seq_len": 64, "truncate": False}, "yarn"),
        ({**YARN, "mscale": 0, "mscale_all_dim": 1.0, "attention_factor": 1.3}, "yarn"),
    ],
)
def test_accepted_adjustments(keys: dict[str, Any] | None, kind: str) -> None:
    validate_rope_adjustments(keys)
    assert rope_kind(keys) == kind


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([4.0], r"rope_adjustments: \[4.0\] must be a dictionary"),
        ({"facotr": 4.0}, r"rope_adjustments\.facotr: 4\.0 is an unknown key; known keys are factor"),
        ({"factor": 4.0, "rope_type": "yarn"}, r"rope_type: 'yarn' is an unknown key; remove it"),
        ({"factor": 4.0, "original_max_position_embeddings": 8}, "LitGPT calls it original_max_seq_len"),
        ({**LLAMA3, "dynamic": True}, r"\.dynamic: True does not go with low_freq_factor, high_freq_factor; remove"),
        ({**DYNAMIC, "beta_fast": 32}, r"\.dynamic: True does not go with beta_fast; remove either"),
        ({**LLAMA3, "beta_fast": 32}, r"mixes Llama-3 keys .* with YaRN keys \(beta_fast\); keep one set"),
        ({"factor": 4.0, "original_max_seq_len": 8}, "original_max_seq_len: 8 does not say how to rescale"),
        ({"factor": 4.0, "low_freq_factor": 1.0}, "lacks high_freq_factor, original_max_seq_len; Llama-3"),
        ({"factor": 4.0, "beta_fast": 32}, "lacks original_max_seq_len; YaRN"),
        ({"original_max_seq_len": 8, "beta_slow": 1}, "lacks factor; YaRN"),
        ({"factor": 0.5}, r"rope_adjustments\.factor: 0\.5 must be a number of at least 1"),
        ({"factor": "1e1"}, r"rope_adjustments\.factor: '1e1' must be a number of at least 1 \(YAML"),
        ({"factor": True}, "factor: True must be a number"),
        ({"factor": float("nan")}, "factor: nan must be a number"),
        ({**YARN, "beta_fast": 1.0}, r"beta_fast: 1\.0 must be greater than beta_slow \(1\.0\)"),
        ({**YARN, "beta_fast": None, "beta_slow": 40}, r"beta_fast: 32 must be greater than beta_slow \(40\)"),
        ({**YARN, "truncate": "no"}, "truncate: 'no' must be true or false"),
        ({**YARN, "truncate": None}, "truncate: null must be true or false"),
        ({**YARN, "attention_factor": 0}, "attention_factor: 0 must be a number above 0"),
        ({**YARN, "mscale": -1}, "mscale: -1 must be a number of at least 0"),
        ({**YARN, "original_max_seq_len": 0}, "original_max_seq_len: 0 must be a number above 0"),
        ({**LLAMA3, "high_freq_factor": 1}, r"high_freq_factor: 1 must be greater than low_freq_factor \(1\.0\)"),
    ],
)
def test_refused_adjustments(keys: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate_rope_adjustments(keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention_logit_softcapping": 50.0},
            "attention_logit_softcapping: 50.0 must be null",
        ),
        ({"sliding_window_size": 0}, "sliding_window_size: 0 must be an integer of at least 1"),
        ({"sliding_window_size": 2.5}, "sliding_window_size: 2.5 must be an integer"),
        ({"norm_qk": True, "norm_qk_type": "olmo"}, "norm_qk_type: 'olmo' is unknown; choose from default, olmo2"),
        ({"rope_interleave": True, "rotary_percentage": 0.375}, "rope_interleave: True needs an even number.* gives 3"),
        ({"attention_scores_scalar": 0}, "attention_scores_scalar: 0 must be a number above 0"),
        ({"rope_condense_ratio": 0}, "rope_condense_ratio: 0 must be a number above 0"),
        ({"rope_base": 1}, "rope_base: 1 must be a number above 1"),
        ({"rope_local_base_freq": 0.5}, "rope_local_base_freq: 0.5 must be a number above 1"),
        ({"rope_adjustments": {"factor": 0.5}}, r"rope_adjustments\.factor: 0\.5 must be a number of at least 1"),
        (
            {
                "rotary_percentage": 0.25,
                "rope_adjustments": {"factor": 2.0, "original_max_seq_len": 8, "dynamic": True},
            },
            "rope_adjustments.dynamic: True needs more than two rotated elements, but rotary_percentage: 0.25 of "
            "head_size: 8 gives 2",
        ),
        ({"attention_sinks": [True]}, "attention_sinks: .* must be true or false, or a list of 2"),
        ({"attention_sinks": "yes"}, "attention_sinks: 'yes' must be true or false"),
        (
            {
                "n_query_groups": 4,
                "latent_attention": {
                    "q_lora_rank": 8,
                    "kv_lora_rank": 8,
                    "qk_rope_head_dim": 4,
                    "qk_nope_head_dim": 4,
                    "v_head_dim": 8,
                },
            },
            "latent_attention: .* must be null",
        ),
    ],
)
def test_refused_configurations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_config(**changes)
    # LitGPT's own attention is none of the extension's business.
    attention_config(attention_class_name=None, **{k: v for k, v in changes.items() if k != "attention_sinks"})


def test_validation_imports_neither_torch_nor_litgpt() -> None:
    code = (
        "import sys\n"
        "from litgpt_moe_ext.config.rope import validate_rope_adjustments\n"
        "from litgpt_moe_ext.config.rules import resolve\n"
        "validate_rope_adjustments({'factor': 2.0})\n"
        "assert not {'torch', 'litgpt', 'numpy'} & set(sys.modules)"
    )
    run_command(sys.executable, "-c", code)


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_adjustments": YARN}, r"rope_adjustments: .* \(yarn\) .* set attention_class_name: SinkAttention"),
        ({"rope_adjustments": {"factor": 2.0, "dynamic": True, "original_max_seq_len": 64}}, r"\(dynamic\)"),
        ({"rope_adjustments": {**LLAMA3, "truncate": False}}, "mixes Llama-3 keys"),
        ({"rope_adjustments": {"facktor": 2.0}}, "rope_adjustments.facktor: 2.0 is an unknown key"),
        ({"latent_attention": {**LATENT, "kv_rank": 8}}, "latent_attention: .* must be a dictionary with the keys"),
        (
            {"latent_attention": {**LATENT, "q_lora_rank": None}},
            "latent_attention.q_lora_rank: null must be an integer",
        ),
        ({"latent_attention": {**LATENT, "qk_rope_head_dim": 3}}, "latent_attention.qk_rope_head_dim: 3 must be even"),
        ({"latent_attention": LATENT, "norm_qk": True}, "norm_qk: True would be ignored because latent_attention"),
        (
            {"latent_attention": LATENT, "sliding_window_size": 8},
            "sliding_window_size: 8 would be ignored because latent",
        ),
        (
            {"latent_attention": LATENT, "rope_local_base_freq": 100.0},
            "rope_local_base_freq: 100.0 would be ignored because latent",
        ),
        ({"latent_attention": LATENT, "attention_sinks": True}, "attention_sinks: True would be ignored"),
    ],
)
def test_litgpts_attention_beside_layers_of_the_package(changes: dict[str, Any], message: str) -> None:
    """LitGPT reads what it knows and says nothing about the rest."""
    with pytest.raises(ValueError, match=message):
        attention_config(
            **{"attention_class_name": None, "mlp_class_name": "FeedForward", "intermediate_size": 8, **changes}
        )


def test_latent_attention_has_hugging_faces_tables() -> None:
    import torch
    from litgpt import GPT

    from litgpt_moe_ext.attention.rope import rope_frequencies

    settings = {
        "attention_class_name": None,
        "n_query_groups": 4,
        "latent_attention": LATENT,
        "rope_adjustments": YARN,
    }
    cos = GPT(attention_config(mlp_class_name="FeedForward", intermediate_size=8, **settings)).cos
    frequency_F, factor = rope_frequencies(4, 10000, YARN)
    angle = torch.outer(torch.arange(len(cos)).float(), frequency_F).repeat(1, 2)
    torch.testing.assert_close(cos, angle.cos() * factor)
    # A model of LitGPT's own classes is left alone.
    other = GPT(attention_config(**settings)).cos
    assert not torch.allclose(other, cos)
