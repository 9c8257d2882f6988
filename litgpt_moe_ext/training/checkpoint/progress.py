"""The progress of a run at each checkpoint, as plain text beside the model, and the order of checkpoints by it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.host.checkpoints import WEIGHTS_FILE
from litgpt_moe_ext.training.checkpoint.hyperparameters import read

STATE_FILE = "training_state.json"
BEST, FINAL = "best", "final"
AVERAGE = "ema"
"""The folder in a checkpoint with the moving average of the weights, a checkpoint of its own."""


@dataclass(frozen=True)
class Progress:
    """The content of `training_state.json`.

    Attributes:
        attempt: How many times the run had been started: 1, plus one for every resume. More reliable than clocks, which
            can be wrong and differ between nodes.
        step: Finished optimizer steps.
        iteration: Micro-batches of one rank.
        processes: Number of ranks.
        saved_at: Seconds since 1970, for human readers only.
    """

    attempt: int
    step: int
    iteration: int
    processes: int
    saved_at: float

    def write(self, checkpoint_dir: Path) -> None:
        """Write it into a checkpoint directory."""
        (checkpoint_dir / STATE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_progress(checkpoint_dir: Path) -> Progress | None:
    """Return the progress of a checkpoint, or None if it has no readable one."""
    try:
        found = json.loads((checkpoint_dir / STATE_FILE).read_text(encoding="utf-8"))
        progress = Progress(**found)
    except (OSError, ValueError, TypeError):  # no file, no JSON or no text, other fields
        return None
    counters = (progress.attempt, progress.step, progress.iteration, progress.processes)
    return progress if all(type(counter) is int and counter >= 0 for counter in counters) else None


def step_of(checkpoint_dir: Path) -> int | None:
    """Return the optimizer step after which a checkpoint was saved, or None if unknown."""
    if (progress := read_progress(checkpoint_dir)) is not None:
        return progress.step
    # Plain LitGPT records the step only in the checkpoint's name.
    _, _, digits = checkpoint_dir.name.partition("step-")
    return int(digits) if digits.isdecimal() else None


def checkpoint_around(directory: Path) -> Path:
    """Return the checkpoint of a run that a directory belongs to: itself, or the one whose moving average it holds."""
    folder = directory.resolve()
    return folder.parent if folder.name == AVERAGE and (folder.parent / STATE_FILE).is_file() else directory


def batch_of(checkpoint_dir: Path) -> int | None:
    """Return the sequences per iteration, over all ranks, when a checkpoint was written, or None if unknown."""
    if (progress := read_progress(checkpoint_dir)) is None:
        return None
    train = read(checkpoint_dir).get("train")
    micro_batch = train.get("micro_batch_size") if isinstance(train, dict) else None
    return progress.processes * micro_batch if isinstance(micro_batch, int) else None


def sequences_of(checkpoint_dir: Path) -> int | None:
    """Return how many sequences a checkpoint was trained on, even if its batch size has changed; None if unknown."""
    progress, batch = read_progress(checkpoint_dir), batch_of(checkpoint_dir)
    # A run resumed with another batch size rescales its iteration count to that size.
    return None if progress is None or batch is None else progress.iteration * batch


def newest_first(out_dir: Path) -> list[Path]:
    """Return the checkpoint directories of a run, whole or not, newest first.

    They are ordered by attempt, then by step. Those without readable progress count as attempt 0. Weights alone, as a
    run may start from, count only under a name that runs give.
    """
    found = [path for path in out_dir.glob("*") if path.is_dir() and _looks_like_a_checkpoint(path)]
    return sorted(found, key=_order, reverse=True)


def holds_state_of_training(file: Path) -> bool:
    """Return whether a model file holds more than weights; True for a damaged one, whose damage others report."""
    from litgpt_moe_ext.files.archives import open_archive

    try:
        return "optimizer" in open_archive(file, "resume")
    except SettingsError:
        return True


def next_attempt(out_dir: Path, resume_dir: Path) -> int:
    """Return the attempt number of a run in `out_dir` that resumes from a checkpoint now."""
    found = (read_progress(path) for path in (resume_dir, *newest_first(out_dir)))
    return 1 + max((progress.attempt for progress in found if progress is not None), default=0)


def _looks_like_a_checkpoint(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    if (path / STATE_FILE).is_file():
        return True
    weights, of_runs = path / WEIGHTS_FILE, path.name in (BEST, FINAL) or path.name.startswith("step-")
    return weights.is_file() and (of_runs or holds_state_of_training(weights))


def _order(path: Path) -> tuple[int, int, int]:
    progress = read_progress(path)
    attempt, step = (0, step_of(path) or 0) if progress is None else (progress.attempt, progress.step)
    # `best` often duplicates another checkpoint, whose name the user expects.
    return attempt, step, {BEST: 0, FINAL: 2}.get(path.name, 1)
