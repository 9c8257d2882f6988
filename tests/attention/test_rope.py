"""Rotary tables against Hugging Face's rules and LitGPT's table layout."""

import itertools
import math
from typing import Any

import litgpt.model
import pytest
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from litgpt_moe_ext.attention.rope import build_rope_cache, rope_frequencies
from tests.models import attention_config


def hugging_face(kind: str, n_elem: int, base: float, keys: dict[str, Any]) -> tuple[torch.Tensor, float]:
    scaling = {"rope_type": kind, **keys}
    if "original_max_seq_len" in scaling:
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len")
    config = PretrainedConfig(
        rope_theta=base,
        rope_scaling=scaling,
        head_dim=2 * n_elem,
        hidden_size=4 * n_elem,
        num_attention_heads=2,
        partial_rotary_factor=0.5,
        max_position_embeddings=64,
    )
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


def assert_same_rule(kind: str, n_elem: int, base: float, keys: dict[str, Any]) -> None:
    frequency, attention_factor = rope_frequencies(n_elem, base, keys)
    expected_frequency, expected_factor = hugging_face(kind, n_elem, base, keys)
    torch.testing.assert_close(frequency, expected_frequency, rtol=1e-6, atol=0.0)
    assert attention_factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("n_elem", [2, 8, 30, 64, 128])
@pytest.mark.parametrize("base", [100, 10000, 150000, 1e6])
def test_yarn_equals_hugging_face(n_elem: int, base: float) -> None:
    factors = [1, 1.5, 4.0, 32]
    lengths = [6, 16, 4096, 2**20]  # in 6 positions nothing turns once, in 2**20 everything often where the base is 100
    betas = [{}, {"beta_fast": 32.0, "beta_slow": 1.0}, {"beta_fast": 8, "beta_slow": 2.5}]
    truncates = [{"truncate": True}, {"truncate": False}]
    for factor, length, beta, truncate in itertools.product(factors, lengths, betas, truncates):
        assert_same_rule("yarn", n_elem, base, {"factor": factor, "original_max_seq_len": length, **beta, **truncate})


@pytest.mark.parametrize(
    "keys",
    [
        {"attention_factor": 1.25},
        {"mscale": 1.0},
        {"mscale_all_dim": 0.8},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.707, "mscale_all_dim": 1.2},
        {"mscale": 0.707, "mscale_all_dim": 0},
        {"mscale": 0.707, "mscale_all_dim": 1.2, "attention_factor": 0.9},
        {"attention_factor": None, "beta_fast": 16},
    ],
)
def test_yarn_attention_factor_equals_hugging_face(keys: dict[str, Any]) -> None:
    assert_same_rule("yarn", 16, 10000, {"factor": 40, "original_max_seq_len": 4096, **keys})


@pytest.mark.parametrize("factor", [1, 2.0, 7.5])
def test_linear_equals_hugging_face(factor: float) -> None:
    assert_same_rule("linear", 64, 10000, {"factor": factor})


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (2, 32)])
def test_llama3_equals_hugging_face(low: float, high: float) -> None:
    keys = {"factor": 8.0, "low_freq_factor": low, "high_freq_factor": high, "original_max_seq_len": 8192}
    assert_same_rule("llama3", 128, 500000, keys)


def test_yarn_slows_low_frequencies_and_leaves_high_ones() -> None:
    keys = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_seq_len": 4096, "truncate": False}
    frequency, attention_factor = rope_frequencies(64, 150000, keys)
    ratio = frequency / rope_frequencies(64, 150000)[0]
    assert ratio[0] == 1
    assert ratio[-1].item() == pytest.approx(1 / 32)
    assert attention_factor == pytest.approx(0.1 * math.log(32) + 1)


@pytest.mark.parametrize("rotary_percentage", [1.0, 0.5, 0.375, 0.125])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_base": 500, "rope_condense_ratio": 4},
        {"rope_adjustments": {"factor": 3.0}},
        {
            "rope_adjustments": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_seq_len": 64,
            }
        },
        {"rope_local_base_freq": 50.0},
        {"rope_local_base_freq": 50.0, "rope_adjustments": {"factor": 3.0}},
    ],
)
def test_tables_have_litgpt_layout(rotary_percentage: float, changes: dict[str, Any]) -> None:
    config = attention_config(rotary_percentage=rotary_percentage, **changes)
    cos, sin = build_rope_cache(config, 20)
    expected_cos, expected_sin = litgpt.model.build_rope_cache(
        seq_len=20,
        n_elem=config.rope_n_elem,
        base=config.rope_base,
        condense_ratio=config.rope_condense_ratio,
        extra_config=config.rope_adjustments,
        rope_local_base_freq=config.rope_local_base_freq,
    )
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos, expected_cos, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin, expected_sin, rtol=1e-6, atol=1e-6)


def test_attention_factor_multiplies_the_stretched_tables_only() -> None:
    yarn = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_seq_len": 64}
    single = build_rope_cache(attention_config(rope_adjustments=yarn), 20)
    both = build_rope_cache(attention_config(rope_adjustments=yarn, rope_local_base_freq=10000.0), 20)
    plain = build_rope_cache(attention_config(), 20)
    for single_table, both_tables, plain_table in zip(single, both, plain, strict=True):
        torch.testing.assert_close(both_tables[..., 0], single_table)
        torch.testing.assert_close(both_tables[..., 1], plain_table)
    norm = single[0] ** 2 + single[1] ** 2
    torch.testing.assert_close(norm, torch.full_like(norm, (0.1 * math.log(4) + 1) ** 2))


@pytest.mark.parametrize("kind", [{"truncate": False, "attention_factor": 1.5}, {"dynamic": True}], ids=str)
@pytest.mark.parametrize("streaming", [{}, {"streaming_cache_first": 1, "streaming_cache_window": 9}], ids=str)
def test_gpt_uses_the_tables(kind: dict[str, Any], streaming: dict[str, int]) -> None:
    """And goes on using them when it is told of shorter or longer texts."""
    config = attention_config(rope_adjustments={"factor": 4.0, "original_max_seq_len": 8, **kind}, **streaming)
    model = litgpt.model.GPT(config)
    expected_cos, expected_sin = build_rope_cache(config, 32)
    assert torch.equal(model.cos[:32], expected_cos)
    assert torch.equal(model.sin[:32], expected_sin)
    model.max_seq_length = 10
    assert torch.equal(model.cos[:10], expected_cos[:10])
    assert streaming or len(model.cos) == 10


@pytest.mark.parametrize("n_elem", [0, 1, 2])
def test_dynamic_ntk_with_a_single_frequency_changes_nothing(n_elem: int) -> None:
    """The exponent of the rule divides by the number of rotated elements minus 2."""
    adjustments = {"factor": 4.0, "original_max_seq_len": 16, "dynamic": True}
    frequencies, factor = rope_frequencies(n_elem, 10000, adjustments, seq_len=64)
    assert frequencies.tolist() == [1.0] * ((n_elem + 1) // 2)
    assert factor == 1.0


@pytest.mark.parametrize(("seq_len", "stretch"), [(64, 13.0), (16, 1.0), (8, 1.0), (None, 1.0)])
def test_dynamic_ntk_stretches_the_slowest_and_keeps_the_fastest(seq_len: int | None, stretch: float) -> None:
    """Four times the context, 4 * 64 / 16 - 3, as its authors have it; those in between follow by their powers."""
    adjustments = {"factor": 4.0, "original_max_seq_len": 16, "dynamic": True}
    found, factor = rope_frequencies(8, 10000, adjustments, seq_len=seq_len)
    plain, _ = rope_frequencies(8, 10000)
    torch.testing.assert_close(found, plain / stretch ** (torch.arange(4) / 3), rtol=1e-6, atol=0.0)
    assert factor == 1.0
