"""Faults to put into the code, each of which an attack must find: otherwise it shows nothing."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_in_place() -> None:
    """Copy a checkpoint to its name file by file, instead of renaming it."""
    from litgpt_moe_ext.training.checkpoint import store

    def publish(staging: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(staging, target)
        shutil.rmtree(staging)

    store.publish = publish


def flush_nothing() -> None:
    """Rename a checkpoint that may not be on the disk yet."""
    os.fsync = lambda _file: None


def forget_the_best() -> None:
    """Do not look for the best that a killed run had no time to link."""
    from litgpt_moe_ext.training.callbacks.retention import Retention

    Retention._find_best = lambda *_: None


def forget_the_average() -> None:
    """Begin the average anew when a run is resumed."""
    from litgpt_moe_ext.training.callbacks.ema import WeightAverage

    begin = WeightAverage.on_fit_begin
    WeightAverage.on_fit_begin = lambda self, resume_dir: begin(self, None)


def leave_the_generators() -> None:
    """Do not set the random generators when a run is resumed."""
    from litgpt_moe_ext.training.parallel import random_state

    random_state.restore = lambda _state, _device: True


def round_the_weights() -> None:
    """Save weights in half the precision."""
    save = torch.save

    def rounded(content: Any, path: Any) -> None:
        if isinstance(content, dict) and "step_count" in content:
            content = {**content, "model": {name: t.bfloat16().to(t.dtype) for name, t in content["model"].items()}}
        save(content, path)

    torch.save = rounded


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        write_in_place,
        flush_nothing,
        forget_the_best,
        forget_the_average,
        leave_the_generators,
        round_the_weights,
    )
}
