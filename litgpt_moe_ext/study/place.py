"""Where the runs of a study are trained: on which device, shared with how many others, and with which code."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from litgpt_moe_ext.machine import count_cores
from litgpt_moe_ext.software import software


@dataclass(frozen=True)
class Places:
    """Places for several runs at a time.

    Attributes:
        jobs: Runs at a time.
        gpus: GPUs to distribute them over; 0 trains on the CPU.
    """

    jobs: int = 1
    gpus: int = 0

    @property
    def together(self) -> int:
        """Maximum number of runs that use a GPU, or a core, at a time."""
        return -(-self.jobs // (self.gpus or count_cores()))

    def environment(self, place: int) -> dict[str, str]:
        """Return the environment of the run in a place (from 0): this process's, with its share of cores and GPUs."""
        # Several processes with one thread each are faster than one process with several.
        environment = {"OMP_NUM_THREADS": str(max(1, count_cores() // self.jobs)), **os.environ}
        if self.gpus:
            names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
            gpu = place % self.gpus
            environment["CUDA_VISIBLE_DEVICES"] = names[gpu] if gpu < len(names) else str(gpu)
        return environment


@dataclass(frozen=True)
class TrainedOn:
    """Where and with what a finished run was trained.

    Attributes:
        device: Name of the GPU, or CPU.
        precision: Precision by Fabric's name, if the run's settings name none.
        together: How many runs used the device, or a core of it, at a time.
        software: Version or commit of this package, and version of torch; empty if unknown.
    """

    device: str
    precision: str
    together: int
    software: str = ""

    @classmethod
    def here(cls, places: Places, place: int) -> "TrainedOn":
        """Return the description for a run in a place on this machine."""
        import torch

        from litgpt_moe_ext.training.parallel.accelerator import accelerator_here, default_precision

        device = torch.cuda.get_device_name(place % places.gpus) if places.gpus else "CPU"
        return cls(device, default_precision(accelerator_here()), places.together, software())

    @classmethod
    def read(cls, content: Mapping[str, Any], precision: str | None) -> "TrainedOn | None":
        """Return the description in a finished run's file, or None if it has none.

        Args:
            content: Content of the file.
            precision: Precision in the run's settings.
        """
        found = content.get("trained_on")
        return None if found is None else cls(**(found | ({"precision": precision} if precision else {})))

    def __str__(self) -> str:
        alone = "each run alone" if self.together == 1 else f"up to {self.together} runs at a time"
        what = "on a GPU" if self.device != "CPU" else "on a core"
        return f"{self.device}, {self.precision}, {alone} {what}"
