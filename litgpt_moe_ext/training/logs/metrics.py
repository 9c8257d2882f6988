"""The two tables of a run: `metrics.csv` for people, `metrics-wide.csv` with every metric."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.logs import METRICS_FILE, WIDE_FILE
from litgpt_moe_ext.training.logs.table import StepTable

if TYPE_CHECKING:
    from litgpt_moe_ext.training.fabric import TrainingFabric

# Columns of `metrics.csv`, and the metrics that they show.
COLUMNS = {
    "step": "step",
    "epoch": "epoch",
    "tokens": "total_tokens",
    "iter_tokens": "iter_tokens",
    "train_loss": "loss",
    "val_loss": "val_loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "max_vio": "moe/max_vio",
    "tokens_per_second": "tokens_per_second",
    "time": "time",
}
_FIRST = ("step", "epoch", "iter", "tokens", "total_tokens", "loss", "val_loss", "val_ppl", "learning_rate")


class MetricsTables(Callback):
    """Write `metrics.csv`: one row per logged step, with the same columns in every run and for every logger.

    `tokens` are those trained on so far, `iter_tokens` those of one optimizer step, both over all processes and with
    padding; `time` is in seconds since the training began, without the pauses before resumes.

    `metrics-wide.csv` has every metric, its columns in groups: training, all MoE layers together, each layer, load of
    the experts.

    Args:
        out_dir: The run's directory.
        tokens_per_step: Tokens per optimizer step, over all ranks.
        wide: Whether to write `metrics-wide.csv` as well.
        fabric: The running Fabric, which knows the step and prints if writing fails.
    """

    def __init__(self, out_dir: Path, tokens_per_step: int, wide: bool, fabric: TrainingFabric) -> None:
        # Keep columns that the user added to the table.
        self._table = StepTable(
            out_dir / METRICS_FILE, lambda there, _: list(dict.fromkeys([*COLUMNS, *there])), fabric.print
        )
        self._wide = StepTable(out_dir / WIDE_FILE, grouped, fabric.print) if wide else None
        self._tokens_per_step, self._fabric = tokens_per_step, fabric
        self._began = 0.0

    def on_fit_begin(self, resume_dir: Path | None) -> None:
        """Continue the tables of the resumed run, or begin new ones."""
        step = None if resume_dir is None else self._fabric.step
        last = self._table.start(step)
        self._began = time.monotonic()
        with contextlib.suppress(ValueError):  # the user may have edited the table
            self._began -= float(last.get("time") or 0.0)
        if self._wide is not None:
            self._wide.start(step)

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """Write a line: all of it to the wide table, to the other if it is of training or validation."""
        if self._wide is not None:
            self._wide.put(self._fabric.step, metrics)
        values = {column: metrics[name] for column, name in COLUMNS.items() if name in metrics}
        if "loss" in metrics:
            values["iter_tokens"] = self._tokens_per_step
        elif "val_loss" not in metrics:
            return
        values["time"] = round(time.monotonic() - self._began, 3)
        self._table.put(self._fabric.step, values)


def grouped(present: Sequence[str], new: Sequence[str]) -> list[str]:
    """Return columns in the order of `metrics-wide.csv`."""
    names = list(dict.fromkeys([*present, *new]))

    def key(name: str) -> tuple:
        if name in _FIRST:
            return 0, _FIRST.index(name), ""
        if not name.startswith("moe"):
            return 1, names.index(name), ""
        group, _, rest = name.partition("/")
        layer = int(found[0]) if (found := re.findall(r"\d+", group)) else -1
        return 2 + group.startswith("moe_layer") + 2 * group.startswith("moe_load"), layer, rest

    return sorted(names, key=key)
