"""Which implementation computes the routed experts, and what all of them are given.

- `loop`: one expert after the other with ordinary operators; everywhere, and the reference for the others.
- `grouped_cpu`: the same on a CPU, faster and with less memory (`litgpt_moe_ext.moe.kernels.cpu`).
- `grouped_mm`: all experts in one grouped matrix product, without waiting for the device
  (`litgpt_moe_ext.moe.kernels.grouped_mm`).

Shape legend: E experts, D model width, F hidden width of one expert, G width of the first projection (2 * F with a
gate), N rows of one expert.
"""

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.moe.activations import Activation

BACKENDS = ("loop", "grouped_cpu", "grouped_mm")


class ExpertWeights(NamedTuple):
    """Stacked weights of the experts; biases are None where there are none."""

    up_EGD: Tensor
    up_bias_EG: Tensor | None
    down_EDF: Tensor
    down_bias_ED: Tensor | None


class Hidden(NamedTuple):
    """What happens between the two projections of an expert.

    Attributes:
        activation: The activation function.
        dropout: Probability that a hidden activation is dropped; 0 in evaluation.
    """

    activation: Activation
    dropout: float = 0.0

    def dropout_mask(self, n_row: int, like_NF: Tensor) -> Tensor | None:
        """Return factors for `n_row` rows as wide as `like_NF`, 0 or 1 / (1 - dropout); None without dropout."""
        if not self.dropout:
            return None
        return like_NF.new_empty(n_row, like_NF.size(1)).bernoulli_(1 - self.dropout).div_(1 - self.dropout)


def choose_backend(device: torch.device, dtype: torch.dtype, n_embd: int, intermediate_size: int) -> str:
    """Return the fastest backend that works.

    Args:
        device: Where the layer runs.
        dtype: What its matrices are multiplied in: autocast's dtype, or that of the tokens.
        n_embd: Model width.
        intermediate_size: Hidden width of one expert.
    """
    # The grouped product wants rows that start at multiples of 16 bytes and knows no float64.
    fits = dtype.itemsize < 8 and not any(width * dtype.itemsize % 16 for width in (n_embd, intermediate_size))
    if torch.compiler.is_compiling():
        # The other two ask how many rows each expert has, which a compiler cannot see.
        return "grouped_mm" if fits else "loop"
    if device.type == "cpu":
        return "grouped_cpu"
    if device.type != "cuda":
        return "loop"
    if not fits:
        reason = f"its grouped product needs widths in multiples of 16 bytes, not {n_embd} and {intermediate_size}"
    elif dtype != torch.bfloat16:
        reason = f"its grouped product is for bfloat16 (precision bf16-mixed or bf16-true), not {dtype}"
    elif torch.cuda.get_device_capability(device) < (9, 0):
        reason = "torch has no grouped product for cards before compute capability 9.0"
    else:
        return "grouped_mm"
    _announce_loop(reason)
    return "loop"


@functools.cache
def _announce_loop(reason: str) -> None:
    warnings.warn(
        "The GPU computes the experts one after the other, and the host waits for it in every MoE layer, because "
        f"{reason}.",
        RuntimeWarning,
        stacklevel=5,
    )


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which `x` meets weights: autocast's where that is on, otherwise its own."""
    device_type = x.device.type
    # torch knows no autocast for meta tensors.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
