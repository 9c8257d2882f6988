"""Checkpoints beside those of LitGPT's `train.save_interval`: by time, the best, and only the last few."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.checkpoint.store import STATE_FILE, newest_first, publish, remove
from litgpt_moe_ext.training.settings import CheckpointArgs

BEST = "best"


class Retention(Callback):
    """Save by time, keep the best, delete the old.

    Args:
        args: What to keep.
        out_dir: The run's directory.
        fabric: The running `TrainingFabric`.
        save: Saves the present state under a name; every process must call.
    """

    def __init__(self, args: CheckpointArgs, out_dir: Path, fabric: Any, save: Callable[[str], None]) -> None:
        self._args, self._out_dir, self._fabric, self._save = args, out_dir, fabric, save
        self._last_saved = time.monotonic()
        self._best_is_new = False
        self.best_loss: float | None = None

    def on_logged(self, metrics: dict[str, Any]) -> None:
        loss = metrics.get("val_loss")
        if self._args.best and loss is not None and (self.best_loss is None or loss < self.best_loss):
            self.best_loss, self._best_is_new = float(loss), True

    def on_checkpoint_saved(self, directory: Path) -> None:
        self._last_saved = time.monotonic()
        if self._best_is_new:
            # Nothing was trained since the validation, so this checkpoint is that of the best loss.
            self._best_is_new = False
            if self._fabric.is_global_zero and directory.name != BEST:
                link(directory, self._out_dir / BEST)
        if self._fabric.is_global_zero and self._args.keep_last is not None:
            steps = [path for path in newest_first(self._out_dir) if path.name.startswith("step-")]
            for old in steps[self._args.keep_last :]:
                if (old / STATE_FILE).is_file():
                    remove(old)

    def on_step_begin(self, state: dict[str, Any]) -> None:
        if self._best_is_new:
            self._save(BEST)
        if self._args.every_minutes is not None:
            due = time.monotonic() - self._last_saved >= 60 * self._args.every_minutes
            if self._fabric.broadcast(due):
                self._save(f"step-{state['step_count']:08d}")

    def state_dict(self) -> dict[str, Any]:
        """Return the best validation loss so far."""
        return {"best_loss": self.best_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.best_loss = state["best_loss"]


def link(source: Path, target: Path) -> None:
    """Make `target` a copy of a checkpoint that shares the weights, where the file system has hard links."""
    staging = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging, copy_function=_link_or_copy)
    publish(staging, target)


def _link_or_copy(source: str, target: str) -> None:
    # What people edit must not be shared.
    if source.endswith(".pth"):
        try:
            os.link(source, target)
            return
        except OSError:  # the file system has no hard links
            pass
    shutil.copy2(source, target)
