"""Where the runs of a study are trained: on which device each is, what it shares with others, and by which code."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt_moe_ext import __version__
from litgpt_moe_ext.machine import count_cores

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Places:
    """Room for several runs at a time.

    Attributes:
        jobs: Runs at a time.
        gpus: GPUs among which they are shared out; 0 trains on the CPU.
    """

    jobs: int = 1
    gpus: int = 0

    @property
    def together(self) -> int:
        """How many runs at most use a GPU, or a core, at a time."""
        return -(-self.jobs // (self.gpus or count_cores()))

    def environment(self, place: int) -> dict[str, str]:
        """Return the environment of the run in a place, a number from 0: that of this process, with its share."""
        # Several processes with one thread each are faster than one process with several.
        environment = {"OMP_NUM_THREADS": str(max(1, count_cores() // self.jobs)), **os.environ}
        if self.gpus:
            names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
            gpu = place % self.gpus
            environment["CUDA_VISIBLE_DEVICES"] = names[gpu] if gpu < len(names) else str(gpu)
        return environment


@dataclass(frozen=True)
class TrainedOn:
    """What a finished run was trained on.

    Attributes:
        device: Name of the GPU, or CPU.
        precision: Of the calculation, as Fabric calls it, where the run's settings name none.
        together: How many runs used the device, or a core of it, at a time.
        software: This package, by version or commit, and torch; empty where that is not known.
    """

    device: str
    precision: str
    together: int
    software: str = ""

    @classmethod
    def here(cls, places: Places, place: int) -> "TrainedOn":
        """Return what describes the run in a place on this machine."""
        import torch

        from litgpt_moe_ext.training.parallel.accelerator import accelerator_here, default_precision

        device = torch.cuda.get_device_name(place % places.gpus) if places.gpus else "CPU"
        software = f"litgpt_moe_ext {code_version()}, torch {torch.__version__}"
        return cls(device, default_precision(accelerator_here()), places.together, software)

    @classmethod
    def read(cls, content: Mapping[str, Any], precision: str | None) -> "TrainedOn | None":
        """Return what a finished run's file says, None where it says nothing.

        Args:
            content: The file's.
            precision: Of the run's settings.
        """
        found = content.get("trained_on")
        return None if found is None else cls(**(found | ({"precision": precision} if precision else {})))

    def __str__(self) -> str:
        alone = "each run alone" if self.together == 1 else f"up to {self.together} runs at a time"
        what = "on a GPU" if self.device != "CPU" else "on a core"
        return f"{self.device}, {self.precision}, {alone} {what}"


def code_version(package: Path = _PACKAGE) -> str:
    """Return the version of this package, with its commit where git keeps it, as `0.1.0, commit 0123456789ab+changes`.

    Args:
        package: Its folder.
    """
    # Installed into an environment inside somebody's repository, it is not that repository's.
    if not _git(package, "ls-files", "__init__.py"):
        return __version__
    changes = "+changes" if _git(package, "status", "--porcelain", "--", ".") else ""
    return f"{__version__}, commit {_git(package, 'rev-parse', '--short=12', 'HEAD')}{changes}"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or not a repository
        return ""
