"""Rotary position tables for models that name the extension's attention layer.

The frequency rules follow Hugging Face's `modeling_rope_utils.ROPE_INIT_FUNCTIONS`; the tables have LitGPT's layout.
LitGPT 0.5.13's own function differs in its YaRN rule: it swaps the slowed and the untouched end of the spectrum, does
not know `truncate` and `attention_factor`, and applies no attention temperature unless `mscale` is given.

Shape legend: T positions, N rotated elements of a head (`config.rope_n_elem`), F = ceil(N / 2) frequencies.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt_moe_ext.config.rope import (
    DEFAULT_BETA_FAST,
    DEFAULT_BETA_SLOW,
    present_adjustments,
    rope_kind,
    validate_rope_adjustments,
)

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


def rope_frequencies(
    n_elem: int,
    base: float,
    rope_adjustments: dict[str, Any] | None = None,
    device: torch.device | None = None,
    seq_len: int | None = None,
) -> tuple[Tensor, float]:
    """Compute how fast each pair of elements rotates, and the attention factor.

    Args:
        n_elem: Number of rotated elements of a head, N.
        base: The base of the geometric progression of wavelengths.
        rope_adjustments: How to stretch the context, see `validate_rope_adjustments`.
        device: Where to put the result.
        seq_len: Length of the sequences, needed for dynamic NTK only.

    Returns:
        The angle per position, (F,), float32, and the factor of both cosine and sine: 1 except for YaRN, where the
        attention logits grow by its square.

    Raises:
        ValueError: If `rope_adjustments` is not valid.
    """
    validate_rope_adjustments(rope_adjustments)
    keys = present_adjustments(rope_adjustments)
    plain_F = _plain_frequencies(n_elem, base, device)
    kind = rope_kind(keys)
    if kind == "dynamic":
        return _plain_frequencies(n_elem, _dynamic_base(n_elem, base, keys, seq_len), device), 1.0
    if kind == "linear":
        return plain_F / keys["factor"], 1.0
    if kind == "llama3":
        return _llama3_frequencies(plain_F, keys), 1.0
    if kind == "yarn":
        return _yarn_frequencies(plain_F, n_elem, base, keys), _yarn_attention_factor(keys)
    return plain_F, 1.0


def build_rope_cache(config: "Config", seq_len: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Build the cosine and sine tables that LitGPT's `apply_rope` reads.

    Args:
        config: The model configuration; uses `rope_n_elem`, `rope_base`, `rope_condense_ratio`, `rope_adjustments` and
            `rope_local_base_freq`. Dynamic NTK chooses the base for `block_size`, whatever the length of a text, so
            that a model generates with the base that it was trained with, and keys in a cache stay valid.
        seq_len: Number of positions, T.
        device: Where to put the tables.

    Returns:
        Cosines and sines, (T, N), float32. As in LitGPT, they have two columns if N is 1. If N is 0 they have one that
        is never read, because LitGPT cannot look up positions per sequence in an empty table. With
        `rope_local_base_freq` the shape is (T, N, 2): index 0 of the last dimension holds the tables above, index 1
        plain RoPE with the local base, without attention factor.

    Raises:
        ValueError: If `config.rope_adjustments` is not valid.
    """
    n_elem = config.rope_n_elem
    position_T = torch.arange(seq_len, device=device).float() / config.rope_condense_ratio
    frequency_F, attention_factor = rope_frequencies(
        n_elem, config.rope_base, config.rope_adjustments, device, config.block_size
    )
    cos_TN, sin_TN = _tables(position_T, frequency_F, n_elem)
    if attention_factor != 1.0:
        cos_TN, sin_TN = cos_TN * attention_factor, sin_TN * attention_factor
    if config.rope_local_base_freq is None:
        return cos_TN, sin_TN

    local_F, _ = rope_frequencies(n_elem, config.rope_local_base_freq, None, device)
    local_cos_TN, local_sin_TN = _tables(position_T, local_F, n_elem)
    return torch.stack((cos_TN, local_cos_TN), dim=-1), torch.stack((sin_TN, local_sin_TN), dim=-1)


def _tables(position_T: Tensor, frequency_F: Tensor, n_elem: int) -> tuple[Tensor, Tensor]:
    if n_elem == 0:
        return torch.ones_like(position_T).unsqueeze(-1), torch.zeros_like(position_T).unsqueeze(-1)
    angle_TN = torch.outer(position_T, frequency_F).repeat(1, 2)
    # Two columns per frequency are one too many for an odd N. LitGPT keeps both if N is 1 and lets the single element
    # broadcast against them; its cache shapes rely on that.
    if n_elem > 1:
        angle_TN = angle_TN[:, :n_elem]
    return angle_TN.cos(), angle_TN.sin()


def _plain_frequencies(n_elem: int, base: float, device: torch.device | None) -> Tensor:
    return 1.0 / base ** (torch.arange(0, n_elem, 2, device=device).float() / n_elem)


def _dynamic_base(n_elem: int, base: float, keys: dict[str, Any], seq_len: int | None) -> float:
    # NTK-aware scaling by the ratio of the sequence to the original context.
    if n_elem <= 2:
        return base  # the only frequency is 1, whatever the base
    original = keys["original_max_seq_len"]
    stretch = keys["factor"] * max(seq_len or 0, original) / original - (keys["factor"] - 1)
    return base * stretch ** (n_elem / (n_elem - 2))


def _llama3_frequencies(plain_F: Tensor, keys: dict[str, Any]) -> Tensor:
    # Llama 3.1: frequencies with at least `high_freq_factor` turns within the original context stay, those with fewer
    # than `low_freq_factor` are divided by `factor`, and in between the two are interpolated linearly.
    turns_F = keys["original_max_seq_len"] * plain_F / (2 * math.pi)
    low, high = keys["low_freq_factor"], keys["high_freq_factor"]
    kept_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return plain_F * kept_F + plain_F / keys["factor"] * (1 - kept_F)


def _yarn_frequencies(plain_F: Tensor, n_elem: int, base: float, keys: dict[str, Any]) -> Tensor:
    # "NTK by parts", section 3.2 of Peng et al. 2023 (arXiv:2309.00071): as Llama 3 above, but interpolated linearly in
    # the index of the frequency instead of its number of turns.
    def index_that_turns(n_turns: float) -> float:
        return n_elem * math.log(keys["original_max_seq_len"] / (2 * math.pi * n_turns)) / (2 * math.log(base))

    first = index_that_turns(keys.get("beta_fast", DEFAULT_BETA_FAST))
    last = index_that_turns(keys.get("beta_slow", DEFAULT_BETA_SLOW))
    if keys.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    # The upper bound is N - 1 and not the last index, F - 1: the ramp may end beyond it, and then not even the slowest
    # frequency is divided by the whole factor.
    first, last = max(first, 0), min(last, n_elem - 1)
    if first == last:
        last += 0.001  # a step instead of a division by zero
    index_F = torch.arange(plain_F.numel(), device=plain_F.device, dtype=torch.float32)
    slowed_F = ((index_F - first) / (last - first)).clamp(0, 1)
    return plain_F * (1 - slowed_F) + plain_F / keys["factor"] * slowed_F


def _yarn_attention_factor(keys: dict[str, Any]) -> float:
    # Section 3.3 of the paper: sqrt(1/t) = 0.1 ln(s) + 1. DeepSeek's `mscale` and `mscale_all_dim` count only as a
    # pair, as in Hugging Face.
    if "attention_factor" in keys:
        return float(keys["attention_factor"])

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(keys["factor"]) + 1.0

    if keys.get("mscale") and keys.get("mscale_all_dim"):
        return temperature(keys["mscale"]) / temperature(keys["mscale_all_dim"])
    return temperature(1.0)
