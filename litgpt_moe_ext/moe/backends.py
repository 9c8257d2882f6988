"""Which implementation computes the routed experts.

- `loop`: one expert after the other with ordinary operators; everywhere, and the reference for the others.
- `grouped_cpu`: the same on a CPU, faster and with less memory (`litgpt_moe_ext.moe.grouped_cpu`).
- `grouped_mm`: all experts in one grouped matrix product, without waiting for the device
  (`litgpt_moe_ext.moe.grouped_mm`).
"""

import torch

BACKENDS = ("loop", "grouped_cpu", "grouped_mm")


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
    if (
        device.type == "cuda"
        and fits
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) >= (9, 0)
    ):
        return "grouped_mm"
    return "loop"


def matmul_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype in which `x` meets weights: autocast's where that is on, otherwise its own."""
    device_type = x.device.type
    # torch knows no autocast for meta tensors.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
