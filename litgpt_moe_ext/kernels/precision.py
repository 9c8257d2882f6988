"""In what torch multiplies matrices: under autocast, and by whichever of its settings for float32 was used."""

from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.compiled import assume_constant_result


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which `x` is multiplied with weights: autocast's where that is on, otherwise its own."""
    device_type = x.device.type
    # torch has no autocast for meta tensors, and autocast leaves float64 alone.
    if x.dtype != torch.float64 and device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


@assume_constant_result
def float32_precision(device_type: str) -> str:
    """Return in what float32 matrices are multiplied: `ieee` (float32 itself), `tf32`, or on a CPU `bf16`.

    `torch.get_float32_matmul_precision` raises an error once a program has used the newer setting,
    `torch.backends.cuda.matmul.fp32_precision`; that one shows what the older ones have set as well.

    Args:
        device_type: `cpu` or `cuda`.
    """
    # Modules that torch puts others in place of, which type checkers do not see.
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision
