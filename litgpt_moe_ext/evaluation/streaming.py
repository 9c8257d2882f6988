"""Writing a text token by token.

Shape legend: T tokens.
"""

from collections.abc import Generator

import torch
from litgpt import GPT

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.decoding import decode, kv_cache
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
    if not prompt:
        raise SettingsError("prompt: it is empty; it must have at least one token")
    check_ids(model, prompt)
    if getattr(model.config, "streaming_cache_window", None) is None:
        size = model.max_seq_length
        if len(prompt) >= size:
            raise SettingsError(
                f"prompt: it has {len(prompt)} tokens; it must have 1 to {size - 1} (the model's context)"
            )
        max_new_tokens = min(max_new_tokens, size - len(prompt))
    prompt_1T = torch.tensor([prompt], device=model.lm_head.weight.device)
    with kv_cache(model, 1, len(prompt) + max_new_tokens):
        for token_1 in decode(model, prompt_1T, max_new_tokens, sampling):
            yield int(token_1)
