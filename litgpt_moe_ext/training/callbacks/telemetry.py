"""What a run costs: speed, memory, time spent waiting for data, and how much of the hardware it uses."""

import re
import sys
import time
from pathlib import Path
from typing import Any

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
        if device.type == "cuda":  # the highest of an earlier run of this process may be higher
            torch.cuda.reset_peak_memory_stats(device)

    def on_flops_counted(self, flops_per_token: float) -> None:
        """Note the arithmetic of a token."""
        self._flops_per_token = flops_per_token

    def on_batch(self, batch: Tensor, waited: float) -> None:
        """Add up the waiting."""
        self._waited += waited

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add the measurements to a line of training."""
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
    """Return the highest use of memory so far in GB (1e9 bytes), or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        # Not `ru_maxrss`: a process inherits that of the one that started it.
        found = re.search(rb"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_bytes(), re.MULTILINE)
        return None if found is None else int(found[1]) * 1024 / 1e9  # some sandboxes leave it out
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
