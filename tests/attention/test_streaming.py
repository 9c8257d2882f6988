"""The streaming cache: equal to a full cache while the text fits, to a written-out reference beyond, without end."""

import math
from typing import Any

import pytest
import torch
from litgpt.generate import base, speculative_decoding
from litgpt.model import GPT

from litgpt_moe_ext.attention import streaming_cache
from tests.models import attention_config, randomize

FIRST, WINDOW = 3, 9
LENGTH = 70  # more than block_size, which is 32


def make_model(**changes: Any) -> GPT:
    settings = {"streaming_cache_first": FIRST, "streaming_cache_window": WINDOW, **changes}
    return randomize(GPT(attention_config(**settings)).double().eval(), 0.4)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.size(-1) // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attention_token_by_token(layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Every token sees a list of tokens, and positions are places in this list."""
    q, k, v = layer._split(layer.qkv(x))
    outs = []
    for t in range(x.size(1)):
        seen = [j for j in range(t + 1) if j < FIRST or t - j < WINDOW]
        place = torch.arange(len(seen))
        key = rotate(k[:, :, seen], cos[place], sin[place]).repeat_interleave(2, 1)
        query = rotate(q[:, :, t : t + 1], cos[place[-1:]], sin[place[-1:]])
        weight = (query @ key.mT)[:, :, 0] / math.sqrt(8)
        if layer.sinks is not None:
            weight = torch.cat((weight, layer.sinks.view(1, -1, 1).expand(x.size(0), -1, 1)), -1)
        weight = weight.softmax(-1)[..., : len(seen), None]
        outs.append((weight * v[:, :, seen].repeat_interleave(2, 1)).sum(2))
    return layer.proj(torch.stack(outs, 1).flatten(2))


@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("chunks", [[LENGTH], [1] * LENGTH, [2, 1, 10, 30, 27], [40, *[1] * 30]], ids=len)
@pytest.mark.parametrize("chunk_size", [256, 7])
@torch.inference_mode()
def test_equals_token_by_token(
    has_sinks: bool, chunks: list[int], chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming_cache, "CHUNK", chunk_size)
    model = make_model(attention_sinks=has_sinks, n_layer=1)
    model.max_seq_length = LENGTH
    layer = model.transformer.h[0].attn
    idx = torch.randint(40, (2, LENGTH))
    model.set_kv_cache(2, dtype=torch.float64)
    outs = [model(idx[:, chunk], input_pos=chunk) for chunk in torch.arange(LENGTH).split(chunks)]
    cos, sin = model.cos, model.sin

    x = model.transformer.wte(idx)
    block = model.transformer.h[0]
    x = x + attention_token_by_token(layer, block.norm_1(x), cos, sin)
    x = x + block.mlp(block.norm_2(x))
    expected = model.lm_head(model.transformer.ln_f(x))
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"rotary_percentage": 0.5}, {"rope_adjustments": {"factor": 2.0}}], ids=str)
@torch.inference_mode()
def test_equals_the_full_forward_while_the_text_fits(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    idx = torch.randint(40, (2, FIRST + WINDOW))
    model.set_kv_cache(2)  # in single precision, which is not that of the keys
    chunks = torch.arange(FIRST + WINDOW).split([5, *[1] * 7])
    outs = [model(idx[:, chunk], input_pos=chunk) for chunk in chunks]
    torch.testing.assert_close(torch.cat(outs, dim=1), model(idx), rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_layers_with_a_sliding_window_stay_exact() -> None:
    model = make_model(sliding_window_size=4)
    idx = torch.randint(40, (1, 30))
    expected = model(idx)
    model.set_kv_cache(1, dtype=torch.float64)
    outs = [model(idx[:, chunk], input_pos=chunk) for chunk in torch.arange(30).split([11, *[1] * 19])]
    torch.testing.assert_close(torch.cat(outs, dim=1), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [4, 40])
@torch.inference_mode()
def test_a_sliding_window_of_any_length_stays_exact_in_a_long_text(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming_cache, "CHUNK", 7)
    model, longer = (make_model(sliding_window_size=window, block_size=size) for size in (32, 128))
    longer.load_state_dict(model.state_dict())
    idx = torch.randint(40, (1, 100))
    model.max_seq_length = 100
    model.set_kv_cache(1, dtype=torch.float64)
    outs = [model(idx[:, chunk], input_pos=chunk) for chunk in torch.arange(100).split([50, *[1] * 50])]
    torch.testing.assert_close(torch.cat(outs, dim=1), longer(idx), rtol=1e-5, atol=1e-6)


def test_generation_beyond_the_context() -> None:
    model = make_model()
    model.max_seq_length = 200
    model.set_kv_cache(1, dtype=torch.float64)
    cache = model.transformer.h[0].attn.kv_cache
    assert cache.k.shape == (1, 2, FIRST + WINDOW, 8)
    assert model.mask_cache.numel() == (FIRST + WINDOW) ** 2
    prompt = torch.randint(40, (50,))
    model(prompt[None, :7], input_pos=torch.arange(7))
    cache.reset_parameters()
    assert not cache.k.any()
    with pytest.raises(ValueError, match="has seen 0 tokens and cannot go on at position 7"):
        model(prompt[None, 7:8], input_pos=torch.tensor([7]))
    tokens = base.generate(model, prompt, 200, temperature=0.0)
    assert tokens.shape == (200,)
    assert cache.n_seen == 199
    assert torch.equal(base.generate(model, prompt, 200, temperature=0.0), tokens)
    # Of two layers, only the first tokens and two windows count.
    other = prompt.clone()
    other[FIRST : 50 - 2 * WINDOW] = 7
    assert torch.equal(base.generate(model, other, 200, temperature=0.0)[50:], tokens[50:])
    other[0] += 1
    assert not torch.equal(base.generate(model, other, 200, temperature=0.0)[50:], tokens[50:])


def test_the_cache_does_not_go_back() -> None:
    target, draft = make_model(), make_model()
    for model in (target, draft):
        model.set_kv_cache(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="Speculative decoding and continuing an earlier text need a full cache"):
        speculative_decoding.generate(
            draft, target, torch.randint(40, (5,)), 25, temperature=1.0, top_k=1, speculative_k=3
        )
    with pytest.raises(ValueError, match="needs one position per token for the whole batch"):
        target(torch.zeros(1, 1, dtype=torch.long), input_pos=torch.zeros(1, 1, dtype=torch.long))


def test_training_is_untouched() -> None:
    model = make_model()
    plain = GPT(attention_config()).double()
    plain.load_state_dict(model.state_dict())
    idx = torch.randint(40, (2, 32))
    assert torch.equal(model(idx), plain(idx))
    with pytest.raises(ValueError, match="Cannot forward sequence of length 33"):
        model(torch.zeros(1, 33, dtype=torch.long))


def test_a_batch_may_be_smaller_than_the_cache() -> None:
    """Of which the other rows stay as they are."""
    cache = streaming_cache.StreamingKVCache((3, 2, 4), first=1, window=3)
    for begin in (0, 2):
        new = torch.randn(1, 2, 2, 4)
        keys, values, positions = cache.extend(new, new + 1, begin)
        assert keys.shape == values.shape == (1, 2, begin + 2, 4)
        assert positions.tolist() == list(range(begin + 2))
    assert torch.equal(cache.v[0, :, 2:], new[0] + 1)
    assert not cache.k[1:].any()
