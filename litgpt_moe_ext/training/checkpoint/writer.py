"""Saving the checkpoints of a run: which are refused, and how failures are handled."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from litgpt_moe_ext.host.checkpoints import WEIGHTS_FILE
from litgpt_moe_ext.training.checkpoint import store
from litgpt_moe_ext.training.checkpoint.progress import BEST, FINAL, newest_first, step_of
from litgpt_moe_ext.training.control import TrainingStopped
from litgpt_moe_ext.training.optim.shards import local_part
from litgpt_moe_ext.training.steps.losses import all_finite

if TYPE_CHECKING:
    from litgpt_moe_ext.training.phases.launch import Launched


# Files from which LitGPT opens a tokenizer, exports take the chat template, and LitGPT converts a checkpoint.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "config.json",
)


class CheckpointWriter:
    """Writes checkpoints of the training state.

    Args:
        launched: The connected processes.
        tokenizer_dir: Tokenizer to copy into checkpoints, or None.
        write: LitGPT's `save_checkpoint`, or a function with the same arguments.
        resume_dir: The checkpoint that the run continues from, or None.

    Attributes:
        last_saved: Directory of the last checkpoint that this run wrote, or None.
    """

    def __init__(
        self, launched: Launched, tokenizer_dir: Path | None, write: Callable[..., None], resume_dir: Path | None = None
    ) -> None:
        self._plan, self._fabric = launched.plan, launched.fabric
        self._write = write
        # Read once: LitGPT copies the files at every save, but the corpus may be deleted or moved during a long run.
        found = [] if tokenizer_dir is None else [tokenizer_dir / name for name in _TOKENIZER]
        self._tokenizer = {path.name: path.read_bytes() for path in found if path.is_file()}
        self.last_saved: Path | None = None
        self._tried_at = time.monotonic()
        # Read now: the run may replace it later.
        self._from = None if resume_dir is None else (resume_dir.resolve(), step_of(resume_dir))

    @property
    def is_due(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed since the last attempt to save."""
        minutes = self._plan.settings.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._tried_at >= 60 * minutes

    def save(self, name: str, last: bool = False) -> None:
        """Save the present state under a name in the run's directory; every process must call this.

        Args:
            name: The name.
            last: Whether the run ends with this checkpoint, whatever its name.
        """
        file = self._plan.out_dir / name / WEIGHTS_FILE
        self.save_checkpoint(self._fabric, self._fabric.state, None, file, last)

    def save_checkpoint(
        self, fabric: Any, state: dict, _tokenizer_dir: Path | None, checkpoint_file: Path, last: bool = False
    ) -> None:
        """Save a checkpoint and tell the callbacks; called as LitGPT's `save_checkpoint`.

        Raises:
            TrainingStopped: If it cannot be written and is the last one, or the settings do not say to continue; or if
                it is `best` or `final` and the weights are not finite.
        """
        directory = checkpoint_file.parent
        if directory.name == FINAL and self._from == (directory.resolve(), state["step_count"]):
            # Nothing was trained, and the existing checkpoint may hold more: higher precision, a weight average.
            self.last_saved = directory
            return
        if directory.name in (FINAL, BEST):
            self._require_finite(state, directory.name)
        try:
            store.save_whole(self._write_files, fabric, state, checkpoint_file)
        except store.SaveError as error:
            going_on = self._plan.settings.checkpoint.on_save_error == "continue"
            if not going_on or last or directory.name == FINAL:
                hint = "" if going_on else "; --checkpoint.on_save_error continue trains on without checkpoints"
                raise TrainingStopped(
                    f"{error}. The checkpoints before it are whole{self._newest(', the newest is ')}. "
                    f"Mend the cause, such as a full disk, and continue with --resume auto{hint}."
                ) from error
            fabric.print(f"  {error}. Training goes on without it (checkpoint.on_save_error: continue).")
            return
        finally:
            self._tried_at = time.monotonic()
        self.last_saved = directory
        fabric.call("on_checkpoint_saved", directory=directory)

    def _write_files(self, fabric: Any, state: dict, checkpoint_file: Path) -> None:
        self._write(fabric, state, None, checkpoint_file)
        if fabric.is_global_zero:
            for name, content in self._tokenizer.items():
                checkpoint_file.with_name(name).write_bytes(content)

    def _require_finite(self, state: dict[str, Any], name: str) -> None:
        parameters = (parameter.detach() for parameter in state["model"].parameters())
        finite = all_finite([local_part(parameter) for parameter in parameters])
        if self._fabric.world_size > 1:
            torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
        if not finite:
            raise TrainingStopped(
                f"the weights after step {state['step_count']} are not finite, so they are not saved as "
                f"{name}{self._newest('; the newest checkpoint is ')}. A lower learning rate or a longer warm-up may "
                "help."
            )

    def _newest(self, words: str) -> str:
        return "".join(f"{words}{path}" for path in newest_first(self._plan.out_dir)[:1])
