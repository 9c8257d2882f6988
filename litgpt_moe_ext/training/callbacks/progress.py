"""The output of a run: a progress bar in a terminal, one line per log interval elsewhere."""

import re
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.interruption import Terminated
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.control import Deadline, TrainingInterrupted, TrainingStopped
from litgpt_moe_ext.training.logs.transcript import Transcript
from litgpt_moe_ext.training.steps.corpora import PREFIX
from litgpt_moe_ext.wording import abbreviated

# LitGPT's own lines that are wrong, or that the lines below replace.
_REPLACED = re.compile(
    r"Epoch \d+ \| iter |iter \d+: val loss |Final evaluation \| |Validating \.\.\.$|Saving checkpoint to '"
    r"|Resuming training from |Time to instantiate model: |Total parameters: |Measured TFLOPs: "
    r"|-{40}$|\| (-{40}$|Performance$|Memory Usage$|- (Total tokens|Training Time|Tok/sec|Memory Used) )"
)


class Reporter(Callback):
    """Show messages, and the progress of training from LitGPT's log lines.

    Args:
        total_steps: Optimizer steps of the whole training.
        bar: Whether to draw a progress bar.
        deadline: May end the training before its last step. Default: none.

    Attributes:
        total_steps: As given.
        deadline: As given.
        transcript: Receives every line, including those that a bar replaces in the terminal.
        val_loss: Loss of the last validation.
    """

    def __init__(self, total_steps: int, bar: bool, deadline: Deadline | None = None) -> None:
        self.total_steps = total_steps
        self.deadline = deadline or Deadline(None)
        self._draw = bar
        self.transcript = Transcript()
        self._progress: Progress | None = None
        self._task: Any = None
        self._first: tuple[float, int] | None = None
        self.val_loss: float | None = None

    def show(self, message: str) -> None:
        """Print a message (above the bar, if there is one), unless it is one of LitGPT's that we replace."""
        if _REPLACED.match(message) is None:
            self.say(message)

    def say(self, message: str) -> None:
        """Print a message."""
        if self._progress is not None:
            self._progress.console.print(escape(message))
            self.transcript.line(message)
        else:
            print(message, flush=True)

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """Show a training or validation line."""
        if "val_loss" in metrics:
            self.val_loss = float(metrics["val_loss"])
            corpora = [
                f"{name.removeprefix(PREFIX)} {loss:.4f}" for name, loss in metrics.items() if name.startswith(PREFIX)
            ]
            parts = f" ({', '.join(corpora)})" if corpora else ""
            self.say(f"  validation loss {self.val_loss:.4f}{parts}, perplexity {float(metrics['val_ppl']):.2f}")
        elif "loss" in metrics:
            self._training(metrics)

    def on_checkpoint_saved(self, directory: Path) -> None:
        """Say where a checkpoint is."""
        self.say(f"  saved {directory}")

    def _training(self, metrics: dict[str, Any]) -> None:
        now = time.perf_counter()
        parts = [f"loss {metrics['loss']:.3f}"]
        if self.val_loss is not None:
            parts.append(f"val {self.val_loss:.3f}")
        if "moe/max_vio" in metrics:
            parts.append(f"MaxVio {metrics['moe/max_vio']:.2f}")
        if "grad_norm" in metrics:
            parts.append(f"grad {metrics['grad_norm']:.2f}")
        parts.append(f"lr {metrics['learning_rate']:.1e}")
        if "tokens_per_second" in metrics:
            parts.append(f"{abbreviated(metrics['tokens_per_second'])} tok/s")
        if metrics.get("padding"):
            parts.append(f"padding {metrics['padding']:.0%}")
        if "mfu" in metrics:
            parts.append(f"MFU {metrics['mfu']:.1%}")
        if "memory_gb" in metrics:
            parts.append(f"{metrics['memory_gb']:.2f} GB")
        if metrics.get("data_wait", 0.0) >= 0.01:
            parts.append(f"data wait {metrics['data_wait']:.0%}")
        left = self._time_left(now, metrics["step"])
        if self._draw:
            self._update_bar(metrics["step"], left or "-:--:--", " · ".join(parts))
        if left:
            parts.append(f"{left} left")
        line = " | ".join([f"step {metrics['step']}/{self.total_steps}", *parts])
        if self._draw:
            self.transcript.line(line)
        else:
            print(line, flush=True)

    def _time_left(self, now: float, step: int) -> str:
        self._first = self._first or (now, step)
        started, first_step = self._first
        if step == first_step:
            return ""
        seconds = (now - started) / (step - first_step) * (self.total_steps - step)
        return str(timedelta(seconds=round(min(seconds, self.deadline.seconds_left))))

    def _update_bar(self, step: int, left: str, text: str) -> None:
        if self._progress is None:
            self._progress = Progress(
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(self.total_steps)) + 1)),
                BarColumn(bar_width=10),
                TextColumn("[progress.remaining]{task.fields[left]}", table_column=Column(no_wrap=True, min_width=7)),
                # If the terminal is too narrow, the end of the text is cut off, where it matters least.
                TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                console=Console(
                    highlight=False, soft_wrap=True, file=getattr(sys.stdout, "rich_proxied_file", sys.stdout)
                ),
                expand=True,
            )
            self._progress.start()
            self.transcript.record()
            self._task = self._progress.add_task("", total=self.total_steps, completed=step, left=left)
        self._progress.update(self._task, completed=step, description=text, left=left)

    def close(self, step: int, error: BaseException | None = None) -> None:
        """Stop the bar at the last step, which need not have been logged, and continue below it.

        Args:
            step: Finished optimizer steps.
            error: The error that ends the run; the command prints it after the transcript is closed.
        """
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
            self._progress.stop()
            self._progress = None
        if error is not None:
            if isinstance(error, (SettingsError, TrainingStopped, TrainingInterrupted, KeyboardInterrupt, Terminated)):
                self.transcript.line(f"{type(error).__name__}: {error}")
            else:
                self.transcript.line("".join(traceback.format_exception(error)).rstrip())
