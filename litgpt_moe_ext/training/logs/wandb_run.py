"""Which run of W&B a training logs to: one of its own, in which it goes on when it is resumed.

With `resume=True`, as LitGPT has it, W&B takes the run that was last started like that in the working directory and has
not ended well, whichever training that was: another one that was killed, or still goes on. So checkpoints say which one
is theirs.
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

    # What somebody names goes before, and what W&B has not received yet cannot be gone on with: it would take the
    # steps of one part for those of the other when both are sent.
    if "WANDB_RUN_ID" in os.environ or wandb.setup().settings.mode == "offline":
        return {"resume": "allow"}
    return {"resume": "allow", "id": run_of_checkpoint(resume, out_dir)}


def run_of_checkpoint(resume: bool | Literal["auto"] | Path, out_dir: Path) -> str | None:
    """Return the id of the run of W&B that a training goes on with, or None for a new one."""
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
    """Write the id into every checkpoint; for the first process, which alone logs.

    Args:
        logger: Lightning's `WandbLogger`.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def on_checkpoint_staged(self, directory: Path) -> None:
        """Write it."""
        (directory / FILE_NAME).write_text(f"{self._logger.version}\n", encoding="utf-8")
