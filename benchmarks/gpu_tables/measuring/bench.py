"""The device, and the time that calls take there."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

from gpu_tables.measuring.budget import Budget

# Cycles of the device's clock before what is measured "ahead", 8 to 10 ms.
_HEAD_START = 16_000_000


class Bench:
    """Where and how long to measure.

    Args:
        device: Where.
        tiny: Whether to take toy sizes.
        minutes: After which nothing new is begun.
    """

    def __init__(self, device: str, tiny: bool, minutes: float) -> None:
        self.device, self.tiny, self.budget = torch.device(device), tiny, Budget(minutes)
        self.is_cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16
        if self.is_cuda and torch.cuda.get_device_capability() < (8, 0):
            self.dtype = torch.float16
        self.rounds = 3 if tiny else 9
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Say what is missing from a table, and keep it for the file."""
        print(f"({text})", flush=True)
        self.notes.append(text)

    def medians(self, calls: dict[str, Callable[[], object]], ahead: bool = False) -> dict[str, float | None]:
        """Return the median milliseconds of calls that take turns; None for those that fail.

        Args:
            calls: What to measure.
            ahead: Whether the host has a head start, as in a training step, where it is layers ahead of the device.
                Then only those who wait for the device are measured with the host's time.
        """
        times: dict[str, list[float]] = {}
        for name, call in calls.items():
            if self.works(name, call):
                call()
                times[name] = []
        for turn in range(self.rounds):
            for name in list(times) if turn % 2 == 0 else reversed(list(times)):
                times[name].append(self._milliseconds(calls[name], ahead))
            # Two of each are enough to go on with.
            if self.budget.is_spent and turn:
                break
        return {name: statistics.median(times[name]) if name in times else None for name in calls}

    def works(self, name: str, call: Callable[[], object]) -> bool:
        """Return whether a contender works at all, and note why not; others' layers may want other versions."""
        try:
            call()
            if self.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            self.note(f"{name} is left out: {described(error)}")
            return False
        return True

    def host_ms(self, call: Callable[[], object]) -> float | None:
        """Return how long the host takes to start a call, milliseconds; None without a device."""
        if not self.is_cuda:
            return None
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def free_memory(self) -> None:
        """Give back what is no longer used, for what is measured next."""
        if self.is_cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def _milliseconds(self, call: Callable[[], object], ahead: bool) -> float:
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(_HEAD_START)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def described(error: Exception) -> str:
    """Return an error in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a / b, if both were measured."""
    return a / b if a and b else None
