"""Writing a text token by token, and knowing which experts wrote it.

Shape legend: K chosen experts per token, L MoE layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from litgpt.generate.base import sample

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.experts.capture import RoutingRecorder


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest token.
        top_k: Choose among this many likeliest tokens only, or None.
        top_p: Choose among the likeliest tokens that together have this probability.
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SettingsError(f"temperature: {self.temperature} must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise SettingsError(f"top_k: {self.top_k} must be at least 1, or null for all tokens")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p: {self.top_p} must be more than 0 and at most 1")


@dataclass(frozen=True)
class Written:
    """One new token.

    Attributes:
        id: Token id.
        experts: For each MoE layer the experts that computed it, the one with the highest gate value first. These are
            the experts of the position that predicts the token. None if they were not asked for.
    """

    id: int
    experts: list[list[int]] | None


@torch.inference_mode()
def stream(
    model: Any, prompt: list[int], max_new_tokens: int, sampling: Sampling, show_experts: bool
) -> Iterator[Written]:
    """Continue a prompt until `max_new_tokens` or the end of the model's context, which a streaming cache has not.

    Args:
        model: A `litgpt.GPT` in evaluation mode.
        prompt: Token ids, at least one and, without a streaming cache, fewer than the model's block size.
        max_new_tokens: Most tokens to write.
        sampling: How to choose them.
        show_experts: Whether to record experts.

    Raises:
        SettingsError: If the prompt is empty or leaves no room.
    """
    device, total = model.lm_head.weight.device, len(prompt) + max_new_tokens
    if not prompt:
        raise SettingsError("the prompt is empty; it must have at least one token")
    if model.config.streaming_cache_window is None:
        size = model.max_seq_length
        if len(prompt) >= size:
            raise SettingsError(
                f"the prompt has {len(prompt)} tokens; it must have 1 to {size - 1} (the model's context)"
            )
        total = min(size, total)
    recorder = RoutingRecorder(model) if show_experts else None
    length = model.max_seq_length
    model.set_kv_cache(batch_size=1, max_seq_length=total, device=device, dtype=model.lm_head.weight.dtype)
    try:
        ids, start = prompt, 0
        while start + len(ids) < total:
            position_T = torch.arange(start, start + len(ids), device=device)
            start += len(ids)
            ids_1T = torch.tensor([ids], device=device)
            if recorder is None:
                logits, experts = model(ids_1T, position_T, input_pos_maxp1=start), None
            else:
                with recorder.recording():
                    logits = model(ids_1T, position_T, input_pos_maxp1=start)
                experts = [_by_weight(layer) for layer in recorder.take()]
            token = int(_choose(logits, sampling))
            yield Written(token, experts)
            ids = [token]
    finally:
        model.clear_kv_cache()
        model.max_seq_length = length


def _choose(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    if sampling.temperature == 0:
        return logits[0, -1].argmax()
    return sample(logits, sampling.temperature, sampling.top_k, sampling.top_p)


def _by_weight(layer: Any) -> list[int]:
    order_K = layer.weights_NK[-1].argsort(descending=True)
    return layer.experts_NK[-1][order_K].tolist()
