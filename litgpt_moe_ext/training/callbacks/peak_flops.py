"""What GPUs compute at best, for the model FLOPs utilization (PaLM, arXiv:2204.02311, appendix B).

Dense products: data sheets that quote Tensor Cores "with sparsity" promise twice that. Lightning 2.6's table, which
LitGPT's `device/mfu` comes from, has the doubled figures for H200 and H100 NVL and those without Tensor Cores for some
others.
"""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """TFLOP/s with operands in 16 bits (added up in 32), in TF32, and in float32 without Tensor Cores."""

    half: float
    tf32: float
    single: float


# By a word of the name that CUDA gives the device, from NVIDIA's data sheets; the first that fits counts.
_PEAKS = {
    "B200": Peak(2250.0, 1125.0, 75.0),
    "H200": Peak(989.4, 494.7, 66.9),
    "H100 NVL": Peak(835.5, 417.5, 60.0),
    "H100 PCIe": Peak(756.0, 378.0, 51.2),
    "H100": Peak(989.4, 494.7, 66.9),
    "A100": Peak(312.0, 156.0, 19.5),
    "A10": Peak(125.0, 62.5, 31.2),
    "L40S": Peak(362.0, 183.0, 91.6),
    "L4": Peak(121.0, 60.0, 30.3),
    "V100": Peak(125.0, 15.7, 15.7),
    "T4": Peak(65.0, 8.1, 8.1),
}
# These have no bfloat16.
_FLOAT16_ONLY = ("V100", "T4")


def peak_flops(device: str, precision: str, matmul_precision: str) -> float | None:
    """Return the floating point operations per second of a GPU in dense matrix products, or None if they are unknown.

    Args:
        device: Its name, as from `torch.cuda.get_device_name`.
        precision: Of the training, as Fabric names it: 32-true, bf16-mixed, ...
        matmul_precision: As from `torch.get_float32_matmul_precision`; anything but highest lets float32 be TF32.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    name = next((name for name in _PEAKS if set(name.split()) <= words), None)
    if name is None or (precision.startswith("bf16") and name in _FLOAT16_ONLY):
        return None
    peak = _PEAKS[name]
    if precision.startswith(("bf16", "16")):
        return 1e12 * peak.half
    return 1e12 * (peak.single if matmul_precision == "highest" else peak.tf32)
