"""The card and the versions that a figure depends on, and whether the card still answers."""

import contextlib
import importlib.util
import platform
import subprocess
from typing import Any

import torch

from gpu_tables.measuring.bench import Bench, described


def environment(bench: Bench) -> dict[str, Any]:
    """Return what a figure depends on."""
    found: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform()
    }  # fmt: skip
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if bench.is_cuda:
        found |= _card()
    return found | {name: importlib.util.find_spec(name) is not None for name in ("flash_attn", "liger_kernel")}


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    found = {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        found |= dict(zip(query.split(","), answer.strip().split(", "), strict=False))
    return found


def is_lost(bench: Bench) -> bool:
    """Return whether the card works no longer for this process, as after an access to a wrong address."""
    if not bench.is_cuda:
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=bench.device).sum().item()
    except torch.OutOfMemoryError:
        return False
    except Exception as error:
        print(f"(the card is lost to this process: {described(error)})", flush=True)
        return True
    return False
