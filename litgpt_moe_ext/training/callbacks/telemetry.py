"""The cost of a run: speed, memory, time spent waiting for data, and hardware utilization."""

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
    `data_wait` is the share of that time in which this process waited for batches. `memory_gb` is the peak so far: of
    tensors on a GPU, otherwise of the process's resident memory. `mfu` (PaLM, arXiv:2204.02311) is the arithmetic that
    the active parameters and the attention need for these tokens, over what the devices could have done in that time;
    recomputation for activation checkpointing is not counted.

    Args:
        device: Device of this process.
        world_size: Number of processes.
        peak_flops: Floating point operations per second of one device, or None if unknown.
    """

    def __init__(self, device: torch.device, world_size: int, peak_flops: float | None) -> None:
        self._device, self._world_size, self._peak_flops = device, world_size, peak_flops
        self._flops_per_token: float | None = None
        self._waited = 0.0
        self._previous: tuple[float, int] | None = None
        if device.type == "cuda":  # an earlier run of this process may have had a higher peak
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
    """Return the peak memory so far in GB (1e9 bytes), or None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    if sys.platform == "linux":
        # Not `ru_maxrss`, which a process inherits from its parent.
        found = re.search(rb"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_bytes(), re.MULTILINE)
        return None if found is None else int(found[1]) * 1024 / 1e9  # some sandboxes leave it out
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
