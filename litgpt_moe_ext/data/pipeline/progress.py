"""The progress of preparing a corpus: a bar in a terminal, occasional lines elsewhere."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from litgpt_moe_ext.terminal import redraws

_LINE_SECONDS = 30.0


class PreparationProgress:
    """Shows a stage, the bytes read, MB/s and the remaining time; a context manager.

    Args:
        total: Bytes to read in a stage; 0 if unknown.
        show: False shows nothing.
    """

    def __init__(self, total: int, show: bool = True) -> None:
        self._total = total or None
        self._lines = show and not redraws(sys.stderr)
        self._bar: Progress | None = None
        if show and not self._lines:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=self._total)
        self._stage = ""
        self._started = self._shown = (0.0, 0)

    def __enter__(self) -> "PreparationProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, done: int = 0) -> None:
        """Begin a stage with `done` bytes already done."""
        self._stage, self._started = name, (time.monotonic(), done)
        self._shown = self._started
        if self._bar is not None:
            self._bar.reset(self._task, description=name, total=self._total, completed=done)

    def update(self, done: int) -> None:
        """Show that `done` bytes of the stage are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif self._lines and (now := time.monotonic()) - self._shown[0] >= _LINE_SECONDS:
            self._shown = (now, done)
            print(self.describe(now, done), file=sys.stderr, flush=True)

    def describe(self, now: float, done: int) -> str:
        """Return the state as text, at a time of `time.monotonic`."""
        started, before = self._started
        speed = (done - before) / max(now - started, 1e-9)
        words = f"{self._stage}: {done / 1e6:,.0f} MB"
        if self._total:
            words += f" of {self._total / 1e6:,.0f} MB ({100 * done / self._total:.0f}%)"
        words += f", {speed / 1e6:.1f} MB/s"
        if self._total and speed > 0:
            words += f", {timedelta(seconds=round((self._total - done) / speed))} left"
        return words
