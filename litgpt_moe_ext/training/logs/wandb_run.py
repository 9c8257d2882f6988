"""Which W&B run a training logs to: its own, which a resumed training continues.

With `resume=True`, as LitGPT passes it, W&B continues the last run started that way in the working directory that did
not end well. That may be another training, killed or still running. So checkpoints record the id of their run.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Literal

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.checkpoint.progress import newest_first

FILE_NAME = "wandb_run.txt"
_ID = re.compile(r"[\w-]{1,128}", re.ASCII)


def options(resume: bool | Literal["auto"] | Path, out_dir: Path) -> dict[str, Any]:
    """Return the arguments of Lightning's `WandbLogger` that choose the run.

    Args:
        resume: As in recipes.
        out_dir: The run's directory.
    """
    import wandb

    # A run named by the user takes precedence. An offline run cannot be continued: once both parts are sent, W&B would
    # confuse their steps.
    if "WANDB_RUN_ID" in os.environ or wandb.setup().settings.mode == "offline":
        return {"resume": "allow"}
    return {"resume": "allow", "id": run_of_checkpoint(resume, out_dir)}


def run_of_checkpoint(resume: bool | Literal["auto"] | Path, out_dir: Path) -> str | None:
    """Return the id of the W&B run that a training continues, or None for a new one."""
    if resume is False:
        return None
    place = out_dir if resume in (True, "auto") else Path(resume)
    if place.suffix == ".pth":
        place = place.parent
    for directory in (place, *newest_first(place)):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            found = (directory / FILE_NAME).read_text(encoding="utf-8").strip()
            return found if _ID.fullmatch(found) else None
    return None


class WandbRun(Callback):
    """Write the run's id into every checkpoint; only for the first process, the only one that logs.

    Args:
        logger: Lightning's `WandbLogger`.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def on_checkpoint_staged(self, directory: Path) -> None:
        """Write the id."""
        (directory / FILE_NAME).write_text(f"{self._logger.version}\n", encoding="utf-8")
