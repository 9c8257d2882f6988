"""Which checkpoints are kept: the best one and the last few."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.checkpoint.progress import BEST, STATE_FILE, newest_first, read_progress
from litgpt_moe_ext.training.checkpoint.resume import problem_with
from litgpt_moe_ext.training.checkpoint.store import link, remove
from litgpt_moe_ext.training.parallel.agreement import agree
from litgpt_moe_ext.training.settings import CheckpointArgs

if TYPE_CHECKING:
    from litgpt_moe_ext.training.fabric import TrainingFabric


@dataclass(frozen=True)
class Best:
    """The lowest validation loss, and the checkpoint that had it.

    Attributes:
        loss: In nats per token.
        attempt: As in `Progress`.
        step: As in `Progress`.
    """

    loss: float
    attempt: int
    step: int

    def is_in(self, directory: Path) -> bool:
        """Return whether a checkpoint holds the weights with this loss."""
        progress = read_progress(directory)
        return progress is not None and (progress.attempt, progress.step) == (self.attempt, self.step)


class Retention(Callback):
    """Keeps the best checkpoint and deletes old ones.

    `best` always holds the weights with the lowest loss that could be saved. If they are missing when a run is resumed,
    the best is counted anew, and a message says so.

    Args:
        args: What to keep.
        out_dir: The run's directory.
        fabric: The running `TrainingFabric`.
        save: Saves the present state under a name; every process must call it.
    """

    def __init__(
        self, args: CheckpointArgs, out_dir: Path, fabric: TrainingFabric, save: Callable[[str], None]
    ) -> None:
        self._args, self._out_dir, self._fabric, self._save = args, out_dir, fabric, save
        self._best: Best | None = None
        # A new best that no checkpoint holds yet; training pauses until it is saved, or saving has failed.
        self._candidate: Best | None = None

    @property
    def best_loss(self) -> float | None:
        """The validation loss of the weights in `best`, or None if there are none."""
        return None if self._best is None else self._best.loss

    def on_fit_begin(self, resume_dir: Path | None) -> None:
        """Restore `best` to what it was when the resumed checkpoint was saved."""
        if resume_dir is None or self._best is None:
            return
        best = self._best
        problem = agree(self._fabric, lambda: self._find_best(best, resume_dir))
        if problem is not None:
            self._fabric.print(problem)
            self._best = None

    def _find_best(self, best: Best, resume_dir: Path) -> str | None:
        if best.is_in(self._out_dir / BEST):
            return None
        for directory in (resume_dir, *newest_first(self._out_dir)):
            if best.is_in(directory) and problem_with(directory) is None:
                return self._link_best(directory)
        return (
            f"The checkpoint of the best validation loss so far ({best.loss:.3f} after step {best.step}) "
            "is missing: from here on the best is counted anew."
        )

    def on_logged(self, metrics: dict[str, Any]) -> None:
        """Note a validation loss lower than all before; untrained weights do not count."""
        loss = metrics.get("val_loss")
        if not self._args.best or loss is None or not math.isfinite(loss) or not self._fabric.step:
            return
        if self._best is None or loss < self._best.loss:
            self._candidate = Best(float(loss), self._fabric.attempt, self._fabric.step)

    def on_checkpoint_saved(self, directory: Path) -> None:
        """Make the checkpoint the new best if it is, and delete old ones."""
        if (candidate := self._candidate) is not None:
            # Nothing was trained since the validation, so the checkpoint holds the weights with this loss.
            self._candidate = None
            problem = agree(self._fabric, lambda: self._link_best(directory))
            if problem is None:
                self._best = candidate
            else:
                self._fabric.print(problem)
        if self._fabric.is_global_zero and self._args.keep_last is not None:
            found = newest_first(self._out_dir)
            # A symbolic link is the user's own second name of a checkpoint.
            steps = [path for path in found if path.name.startswith("step-") and not path.is_symlink()]
            for old in steps[self._args.keep_last :]:
                if (old / STATE_FILE).is_file() and old != directory:
                    try:
                        remove(old)
                    except OSError as error:  # an extra checkpoint should not end the run
                        self._fabric.print(f"  {old} could not be deleted: {error}")

    def _link_best(self, directory: Path) -> str | None:
        if directory == self._out_dir / BEST:
            return None
        try:
            link(directory, self._out_dir / BEST)
        except OSError as error:
            return f"  {self._out_dir / BEST} could not be made of {directory}: {error}"
        return None

    def on_step_begin(self, state: dict[str, Any]) -> None:
        """Save the weights as `best` if the last validation made them so."""
        if self._candidate is not None:
            self._save(BEST)
            # If saving failed, keep the previous best: later weights no longer have this loss.
            self._candidate = None

    def state_dict(self) -> dict[str, Any]:
        """Return the best validation loss so far and its step."""
        # A candidate becomes the best with the checkpoint that is being written.
        best = self._candidate or self._best
        return {} if best is None else asdict(best)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._best = Best(**state)
