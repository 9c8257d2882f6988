"""Decoding with a cache: LitGPT's own generators against the full forward, and what is read of the cache."""

from typing import Any

import pytest
import torch
from litgpt.generate import base, speculative_decoding
from litgpt.model import GPT
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext.attention import layer as layer_module
from litgpt_moe_ext.attention.cache_positions import position_range
from tests.models import attention_config, randomize

VARIANTS = [
    {},
    {"attention_sinks": False},
    {"sliding_window_size": 4},
    {"sliding_window_size": 4, "sliding_window_indices": [0, 1]},
]


def make_model(**changes: Any) -> GPT:
    return randomize(GPT(attention_config(**changes)).eval(), 0.3)


@torch.inference_mode()
def continue_without_cache(model: GPT, prompt: torch.Tensor, length: int) -> torch.Tensor:
    tokens = prompt
    while tokens.numel() < length:
        tokens = torch.cat((tokens, model(tokens[None])[0, -1].argmax().view(1)))
    return tokens


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_generate(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    prompt = torch.randint(40, (9,))  # longer than the window
    expected = continue_without_cache(model, prompt, 24)
    model.set_kv_cache(1)
    assert torch.equal(base.generate(model, prompt, 24, temperature=0.0), expected)
    assert torch.equal(base.generate(model, prompt, 24, temperature=0.0), expected)


@torch.inference_mode()
def test_batched_generate() -> None:
    model = make_model(sliding_window_size=4)
    prompts = torch.randint(40, (8, 9))
    expected = torch.stack([continue_without_cache(model, prompt, 16) for prompt in prompts])
    model.set_kv_cache(8)
    steps = base.batched_generate_fn(
        model, prompts, 16, sample_args={"temperature": 0.0}, include_prompt=False, include_eos=False
    )
    tokens = torch.stack([torch.cat(step) for step in steps], dim=1)
    assert torch.equal(tokens, expected[:, 9:])


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_speculative_decoding(changes: dict[str, Any]) -> None:
    # The draft model guesses wrong most of the time, so that the target model goes back over its cache.
    target, draft = make_model(**changes), make_model(**changes)
    prompt = torch.randint(40, (9,))
    expected = continue_without_cache(target, prompt, 22)
    for model in (target, draft):
        model.set_kv_cache(1)
    tokens, _ = speculative_decoding.generate(draft, target, prompt, 20, temperature=1.0, top_k=1, speculative_k=3)
    # LitGPT 0.5.13 does not return the first token that it generates.
    expected = torch.cat((prompt, expected[10:]))
    n = min(tokens.numel(), 19)
    assert n >= 18
    assert torch.equal(tokens[:n], expected[:n])


def test_no_mask_is_made_that_nothing_reads() -> None:
    for changes, size in (({}, 32), ({"streaming_cache_first": 1, "streaming_cache_window": 9}, 10)):
        model = make_model(**changes)
        model.set_kv_cache(1)
        assert model.mask_cache.shape == (1, 1, size, size)
        assert model.mask_cache.untyped_storage().nbytes() == 1


class LargestMask(TorchDispatchMode):
    """Notes the bytes of the largest bool tensor that has memory."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.bool:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("changes", [{}, {"position_embedding": "learned", "rotary_percentage": 0.0}], ids=str)
@torch.inference_mode()
def test_a_prompt_takes_no_mask_of_the_cache(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    model.set_kv_cache(2)
    for input_pos in (torch.arange(24), torch.arange(24).expand(2, -1)):
        with LargestMask() as largest:
            model(torch.randint(40, (2, 24)), input_pos=input_pos)
        per_sequence = input_pos.dim() > 1  # whose layers need a mask of their own
        assert largest.bytes <= (2 * 24 * 24 if per_sequence else 24)


def test_only_the_visible_part_of_the_cache_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = layer_module.sink_attention

    def record(q: Any, k: Any, v: Any, softmax: Any, mask: Any, causal: bool) -> torch.Tensor:
        calls.append((k.shape[1:3], None if mask is None else tuple(mask.shape)))
        return original(q, k, v, softmax, mask, causal)

    monkeypatch.setattr(layer_module, "sink_attention", record)
    model = make_model(sliding_window_size=4, sliding_window_indices=[0, 1])
    with torch.inference_mode():
        model.set_kv_cache(1, max_seq_length=30)
        model(torch.randint(40, (1, 9)), input_pos=torch.arange(9))
        assert calls == []  # a whole prompt needs neither the cache nor a mask
        model(torch.randint(40, (1, 1)), input_pos=torch.tensor([9]))
        model(torch.randint(40, (1, 3)), input_pos=torch.arange(10, 13))
    # Two groups: nothing is repeated for the four query heads. The second layer has a window of 4.
    assert calls == [((2, 10), None), ((2, 4), None), ((2, 13), (3, 13)), ((2, 6), (3, 6))]


def test_position_range() -> None:
    assert position_range(torch.arange(5), None) == (0, 5)
    assert position_range(torch.tensor([7]), 30) == (7, 8)
    assert position_range(torch.tensor([[7, 8], [2, 3]]), None) == (2, 9)
    # What a device holds is not asked for.
    meta = torch.empty(3, dtype=torch.long, device="meta")
    assert position_range(meta, None) == (None, None)
    assert position_range(meta, 9) == (6, 9)
    assert position_range(meta.view(3, 1), 9) == (None, 9)


@torch.inference_mode()
def test_without_known_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a device that must not be waited for.
    monkeypatch.setattr(layer_module, "position_range", lambda input_pos, end: (None, end))
    model = make_model(sliding_window_size=4, sliding_window_indices=[0, 1])
    idx = torch.randint(40, (2, 12))
    model.set_kv_cache(2, max_seq_length=20)
    outs = [model(idx[:, chunk], input_pos=chunk) for chunk in (torch.arange(9), *torch.arange(9, 12).split(1))]
    torch.testing.assert_close(torch.cat(outs, dim=1), model(idx), rtol=1e-4, atol=1e-4)
