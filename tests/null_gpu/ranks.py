"""Processes of one program on null GPUs, a GPU each, with the variables that a launcher sets."""

import os
import subprocess
import sys
from pathlib import Path

from tests import null_gpu
from tests.runs import ROOT
from tests.training.processes import free_port


def start(gpu: Path, ranks: int, *command: str | Path, **environment: str) -> list[subprocess.Popen[str]]:
    """Start Python with a command in each of several ranks; it sees all of their GPUs.

    Args:
        gpu: What `null_gpu.build` returned.
        ranks: Their number.
        *command: What comes after `python`.
        **environment: More variables.
    """
    common = {
        **null_gpu.environment(gpu, 89, devices=ranks),
        "TRITON_INTERPRET": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NULL_GPU_SECONDS": "60",
    }
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
        )
        for rank in range(ranks)
    ]  # fmt: skip


def outputs(gpu: Path, ranks: int, *command: str | Path, **environment: str) -> list[str]:
    """Return what each rank of a command prints, which must succeed."""
    processes = start(gpu, ranks, *command, **environment)
    found = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(found)[-8000:]
    return found
