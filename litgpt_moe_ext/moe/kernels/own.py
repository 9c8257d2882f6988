"""The backends of this package: what each can do, and which is preferred where.

| name          | implementation                                                            | waits for the GPU   |
| ------------- | ------------------------------------------------------------------------- | ------------------- |
| `grouped_mm`  | torch's grouped product, native in bfloat16 on capabilities 9.x and 10.x  | where it is emulated |
| `triton`      | the package's own kernels, from compute capability 7.5; on Hopper in      | no                  |
|               | bfloat16 the gradients of wide weights are torch's grouped product        |                     |
| `grouped_cpu` | one expert after the other on a CPU, with a backward pass written by hand |                     |
| `loop`        | one expert after the other with ordinary operators, everywhere            | in every layer      |
"""

import os

import torch

from litgpt_moe_ext.kernels import launch
from litgpt_moe_ext.kernels.gpu import triton_knows
from litgpt_moe_ext.moe.kernels.backend import ExpertBackend, Place, Preference
from litgpt_moe_ext.moe.kernels.cpu import grouped_cpu_experts
from litgpt_moe_ext.moe.kernels.grouped import grouped_mm_experts, triton_experts
from litgpt_moe_ext.moe.kernels.loop import loop_experts


def _needs_cpu(place: Place) -> str | None:
    return None if place.device == "cpu" else f"it works on cpu tensors, these are on {place.device}"


def _needs_strides(place: Place) -> str | None:
    if place.dtype.itemsize >= 8:
        return f"it has no {place.dtype}"
    if any(width * place.dtype.itemsize % 16 for width in place.widths):
        return f"it needs widths in multiples of 16 bytes, not {place.widths[0]} and {place.widths[1]}"
    return None


def _needs_triton(place: Place) -> str | None:
    interpreted = place.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if place.device not in ("cuda", "hip") and not interpreted:
        return f"it works on cuda tensors (on cpu ones under TRITON_INTERPRET=1), these are on {place.device}"
    if (reason := launch.triton_obstacle()) is not None:
        return reason
    if place.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no {place.dtype}"
    if not triton_knows(place.chip):
        return f"it has no products for {place.chip}"
    if place.capability is not None and place.capability < (7, 5):
        return f"it needs compute capability 7.5, this card has {place.capability[0]}.{place.capability[1]}"
    if place.capability is not None and place.capability < (8, 0) and place.dtype == torch.bfloat16:
        return "bfloat16 needs compute capability 8.0 (use precision 16-mixed)"
    return None


OWN_BACKENDS = (
    ExpertBackend("loop", loop_experts, lambda place: None),
    ExpertBackend("grouped_cpu", grouped_cpu_experts, _needs_cpu),
    ExpertBackend("grouped_mm", grouped_mm_experts, _needs_strides, adds=True),
    ExpertBackend("triton", triton_experts, _needs_triton, adds=True),
)

# The first that covers a place decides. The loops read how many rows each expert has, which compilers cannot trace.
OWN_PREFERENCES = (
    # Measured on an H200, where Triton saves the copies of rows; Blackwell for data centres has not been measured yet.
    Preference(("triton", "grouped_mm", "loop"), device="cuda", majors=(9,), dtypes=(torch.bfloat16,)),
    Preference(("grouped_mm", "triton", "loop"), device="cuda", majors=(10,), dtypes=(torch.bfloat16,)),
    Preference(("triton", "loop"), device="cuda"),
    Preference(("triton", "loop"), device="hip"),
    Preference(("grouped_mm", "loop"), device="cpu", compiling=True),
    Preference(("grouped_cpu", "loop"), device="cpu"),
    Preference(("loop",)),
)
