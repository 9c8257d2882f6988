"""Callbacks for tests of signals: one sends its own process a signal, the other waits for one."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

from litgpt_moe_ext.training.callback import Callback


@dataclass
class SignalInValidation(Callback):
    """Sends SIGTERM in the first batch of a step's validation.

    Args:
        rank: Of the process that receives it.
        step: The step.
    """

    rank: int
    step: int

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Look at every pass of the model."""

        def look(*_: Any) -> None:
            here = fabric.global_rank == self.rank and fabric.attempt == 1 and fabric.step == self.step
            if here and not module.training and not fabric.stop_requests.received:
                os.kill(os.getpid(), signal.SIGTERM)

        module.register_forward_pre_hook(look)


@dataclass
class WaitForSignal(Callback):
    """Holds a process after the line of a step until a signal asks it to stop, or kills it.

    However late somebody reads that line, the run has not gone on meanwhile.

    Args:
        steps: The steps.
        rank: Of the process that will receive the signal.
    """

    steps: list[int]
    rank: int = 0

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Keep the fabric, which knows the step."""
        self._fabric = fabric

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """Wait, if it is the line of such a step."""
        if "loss" in metrics and self._fabric.step in self.steps and self._fabric.global_rank == self.rank:
            while not self._fabric.stop_requests.received:
                time.sleep(0.01)


def wait_for_signal(*steps: int, rank: int = 0) -> list[dict[str, Any]]:
    """Return the `callbacks` of a recipe that waits for a signal after some steps."""
    name = f"{WaitForSignal.__module__}.{WaitForSignal.__qualname__}"
    return [{"class_path": name, "init_args": {"steps": list(steps), "rank": rank}}]
