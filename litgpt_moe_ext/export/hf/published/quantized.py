"""Dequantization of weights that are published only in quantized form.

GPT-OSS is published in MXFP4, DeepSeek-V3 in FP8. Both are read as transformers reads them without special kernels.
Other quantizations are refused: a model that was also published in full precision is better imported from that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError

# The values of the 16 numbers of 4 bits.
_FP4 = torch.tensor([sign * size for sign in (1, -1) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)])
_MXFP4_BIAS = 127
# Types of the weights that are not quantized, by their names in a `config.json`.
_OTHERS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are stored.

    Attributes:
        method: `none`, `mxfp4` or `fp8`.
        dtype: Type of the dequantized weights.
        block: Rows and columns that share a scale of FP8.
    """

    method: str = "none"
    dtype: torch.dtype = torch.bfloat16
    block: tuple[int, int] = (128, 128)


def quantization_of(raw: Mapping[str, Any]) -> Quantization:
    """Return how the weights described by a `config.json` are stored.

    Args:
        raw: Its content.

    Raises:
        SettingsError: If they are quantized in another way.
    """
    found = raw.get("quantization_config")
    if not found:
        return Quantization()
    if not isinstance(found, dict):
        raise SettingsError(f"hf_dir: quantization_config: {found!r} must be settings by name; copy config.json again")
    method = found.get("quant_method")
    if method == "mxfp4":
        # The default type, bfloat16, holds them exactly, and transformers uses it whatever the type of the others.
        return Quantization("mxfp4")
    block = found.get("weight_block_size")
    if method == "fp8" and isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        others = _OTHERS.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.bfloat16)
        return Quantization("fp8", others, (block[0], block[1]))
    what = "fp8 without weight_block_size" if method == "fp8" else method
    raise SettingsError(
        f"hf_dir: quantization_config.quant_method: {what} must be mxfp4, or fp8 with weight_block_size; import the "
        "checkpoint that this one was quantized from, or let transformers dequantize() and save it"
    )


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the values of MXFP4 numbers in bfloat16, which holds them exactly.

    Args:
        blocks: (..., G, 16), bytes of two numbers of 4 bits, the lower bits first.
        scales: (..., G), the exponent of 2 that the 32 numbers of a block share, plus 127.

    Returns:
        (..., 32 G).
    """
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    exponents = (scales.int() - _MXFP4_BIAS).unsqueeze(-1)
    return torch.ldexp(_FP4[codes.long()], exponents).flatten(-2).bfloat16()


def from_fp8(name: str, weight: Tensor, scales: Tensor, quantization: Quantization) -> Tensor:
    """Return the values of FP8 numbers with a scale per block, rounded once to the type that the checkpoint names.

    Args:
        name: The weight's name, for errors.
        weight: A matrix.
        scales: The divisor of each block; blocks at the ends may be smaller.
        quantization: Size of the blocks.

    Raises:
        SettingsError: If there is not one scale per block.
    """
    (rows, columns), (height, width) = weight.shape, quantization.block
    expected = (math.ceil(rows / height), math.ceil(columns / width))
    if scales.shape != expected:
        raise SettingsError(
            f"hf_dir: {name}: its scales have the shape {tuple(scales.shape)}; must be {expected} for blocks of "
            f"{height} by {width}"
        )
    factors = scales.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return (weight.float() * factors).to(quantization.dtype)
