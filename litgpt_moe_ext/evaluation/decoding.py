"""Writing token by token, through LitGPT's key/value cache or without one.

Shape legend: B prompts, T tokens of the longest, V vocabulary.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from litgpt import GPT
from litgpt.model import CausalSelfAttention
from torch import Tensor

from litgpt_moe_ext.evaluation.sampling import Sampling


@contextmanager
def kv_cache(model: GPT, batch_size: int, length: int) -> Iterator[None]:
    """Give a model a key/value cache, and take it away at the end.

    Args:
        model: The model, in evaluation mode.
        batch_size: How many texts it holds.
        length: Tokens of the longest one, prompt included.
    """
    weight, size = model.lm_head.weight, model.max_seq_length
    model.set_kv_cache(batch_size=batch_size, max_seq_length=length, device=weight.device, dtype=weight.dtype)
    try:
        yield
    finally:
        model.clear_kv_cache()
        if model.max_seq_length != size:  # a streaming cache raises it to the length of its text
            model.max_seq_length = size


@torch.inference_mode()
def decode(
    model: GPT, prompts_BT: Tensor, count: int, sampling: Sampling, length_B: Tensor | None = None
) -> Generator[Tensor]:
    """Continue prompts within `kv_cache`.

    Prompts of different lengths are padded on the right. The padding writes keys and values behind each prompt's end,
    but the mask hides positions after a token's own, and the first token to reach such a position overwrites it.

    Args:
        model: The model, for whose cache `supports_padded_cache` must be true if `length_B` is given.
        prompts_BT: Token ids.
        count: How many tokens to write after each prompt.
        sampling: How to choose them.
        length_B: How many tokens of each row are its prompt. Default: all.

    Yields:
        The next token of each row, (B,), with one forward pass between two of them.
    """
    size, device = prompts_BT.size(1), prompts_BT.device
    ids_BT, positions = prompts_BT, torch.arange(size, device=device)
    end = torch.tensor([size], device=device) if length_B is None else length_B[:, None]
    for step in range(count):
        logits_BTV = model(ids_BT, positions, input_pos_maxp1=size + step)
        token_B = sampling.choose(logits_BTV[:, -1] if step or length_B is None else _last(logits_BTV, length_B))
        yield token_B
        ids_BT, positions = token_B[:, None], end + step


@torch.inference_mode()
def decode_uncached(
    model: GPT, prompts_BT: Tensor, count: int, sampling: Sampling, length_B: Tensor
) -> Generator[Tensor]:
    """Do as `decode`, running the whole text through the model for each token: a reference, and for ring buffers."""
    row_B = torch.arange(len(prompts_BT), device=prompts_BT.device)
    text_BT = torch.nn.functional.pad(prompts_BT, (0, count))
    for step in range(count):
        token_B = sampling.choose(_last(model(text_BT[:, : prompts_BT.size(1) + step]), length_B + step))
        yield token_B
        text_BT[row_B, length_B + step] = token_B


def supports_padded_cache(model: GPT) -> bool:
    """Return whether the model's cache holds every position.

    For a sliding window, LitGPT's own attention keeps a ring buffer, where padding would displace tokens, and refuses
    prompts longer than the window. A streaming cache drops tokens and counts positions for the whole batch.
    """
    layers = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
    streams = getattr(model.config, "streaming_cache_window", None) is not None
    return not streams and not any(
        type(layer) is CausalSelfAttention and layer.apply_sliding_window_attention for layer in layers
    )


def _last(logits_BTV: Tensor, length_B: Tensor) -> Tensor:
    return logits_BTV[torch.arange(len(logits_BTV), device=length_B.device), length_B - 1]
