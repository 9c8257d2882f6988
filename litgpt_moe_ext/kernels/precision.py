"""The precision of torch's matrix products: under autocast, and by any of its settings for float32."""

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
    """Return the precision of float32 products: `ieee` (float32 itself), `tf32`, or on a CPU `bf16`.

    `torch.get_float32_matmul_precision` raises an error once a program has used the newer setting,
    `torch.backends.cuda.matmul.fp32_precision`; the newer one also reflects the older ones.

    Args:
        device_type: `cpu` or `cuda`.
    """
    # Torch replaces these modules at run time, which type checkers do not see.
    backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision
