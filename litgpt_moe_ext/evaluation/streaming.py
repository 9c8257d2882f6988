"""Writing a text token by token.

Shape legend: T tokens, V vocabulary.
"""

from collections.abc import Generator

import torch
from litgpt import GPT

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.sampling import Sampling
from litgpt_moe_ext.evaluation.tokenization import check_ids


@torch.inference_mode()
def stream(model: GPT, prompt: list[int], max_new_tokens: int, sampling: Sampling) -> Generator[int]:
    """Continue a prompt, token by token.

    The text ends after `max_new_tokens`, or at the end of the model's context unless it has a streaming cache.

    Args:
        model: The model, in evaluation mode.
        prompt: Token ids, at least one and, without a streaming cache, fewer than the model's block size.
        max_new_tokens: Maximum number of tokens to write.
        sampling: How to choose them.

    Yields:
        Token ids, with one forward pass between two of them.

    Raises:
        SettingsError: If the prompt is empty, leaves no room, or has a token unknown to the model.
    """
    device, total = model.lm_head.weight.device, len(prompt) + max_new_tokens
    if not prompt:
        raise SettingsError("prompt: it is empty; it must have at least one token")
    check_ids(model, prompt)
    if getattr(model.config, "streaming_cache_window", None) is None:
        size = model.max_seq_length
        if len(prompt) >= size:
            raise SettingsError(
                f"prompt: it has {len(prompt)} tokens; it must have 1 to {size - 1} (the model's context)"
            )
        total = min(size, total)
    length = model.max_seq_length
    model.set_kv_cache(batch_size=1, max_seq_length=total, device=device, dtype=model.lm_head.weight.dtype)
    try:
        ids, start = prompt, 0
        while start + len(ids) < total:
            position_T = torch.arange(start, start + len(ids), device=device)
            start += len(ids)
            logits_1TV = model(torch.tensor([ids], device=device), position_T, input_pos_maxp1=start)
            ids = [int(sampling.choose(logits_1TV[:, -1]))]
            yield ids[0]
    finally:
        model.clear_kv_cache()
        model.max_seq_length = length
