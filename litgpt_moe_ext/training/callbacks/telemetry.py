"""What a run costs: speed, memory, time spent waiting for data, and how much of the hardware it uses."""

import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.training.callback import Callback


class Telemetry(Callback):
    """Add `tokens_per_second`, `data_wait`, `memory_gb` and, where the device's peak is known, `mfu` to the log.

    `tokens_per_second` counts all processes and everything since the last log line, validation and checkpoints too.
    `data_wait` is the share of that time in which this process waited for batches. `memory_gb` is the highest use so
    far: on a GPU what tensors took there, elsewhere the process's resident memory. `mfu` (PaLM, arXiv:2204.02311) is
    the arithmetic that the model's active parameters and its attention need for these tokens, over what the devices
    could have done in that time; what activation checkpointing computes again is not counted. LitGPT's `device/mfu`
    gives way to it.

    Args:
        device: Of this process.
        world_size: Number of processes.
        peak_flops: Floating point operations per second of one device, or None if unknown.
    """

    def __init__(self, device: torch.device, world_size: int, peak_flops: float | None) -> None:
        self._device, self._world_size, self._peak_flops = device, world_size, peak_flops
        self._flops_per_token: float | None = None
        self._waited = 0.0
        self._previous: tuple[float, int] | None = None

    def on_flops_counted(self, flops_per_token: float) -> None:
        self._flops_per_token = flops_per_token

    def on_batch(self, batch: Tensor, waited: float) -> None:
        self._waited += waited

    def on_log(self, metrics: dict[str, Any]) -> None:
        if "loss" not in metrics:
            return
        now, tokens = time.perf_counter(), metrics["total_tokens"]
        metrics.pop("device/mfu", None)
        if self._previous is not None and now > self._previous[0]:
            seconds = now - self._previous[0]
            metrics["tokens_per_second"] = (tokens - self._previous[1]) / seconds
            metrics["data_wait"] = self._waited / seconds
            if self._peak_flops is not None and self._flops_per_token is not None:
                flops = self._flops_per_token * metrics["tokens_per_second"]
                metrics["mfu"] = flops / (self._world_size * self._peak_flops)
        self._previous, self._waited = (now, tokens), 0.0
        if (memory := peak_memory_gb(self._device)) is not None:
            metrics["memory_gb"] = memory


def peak_memory_gb(device: torch.device) -> float | None:
    """Return the highest use of memory so far in GB (1e9 bytes), or None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        # Not `ru_maxrss`: a process inherits that of the one that started it.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split(None, 1)[0]) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class Peak(NamedTuple):
    """TFLOP/s of dense products: operands in 16 bits (added up in 32), in TF32, in float32 without Tensor Cores."""

    half: float
    tf32: float
    single: float


# Lightning 2.6's table, which LitGPT's `device/mfu` comes from, has figures with sparsity for H200 and H100 NVL, twice
# the dense ones, and those without Tensor Cores for some others.
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
