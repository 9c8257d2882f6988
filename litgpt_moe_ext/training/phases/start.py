"""The third phase of a run: finding what it starts from, and making room for its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe_ext.data.loader import corpora_of
from litgpt_moe_ext.data.pipeline.preparation import checked_first
from litgpt_moe_ext.errors import FROM_ITS_WEIGHTS, SettingsError
from litgpt_moe_ext.training.checkpoint.changes import changed_settings
from litgpt_moe_ext.training.checkpoint.compatibility import (
    require_one_table,
    require_same_groups,
    require_same_model,
    require_same_optimizer,
    require_same_tables,
    require_same_weights,
    require_whole_steps,
)
from litgpt_moe_ext.training.checkpoint.earlier import limit_earlier_runs, set_aside
from litgpt_moe_ext.training.checkpoint.progress import next_attempt, sequences_of, step_of
from litgpt_moe_ext.training.checkpoint.resume import damage_of, find_resume_file
from litgpt_moe_ext.training.parallel.agreement import agree, refuse_together
from litgpt_moe_ext.wording import quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from litgpt_moe_ext.training.phases.launch import Launched
    from litgpt_moe_ext.training.phases.plan import Plan
    from litgpt_moe_ext.training.phases.prepare import Prepared


@dataclass(frozen=True)
class Start:
    """What a run starts from: a checkpoint, weights alone, or neither.

    Attributes:
        resume_file: Model file of the checkpoint that the run continues.
        initial_checkpoint_dir: Checkpoint directory of the initial weights.
        sequences: Number of sequences that the resumed checkpoint was trained on, if known.
        corpora: Keys of the corpora of its data position; empty if not recorded.
    """

    resume_file: Path | None
    initial_checkpoint_dir: Path | None
    sequences: int | None = None
    corpora: frozenset[str] = frozenset()

    @property
    def resume_dir(self) -> Path | None:
        """Directory of the checkpoint that the run continues."""
        return None if self.resume_file is None else self.resume_file.parent


def find_start(launched: Launched) -> tuple[Launched, Start]:
    """Decide what to resume from, and check that it is of this model.

    Returns:
        The run, with `Plan.steps_ahead` set, and its start.

    Raises:
        SettingsError: If the named checkpoint does not exist, is damaged, or is of another model.
    """
    plan, fabric = launched.plan, launched.fabric
    found = agree(fabric, lambda: choose_checkpoint(plan, fabric.print))
    if found is None:
        return launched, Start(None, plan.settings.initial_checkpoint_dir)
    refuse_together(fabric, _out_of_sight(found, fabric.global_rank))

    def read() -> tuple[int, int | None, int, frozenset[str]]:
        attempt = next_attempt(plan.out_dir, found.parent)
        return attempt, *sequences_and_steps_ahead(found.parent, plan.train.global_batch_size), saved_corpora(found)

    fabric.attempt, sequences, ahead, corpora = agree(fabric, read)
    resumed = dataclasses.replace(plan, steps_ahead=ahead)
    launched.reporter.total_steps = resumed.total_steps
    return dataclasses.replace(launched, plan=resumed), Start(found, None, sequences, corpora)


def _out_of_sight(found: Path, rank: int) -> Iterator[str]:
    # Every rank reads the file that the first one has chosen.
    if not found.is_file():
        yield (
            f"resume: {quoted(found.parent)} is seen by rank 0, but not by rank {rank}; copy it to that node, or "
            "let out_dir be on a disk that all nodes see"
        )


def choose_checkpoint(plan: Plan, say: Callable[[str], None], read_all: bool = True) -> Path | None:
    """Check the model file that a run resumes from and return it; if there is none, check its initial weights.

    Args:
        plan: The run.
        say: Told about every damaged checkpoint that is skipped.
        read_all: Whether to read the tensors in the file as well, which takes long.

    Raises:
        SettingsError: If the named checkpoint does not exist, is damaged, or is of another model.
    """
    found = find_resume_file(plan.settings.resume, plan.out_dir, say, read_all)
    initial = plan.settings.initial_checkpoint_dir
    if found is not None:
        require_same_model("resume", found.parent, plan.config)
        require_same_weights("resume", found.parent, plan.config)
        require_same_optimizer(found.parent, plan.plain)
        require_same_groups(found.parent, plan.plain, plan.config)
        require_same_tables(found.parent, bool(plan.train.tie_embeddings))
        require_whole_steps(found.parent, plan.train.global_batch_size)
    elif initial is not None:
        if damage := damage_of(initial, read_all):
            raise SettingsError(
                f"initial_checkpoint_dir: {quoted(initial)} is not a whole checkpoint: {damage}; copy it again, or "
                "name another"
            )
        require_same_weights("initial_checkpoint_dir", initial, plan.config)
        if plan.train.tie_embeddings:
            require_one_table(initial)
    return found


def saved_corpora(model_file: Path) -> frozenset[str]:
    """Return the keys of the corpora of the data position in a checkpoint's model file."""
    from litgpt_moe_ext.files.archives import open_archive

    return frozenset(corpora_of(open_archive(model_file, "resume").get("train_dataloader")))


@contextlib.contextmanager
def same_corpora(start: Start, settings: dict[str, Any]) -> Iterator[None]:
    """In the scope, refuse to prepare or train on other corpora than the resumed run's.

    Args:
        start: What the run starts from.
        settings: Settings of the present run, as plain data.
    """
    if start.resume_dir is None or not start.corpora:
        yield
        return
    of_data = [change for change in changed_settings(start.resume_dir, settings) if change.startswith("data.")]
    changed = [change for change in of_data if not change.startswith("data.data_path ")]
    cause = ", ".join(changed) or "other source files or another tokenizer"

    def check(directory: Path, _finished: bool) -> None:
        if directory.name not in start.corpora:
            raise SettingsError(
                f"resume: {quoted(start.resume_dir)} was trained on the corpus {' and '.join(sorted(start.corpora))}, "
                f"but the data are now {directory.name} ({cause}); resume with the original data, or {FROM_ITS_WEIGHTS}"
            )

    with checked_first(check):
        yield


def sequences_and_steps_ahead(checkpoint_dir: Path, global_batch_size: int) -> tuple[int | None, int]:
    """Return a checkpoint's number of trained sequences, if known, and `Plan.steps_ahead` of a run that resumes it."""
    sequences, step = sequences_of(checkpoint_dir), step_of(checkpoint_dir)
    if sequences is None or step is None:
        return None, 0
    return sequences, step - sequences // global_batch_size


def move_earlier_run(launched: Launched, start: Start, prepared: Prepared) -> tuple[Start, Prepared]:
    """Move the checkpoints of an earlier run out of the way, unless this run continues there.

    Returns:
        `start` and `prepared`, with the new paths of directories that were moved.
    """
    fabric, out_dir = launched.fabric, launched.plan.out_dir
    if start.resume_dir is not None and start.resume_dir.parent.resolve() == out_dir.resolve():
        return start, prepared
    aside = agree(fabric, lambda: set_aside(out_dir))
    if aside is None:
        return start, prepared
    fabric.print(f"Moved the checkpoints of an earlier run to {aside} (to continue a run, use --resume auto)")

    def moved(path: Path | None) -> Path | None:
        if path is None or path.exists() or not path.resolve().is_relative_to(out_dir.resolve()):
            return path
        return aside / path.resolve().relative_to(out_dir.resolve())

    initial, tokenizer_dir = moved(start.initial_checkpoint_dir), moved(prepared.tokenizer_dir)
    if initial is not None:
        launched.plan.plain["initial_checkpoint_dir"] = str(initial)
    if tokenizer_dir is not None and "tokenizer_dir" in launched.plan.plain:
        launched.plan.plain["tokenizer_dir"] = str(tokenizer_dir)
    start = dataclasses.replace(start, resume_file=moved(start.resume_file), initial_checkpoint_dir=initial)
    if fabric.is_global_zero:
        needed = [path for path in (start.resume_file, initial, tokenizer_dir) if path is not None]
        if line := limit_earlier_runs(out_dir, launched.plan.settings.checkpoint.keep_earlier, needed):
            fabric.print(line)
    return start, dataclasses.replace(prepared, tokenizer_dir=tokenizer_dir)
