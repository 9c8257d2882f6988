"""Generation for a batch of prompts of different lengths, with the settings of lm-eval's tasks.

Shape legend: B prompts, T tokens of the longest.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from litgpt import GPT

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.batching import pad_right
from litgpt_moe_ext.evaluation.decoding import decode, decode_uncached, kv_cache, supports_padded_cache
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
    device = model.lm_head.weight.device
    prompts_BT = pad_right(prompts, device)
    length_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    generated: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    cached = supports_padded_cache(model)
    write = decode if cached else decode_uncached
    with kv_cache(model, len(prompts), prompts_BT.size(1) + settings.max_gen_toks) if cached else nullcontext():
        for token_B in write(model, prompts_BT, settings.max_gen_toks, settings.sampling, length_B):
            for row, token in enumerate(token_B.tolist()):
                if running[row]:
                    generated[row].append(token)
                    running[row] = not is_finished(generated[row])
            if not any(running):
                break
    return generated
