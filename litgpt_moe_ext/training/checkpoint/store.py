"""Checkpoint directories, written whole or not at all.

A checkpoint is LitGPT's: `lit_model.pth` (model, optimizer, data position, counters), `model_config.yaml`,
`hyperparameters.yaml` and the tokenizer's files. `training_state.json` adds the run's progress in plain text, and
`SHA256SUMS` the checksum of every file.
"""

import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litgpt_moe_ext.errors import one_line
from litgpt_moe_ext.files import checksums
from litgpt_moe_ext.files.archives import ONLY_PLAIN, foreign_object, kind_of
from litgpt_moe_ext.files.durable import WRITE_TEST, cut_off, flush, flush_tree, rename
from litgpt_moe_ext.training.checkpoint.earlier import free_name
from litgpt_moe_ext.training.checkpoint.progress import STATE_FILE, Progress

# The keys of LitGPT's training state.
_LITGPT = ("model", "optimizer", "train_dataloader", "hparams", "iter_num", "step_count")


def publish(staging: Path, target: Path) -> None:
    """Move a finished directory to its final name; an existing directory is replaced, and never lost on the way.

    Args:
        staging: The complete directory, on the same file system as `target`.
        target: Its final path.
    """
    flush_tree(staging)
    replaced = target.with_name(f".{target.name}.replaced")
    there = target.exists() or target.is_symlink()
    if there and not (target / STATE_FILE).is_file():
        # Not written by a run like this one, so it may hold something irreplaceable; or a link to a disk that is gone.
        rename(target, free_name(target))
    elif there:
        _vacate(replaced)
        rename(target, replaced)
    rename(staging, target)
    flush(target.parent)
    _vacate(replaced)


def _delete(path: Path) -> OSError | None:
    """Delete what is at a path, or all of it that can be; return why the rest cannot."""
    try:
        # Of a link, which the user has made to a checkpoint elsewhere, only the link.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        return error if os.path.lexists(path) else None
    return None


def _vacate(path: Path) -> None:
    """Make a name free: delete what has it, or give it one that the next run deletes.

    A network disk keeps what somebody is reading, as `best` during an evaluation, in its folder. Files of other users
    stay as well.
    """
    if _delete(path) is not None:
        rename(path, path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}.removed"))


def link(source: Path, target: Path) -> None:
    """Make `target` a copy of a checkpoint, sharing the weights if the file system has hard links."""
    staging = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        shutil.copytree(source, staging, copy_function=_link_or_copy)
        publish(staging, target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, shutil.Error):  # a list of what went wrong with each file
            raise OSError(error.args[0][0][2]) from error
        raise


def _link_or_copy(source: str, target: str) -> None:
    # Files that people edit must not be shared.
    if source.endswith(".pth"):
        try:
            os.link(source, target)
            return
        except OSError:  # the file system has no hard links
            pass
    shutil.copy2(source, target)


class SaveError(Exception):
    """A checkpoint could not be written; earlier checkpoints are untouched."""


def remove(directory: Path) -> None:
    """Delete a checkpoint; its name never refers to a half-deleted directory.

    Raises:
        OSError: If it keeps its name, or something of it stays under another.
    """
    doomed = directory.with_name(f".{directory.name}.removed")
    _vacate(doomed)
    rename(directory, doomed)
    if (error := _delete(doomed)) is not None:
        raise error


def recover(out_dir: Path) -> list[str]:
    """Finish or undo what a killed run left half-done; call only while holding the lock on `out_dir`.

    Returns:
        What was done, one line each.
    """
    done = []
    for path in sorted(out_dir.glob(".*.replaced")):
        original = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if original.exists():
            _vacate(path)
        else:
            rename(path, original)
            done.append(f"Found {original} under the name it had while it was being replaced, and named it back.")
    for pattern in (".*.incomplete", ".*.removed", f"{WRITE_TEST}*"):
        for path in out_dir.glob(pattern):
            if (error := _delete(path)) is not None:
                done.append(f"{path} is left of an earlier checkpoint and cannot be deleted: {error.strerror or error}")
    return done


def save_whole(save: Callable[[Any, dict, Path], None], fabric: Any, state: dict, file: Path) -> None:
    """Save a checkpoint under a temporary name and rename it when it is complete.

    Args:
        save: Takes the fabric, a state and a path, and writes the files of a checkpoint.
        fabric: The running `TrainingFabric`; every process must call this.
        state: LitGPT's training state.
        file: The final path of the model file; its parent is the checkpoint directory.

    Raises:
        SaveError: On every process, if the first one could not write.
    """
    target = file.parent
    staging = target.with_name(f".{target.name}.incomplete")
    kept = {name: value for name, value in state.items() if name in _LITGPT or _can_be_opened(fabric, name, value)}
    extended = {**kept, "rng": fabric.random_streams.to_save(), "callbacks": fabric.callback_states()}

    def finish() -> None:
        if fabric.is_global_zero:
            counters = fabric.attempt, state["step_count"], state["iter_num"]
            Progress(*counters, fabric.world_size, time.time()).write(staging)
            checksums.write(staging)
            publish(staging, target)

    if fabric.is_global_zero:
        shutil.rmtree(staging, ignore_errors=True)
    fabric.barrier()
    for part, of_others in (
        (lambda: save(fabric, extended, staging / file.name), False),
        (lambda: fabric.call("on_checkpoint_staged", directory=staging), True),
        (finish, False),
    ):
        if problem := _try_everywhere(fabric, part, of_others):
            if fabric.is_global_zero:
                shutil.rmtree(staging, ignore_errors=True)
            raise SaveError(f"{target} could not be saved: {problem}")


def _can_be_opened(fabric: Any, name: str, value: Any) -> bool:
    # A callback may have added the value. Of an object with a `state_dict`, only that is saved.
    if hasattr(value, "state_dict") or (foreign := foreign_object(value)) is None:
        return True
    fabric.print(f"  state[{name!r}] has a {kind_of(foreign)}, {ONLY_PLAIN}: it is not saved.")
    return False


def _try_everywhere(fabric: Any, action: Callable[[], Any], of_others: bool) -> str | None:
    # Only the first process writes files; tell the others of its failure, or they would wait for it forever.
    problem = None
    try:
        action()
    except (OSError, RuntimeError) as error:
        # A callback's RuntimeError may have any reason; let its traceback show it.
        is_of_disk = isinstance(error, OSError) or cut_off(error)
        if not fabric.is_global_zero or (of_others and not is_of_disk):
            raise
        problem = "a file was cut off, as on a full disk" if cut_off(error) else one_line(error) or type(error).__name__
    return fabric.broadcast(problem)
