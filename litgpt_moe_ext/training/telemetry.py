"""What a run costs: speed, memory, and time spent waiting for data."""

import sys
import time
from typing import Any

import torch


class Telemetry:
    """Adds `tokens_per_second`, `data_wait` and `memory_gb` to the log.

    `tokens_per_second` counts all processes and everything since the last log line, validation and checkpoints too.
    `data_wait` is the share of that time in which this process waited for batches. `memory_gb` is the highest use so
    far: on a GPU what tensors took there, elsewhere the process's resident memory.

    Args:
        device: Of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waited = 0.0
        self._previous: tuple[float, int] | None = None

    def on_batch(self, waited: float, **_context: Any) -> None:
        self._waited += waited

    def on_log(self, metrics: dict[str, Any]) -> None:
        if "loss" not in metrics:
            return
        now, tokens = time.perf_counter(), metrics["total_tokens"]
        if self._previous is not None and now > self._previous[0]:
            seconds = now - self._previous[0]
            metrics["tokens_per_second"] = (tokens - self._previous[1]) / seconds
            metrics["data_wait"] = self._waited / seconds
        self._previous, self._waited = (now, tokens), 0.0
        if (memory := peak_memory_gb(self._device)) is not None:
            metrics["memory_gb"] = memory


def peak_memory_gb(device: torch.device) -> float | None:
    """Return the highest use of memory so far in GB (1e9 bytes), or None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
