"""Generation for a batch of prompts of different lengths, through LitGPT's key/value cache.

Shape legend: B batch, T tokens of a prompt, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from litgpt import GPT
from litgpt.model import CausalSelfAttention
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.batching import pad_right
from litgpt_moe_ext.evaluation.sampling import GREEDY, Sampling
from litgpt_moe_ext.field_types import PositiveInt, checked

# Settings of Hugging Face's `generate` that some tasks give, with the values that have no effect.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "use_cache": True, "min_p": 0.0}


@dataclass(frozen=True)
class GenerationSettings:
    """A task's `generation_kwargs`.

    Attributes:
        until: Strings that end the text, without being part of it.
        max_gen_toks: Maximum number of tokens to generate.
        sampling: How tokens are chosen. (Hugging Face's default of `top_k` is 50; here there is none.)
    """

    until: tuple[str, ...] = ()
    max_gen_toks: int = 256
    sampling: Sampling = GREEDY

    @classmethod
    def parse(cls, generation_kwargs: dict[str, Any], default_max_gen_toks: int) -> "GenerationSettings":
        """Read `generation_kwargs` as lm-eval's Hugging Face model does: it samples only where `do_sample` is true.

        Args:
            generation_kwargs: The task's settings.
            default_max_gen_toks: Used where they do not name `max_gen_toks`.

        Raises:
            SettingsError: If a setting is not supported or out of range; the message names it.
        """
        settings = dict(generation_kwargs)
        until = settings.pop("until", None) or []
        max_gen_toks = settings.pop("max_gen_toks", None)
        samples, temperature = settings.pop("do_sample", False), settings.pop("temperature", 1.0)
        top_k, top_p = settings.pop("top_k", None), settings.pop("top_p", None)
        sampling = GREEDY
        if samples:
            # Without `do_sample` these are unused, and some tasks give values that are out of range.
            sampling = Sampling(
                _checked("temperature", temperature or 0.0, float),
                _checked("top_k", top_k or None, int | None),
                _checked("top_p", 1.0 if top_p is None else top_p, float),
            )
        for name, value in settings.items():
            if value is not None and (name not in _NEUTRAL or value != _NEUTRAL[name]):
                raise SettingsError(
                    f"generation_kwargs: {name}: {value!r} is not supported; remove it from the task (supported are "
                    "until, max_gen_toks, do_sample, temperature, top_k, top_p)"
                )
        return cls(
            until=tuple([until] if isinstance(until, str) else until),
            max_gen_toks=_checked(
                "max_gen_toks", default_max_gen_toks if max_gen_toks is None else max_gen_toks, PositiveInt
            ),
            sampling=sampling,
        )


def _checked(name: str, value: Any, kind: Any) -> Any:
    return checked(f"generation_kwargs: {name}", value, kind)


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    is_finished: Callable[[list[int]], bool],
) -> list[list[int]]:
    """Continue prompts.

    Args:
        model: The model, in evaluation mode.
        prompts: B non-empty prompts. The longest and `max_gen_toks` together must not exceed the model's block size.
        settings: How to choose tokens, and how many.
        is_finished: Called with the tokens generated so far for one prompt; true ends that prompt's continuation.

    Returns:
        The generated tokens of each prompt, including those that made `is_finished` return true.
    """
    forward = _CachedForward if supports_padded_cache(model) else _PlainForward
    generated: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    try:
        steps = forward(model, prompts, settings.max_gen_toks)
        logits_BV = steps.first()
        for step in range(settings.max_gen_toks):
            token_B = settings.sampling.choose(logits_BV)
            for row, token in enumerate(token_B.tolist()):
                if running[row]:
                    generated[row].append(token)
                    running[row] = not is_finished(generated[row])
            if not any(running) or step + 1 == settings.max_gen_toks:
                break
            logits_BV = steps.next(token_B)
    finally:
        model.clear_kv_cache()
    return generated


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


class _CachedForward:
    """Logits of the next token, with a cache.

    Prompts are padded on the right. The padding writes keys and values behind each prompt's end, but the mask hides
    positions after a token's own, and the first token to reach such a position overwrites it.
    """

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        weight = model.lm_head.weight
        self.prompts_BT = pad_right(prompts, weight.device)
        self.position_B = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
        self.length = self.prompts_BT.size(1)
        model.set_kv_cache(
            batch_size=len(prompts),
            max_seq_length=self.length + max_new_tokens,
            device=weight.device,
            dtype=weight.dtype,
        )

    def first(self) -> Tensor:
        """Return the logits of the first new token of each prompt, (B, V)."""
        positions_T = torch.arange(self.length, device=self.prompts_BT.device)
        logits_BTV = self.model(self.prompts_BT, positions_T, input_pos_maxp1=self.length)
        return _last(logits_BTV, self.position_B)

    def next(self, token_B: Tensor) -> Tensor:
        """Take in one token per prompt; return the logits of the following one, (B, V)."""
        self.length += 1
        logits_B1V = self.model(token_B[:, None], self.position_B[:, None], input_pos_maxp1=self.length)
        self.position_B = self.position_B + 1
        return logits_B1V[:, 0]


class _PlainForward:
    """The same, by running the whole text through the model for each token: a reference, and used for ring buffers."""

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.texts = [list(prompt) for prompt in prompts]

    def first(self) -> Tensor:
        """Return the logits of the first new token of each prompt, (B, V)."""
        device = self.model.lm_head.weight.device
        length_B = torch.tensor([len(text) for text in self.texts], device=device)
        return _last(self.model(pad_right(self.texts, device)), length_B)

    def next(self, token_B: Tensor) -> Tensor:
        """Take in one token per prompt; return the logits of the following one, (B, V)."""
        for text, token in zip(self.texts, token_B.tolist(), strict=True):
            text.append(token)
        return self.first()


def _last(logits_BTV: Tensor, length_B: Tensor) -> Tensor:
    return logits_BTV[torch.arange(len(logits_BTV), device=length_B.device), length_B - 1]
