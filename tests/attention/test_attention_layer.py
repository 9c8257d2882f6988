"""The attention layer against Hugging Face's gpt-oss attention, LitGPT's own attention, and itself with a cache."""

import math
from typing import Any

import pytest
import torch
from litgpt.model import GPT, CausalSelfAttention
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from litgpt_moe_ext.attention.layer import SinkAttention
from litgpt_moe_ext.attention.rope import build_rope_cache
from tests.models import attention_config, randomize

YARN = {"factor": 8.0, "beta_fast": 4.0, "beta_slow": 1.0, "original_max_seq_len": 64, "truncate": False}
T = 12


def layer_pair(window: int | None, dtype: torch.dtype) -> tuple[SinkAttention, GptOssAttention]:
    config = attention_config(
        bias=True, rope_base=5000, rope_adjustments=YARN, sliding_window_size=window, norm_qk=False, block_size=64
    )
    ours = randomize(SinkAttention(config, 0).to(dtype), 1.0)
    scaling = {key: value for key, value in YARN.items() if key != "original_max_seq_len"}
    reference_config = GptOssConfig(
        hidden_size=config.n_embd,
        num_hidden_layers=1,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_query_groups,
        head_dim=config.head_size,
        layer_types=["full_attention"],
        rope_theta=config.rope_base,
        rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 64, **scaling},
        max_position_embeddings=512,
        attention_dropout=0.0,
    )
    reference_config._attn_implementation = "eager"
    reference = GptOssAttention(reference_config, 0).to(dtype)
    sizes = [config.n_head * config.head_size] + 2 * [config.n_query_groups * config.head_size]
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = getattr(ours.qkv, name).split(sizes)
            for projection, part in zip((reference.q_proj, reference.k_proj, reference.v_proj), parts, strict=True):
                getattr(projection, name).copy_(part)
            getattr(reference.o_proj, name).copy_(getattr(ours.proj, name))
        reference.sinks.copy_(ours.sinks)
    return ours, reference


def causal_mask(window: int | None, dtype: torch.dtype) -> torch.Tensor:
    window = window or T
    visible = torch.tensor([[i - window < j <= i for j in range(T)] for i in range(T)])
    return torch.zeros(1, 1, T, T, dtype=dtype).masked_fill(~visible, -math.inf)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_hugging_face(window: int | None, dtype: torch.dtype) -> None:
    ours, reference = layer_pair(window, dtype)
    x = torch.randn(3, T, ours.config.n_embd, dtype=dtype, requires_grad=True)
    reference_x = x.detach().clone().requires_grad_()
    half_cos, half_sin = GptOssRotaryEmbedding(reference.config)(reference_x, torch.arange(T)[None])
    if dtype == torch.float32:
        cos, sin = (table[None] for table in build_rope_cache(ours.config, T))
    else:  # Tables are float32 everywhere; share them, so that the attention itself is compared in double precision.
        cos, sin = half_cos.repeat(1, 1, 2), half_sin.repeat(1, 1, 2)

    out = ours(x, cos, sin)
    expected, _ = reference(reference_x, (half_cos, half_sin), causal_mask(window, dtype))
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout)

    actual = {"out": out, "x": x.grad, "proj.weight": ours.proj.weight.grad, "proj.bias": ours.proj.bias.grad}
    wanted = {
        "out": expected,
        "x": reference_x.grad,
        "proj.weight": reference.o_proj.weight.grad,
        "proj.bias": reference.o_proj.bias.grad,
    }
    for name in ("weight", "bias"):
        actual[f"qkv.{name}"] = getattr(ours.qkv, name).grad
        wanted[f"qkv.{name}"] = torch.cat(
            [getattr(layer, name).grad for layer in (reference.q_proj, reference.k_proj, reference.v_proj)]
        )
    actual["sinks"], wanted["sinks"] = ours.sinks.grad, reference.sinks.grad
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name, value in actual.items():
        size = wanted[name].abs().max().item()
        assert size > 0.01, name
        torch.testing.assert_close(
            value / size, wanted[name] / size, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m
        )


LITGPT_VARIANTS = [
    {},
    {"n_query_groups": 4},
    {"n_query_groups": 1, "bias": False, "attn_bias": True},
    {"rotary_percentage": 0.5},
    {"rotary_percentage": 0.375},
    {"rotary_percentage": 0.125},
    {"rope_interleave": True},
    {"rope_interleave": True, "rotary_percentage": 0.5},
    {"norm_qk": True, "norm_qk_type": "default"},
    {"norm_qk": True, "norm_qk_type": "olmo2"},
    {"norm_qk": True, "norm_class_name": "LayerNorm"},
    {"attention_scores_scalar": 3},
    {"sliding_window_size": 5},
    {"sliding_window_size": 5, "sliding_window_indices": [0, 1]},
    {"rope_adjustments": {"factor": 4.0}},
    {"rope_local_base_freq": 100.0, "rope_indices": [0, 1]},
]


@pytest.mark.parametrize("changes", LITGPT_VARIANTS, ids=str)
def test_without_sinks_equals_litgpt(changes: dict[str, Any]) -> None:
    ours = GPT(attention_config(attention_sinks=False, **changes))
    reference = GPT(attention_config(attention_class_name=None, **changes))
    assert type(ours.transformer.h[0].attn) is SinkAttention
    assert type(reference.transformer.h[0].attn) is CausalSelfAttention
    reference.load_state_dict(ours.state_dict(), strict=True)
    idx = torch.randint(40, (2, T))
    out, expected = ours(idx), reference(idx)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout)
    for (name, parameter), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)


CACHE_VARIANTS = [
    {},
    {"attention_sinks": False},
    {"sliding_window_size": 4},
    {"sliding_window_size": 4, "sliding_window_indices": [1, 0], "rope_adjustments": YARN},
    {"sliding_window_size": 4, "attention_sinks": False, "n_query_groups": 4},
    {"n_query_groups": 1, "rotary_percentage": 0.5, "norm_qk": True},
    {"rotary_percentage": 0.125, "sliding_window_size": 4},
    {"rope_interleave": True},
]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("prompt", [1, 3, 9])
@pytest.mark.parametrize("changes", CACHE_VARIANTS, ids=str)
@torch.inference_mode()
def test_cache_equals_full_forward(changes: dict[str, Any], prompt: int, batch_size: int) -> None:
    model = GPT(attention_config(**changes))
    randomize_sinks(model)
    idx = torch.randint(40, (batch_size, T))
    expected = model(idx)
    for known_end in (True, False):
        model.set_kv_cache(batch_size, max_seq_length=T + 3)
        chunks = [torch.arange(prompt), *torch.arange(prompt, T).split(1)]
        outs = [
            model(idx[:, chunk], input_pos=chunk, input_pos_maxp1=int(chunk[-1]) + 1 if known_end else None)
            for chunk in chunks
        ]
        torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=1e-4, atol=1e-5)
        model.clear_kv_cache()


@pytest.mark.parametrize("window", [None, 4])
@torch.inference_mode()
def test_cache_with_a_position_per_sequence(window: int | None) -> None:
    model = GPT(attention_config(sliding_window_size=window))
    randomize_sinks(model)
    idx = torch.randint(40, (2, T))
    expected = model(idx)
    model.set_kv_cache(2, max_seq_length=T)
    starts = torch.tensor([9, 6])
    model(idx[:, :9], input_pos=torch.arange(9), input_pos_maxp1=9)
    for step in range(3):
        position = starts[:, None] + step  # (B, 1): the second sequence goes back and repeats tokens
        out = model(idx.gather(1, position), input_pos=position)
        torch.testing.assert_close(out[:, 0], expected[torch.arange(2), position[:, 0]], rtol=1e-4, atol=1e-5)


def randomize_sinks(model: GPT) -> None:
    for block in model.transformer.h:
        if block.attn.sinks is not None:
            block.attn.sinks.normal_()


def test_a_long_prompt_stays_causal_in_the_window() -> None:
    model = GPT(attention_config(n_layer=1, sliding_window_size=4))
    idx = torch.randint(40, (1, T))
    with torch.inference_mode():
        model.set_kv_cache(1, max_seq_length=T)
        out = model(idx, input_pos=torch.arange(T))
        for changed in range(T):
            other = idx.clone()
            other[0, changed] = (other[0, changed] + 1) % 40
            difference = (model(other, input_pos=torch.arange(T)) - out).abs().amax((0, 2))
            touched = (difference > 0).nonzero().flatten().tolist()
            assert touched == list(range(changed, min(changed + 4, T)))


@pytest.mark.parametrize("window", [4, None])
def test_masks_compose_with_the_window(window: int | None) -> None:
    layer = randomize(SinkAttention(attention_config(sliding_window_size=window), 0).double(), 1.0)
    x = torch.randn(2, T, 24, dtype=torch.float64)
    cos, sin = (table[None] for table in build_rope_cache(layer.config, T))
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    additive = torch.zeros(T, T).masked_fill(~visible, -math.inf)
    expected = layer(x, cos, sin)
    torch.testing.assert_close(layer(x, cos, sin, mask=visible), expected)
    torch.testing.assert_close(layer(x, cos, sin, mask=additive), expected)

    # Without a mask a cached call is causal by position.
    layer.kv_cache = layer.build_kv_cache(2, T)
    torch.testing.assert_close(layer(x, cos, sin, input_pos=torch.arange(T)), expected)
    layer.kv_cache = None
    with pytest.raises(TypeError, match="set_kv_cache"):
        layer(x, cos, sin, input_pos=torch.arange(T))


def test_parameters_and_reset() -> None:
    with_sinks, without = (
        SinkAttention(attention_config(), 0),
        SinkAttention(attention_config(attention_sinks=False), 0),
    )
    parent_names = set(CausalSelfAttention(attention_config(attention_class_name=None), 0).state_dict())
    assert set(without.state_dict()) == parent_names
    assert set(with_sinks.state_dict()) == parent_names | {"sinks"}
    assert with_sinks.sinks.shape == (4,)
    weight = with_sinks.qkv.weight.detach().clone()
    with torch.no_grad():
        with_sinks.sinks.fill_(3.0)
    with_sinks.reset_parameters()
    without.reset_parameters()
    assert (with_sinks.sinks == 0).all()
    assert torch.equal(with_sinks.qkv.weight, weight)


def test_the_softmax_scale_does_not_repeat_the_attention_factor() -> None:
    adjustments = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert SinkAttention(attention_config(rope_adjustments=adjustments), 0).mscale == 1.0


@pytest.mark.parametrize("norm_class_name", ["RMSNorm", "LayerNorm"])
def test_bfloat16_true_and_mixed(norm_class_name: str) -> None:
    changes = {"sliding_window_size": 4, "sliding_window_indices": [0, 1]}
    model = GPT(attention_config(norm_qk=True, norm_class_name=norm_class_name, **changes))
    with torch.no_grad():
        randomize_sinks(model)
    idx = torch.randint(40, (2, T))
    expected = model(idx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(idx)
    mixed.float().sum().backward()
    assert all(block.attn.sinks.grad.abs().sum() > 0 for block in model.transformer.h)
    true = model.to(torch.bfloat16)(idx)
    for out in (mixed, true):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("backend", [None, "flash_cpu"])
def test_meta_device(backend: str | None) -> None:
    """Which no kernel works on, nor need one that a configuration asks for."""
    window = {"sliding_window_size": 4, "sliding_window_indices": [0, 1]}
    with torch.device("meta"):
        model = GPT(attention_config(**window, rope_adjustments=YARN, attention_backend=backend))
        out = model(torch.zeros(2, T, dtype=torch.long))
    out.sum().backward()
    assert out.shape == (2, T, 40)
    assert model.transformer.h[0].attn.sinks.grad.shape == (4,)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    layer = randomize(SinkAttention(attention_config(sliding_window_size=4), 0).double(), 1.0)
    x = torch.randn(2, T, 24, dtype=torch.float64, requires_grad=True)
    cos, sin = (table[None] for table in build_rope_cache(layer.config, T))
    expected = torch.autograd.grad(layer(x, cos, sin).square().sum(), [x, *layer.parameters()])
    checkpoint(layer, x, cos, sin, use_reentrant=use_reentrant).square().sum().backward()
    actual = [x.grad, *(parameter.grad for parameter in layer.parameters())]
    torch.testing.assert_close(actual, list(expected))
