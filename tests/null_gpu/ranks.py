"""Processes of one program on null GPUs, a GPU each, with the variables that a launcher sets."""

import os
import subprocess
import sys
from pathlib import Path

from tests import null_gpu
from tests.runs import PATIENCE, ROOT
from tests.training.processes import free_port


def start(
    gpu: Path, ranks: int, *command: str | Path, machines: int = 1, **environment: str
) -> list[subprocess.Popen[str]]:
    """Start Python with a command in each of several ranks; it sees all of their GPUs on its machine.

    Args:
        gpu: What `null_gpu.build` returned.
        ranks: Their number.
        *command: What comes after `python`.
        machines: Among how many they are divided, as far as they know.
        **environment: More variables.
    """
    local = ranks // machines
    common = {
        **null_gpu.environment(gpu, 89, devices=local),
        "TRITON_INTERPRET": "1",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "NULL_GPU_SECONDS": str(PATIENCE // 2),
    }
    places = [
        {"RANK": rank, "LOCAL_RANK": rank % local, "GROUP_RANK": rank // local, "NCCL_HOSTID": rank // local}
        for rank in range(ranks)
    ]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **common, **{name: str(value) for name, value in place.items()}, **environment},
        )
        for place in places
    ]  # fmt: skip


def outputs(gpu: Path, ranks: int, *command: str | Path, machines: int = 1, **environment: str) -> list[str]:
    """Return what each rank of a command prints, which must succeed."""
    return finished(start(gpu, ranks, *command, machines=machines, **environment))


def finished(ranks: list[subprocess.Popen[str]], status: int = 0) -> list[str]:
    """Return what the ranks of a command print, which must end with a status."""
    found = [rank.communicate(timeout=PATIENCE)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status] * len(ranks), "\n".join(found)[-8000:]
    return found
