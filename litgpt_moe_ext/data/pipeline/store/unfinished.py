"""Unfinished corpora: their progress, the process that works on them, failed writes, and when they are abandoned.

Work continues when the settings are used again, so an unfinished corpus may hold hours of wanted work. It is deleted
only if no process works on it and nothing was written to it for `DAYS`; at worst the work is done again.
"""

import errno
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from litgpt_moe_ext.data.pipeline.batches import Batch
from litgpt_moe_ext.data.pipeline.sources import SIDES
from litgpt_moe_ext.data.pipeline.store.finished import STATE
from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.files.durable import flush, reason, replacing
from litgpt_moe_ext.files.lock import ProcessLock
from litgpt_moe_ext.wording import quoted

DAYS = 14
UNFINISHED, LOCK = ".unfinished", ".lock"
"""Endings of the names of unfinished corpora, and of the locks that their processes hold."""
_DISK_ERRORS = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EFBIG}


@dataclass(slots=True)
class State:
    """How much of the stream the shards hold.

    Attributes:
        source: Index of the source to continue with.
        record: Number of its finished records.
        shards: Number of shards by split.
        counts: What the manifest counts.
        first_empty: Where the first empty document was.
    """

    source: int = 0
    record: int = 0
    shards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SIDES, 0))
    counts: dict[str, int] = field(
        default_factory=lambda: {
            "documents_empty": 0,
            **{f"{what}_{split}": 0 for what in ("documents", "bytes", "tokens") for split in SIDES},
        }
    )
    first_empty: str = ""

    @classmethod
    def load(cls, directory: Path) -> "State | None":
        """Return the state of an unfinished corpus, or None if it has none.

        Raises:
            SettingsError: It is damaged.
        """
        try:
            state = cls(**json.loads((directory / STATE).read_text(encoding="utf-8")))
            if not (state.shards.keys() == cls().shards.keys() and state.counts.keys() == cls().counts.keys()):
                raise ValueError("it lacks counts")
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"data_path: {directory / STATE} is damaged ({one_line(error)}); delete {directory} to prepare the "
                "corpus anew"
            ) from error
        return state

    def save(self, directory: Path) -> None:
        """Write the state into an unfinished corpus; call this once the shards hold what it counts."""
        with replacing(directory / STATE) as partial:
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        flush(directory)

    def add(self, batch: Batch, arrays: tuple[np.ndarray, ...]) -> None:
        """Count a batch.

        Args:
            batch: The documents.
            arrays: Their tokens by side.
        """
        for side, array in zip(SIDES, arrays, strict=True):
            self.counts[f"documents_{side}"] += len(batch.texts[side])
            self.counts[f"bytes_{side}"] += batch.sizes[side]
            self.counts[f"tokens_{side}"] += len(array)
        self.counts["documents_empty"] += batch.empty
        self.first_empty = self.first_empty or batch.first_empty
        self.source, self.record = batch.source, batch.record


@contextmanager
def only_one(directory: Path, verbose: bool) -> Iterator[None]:
    """Let one process at a time work on a corpus; others wait and print a message.

    Args:
        directory: The corpus.
        verbose: Whether to print the message.

    Raises:
        SettingsError: The folder of the corpora cannot be made, or takes no files, or no locks.
    """
    root, file = directory.parent, directory.with_name(f".{directory.name}{LOCK}")
    lock = ProcessLock(file)
    try:
        root.mkdir(parents=True, exist_ok=True)
        file.touch()  # what cannot be made is to filelock as if another process had it
        owner = lock.take()
    except OSError as error:
        raise SettingsError(
            f"data_path: {quoted(root)} cannot be used as a cache folder ({reason(error, root)}); set data_path to a "
            "folder in which files can be created and locked"
        ) from error
    if owner is not None:
        if verbose:
            print(f"Waiting for {owner}, which prepares {directory}", flush=True)
        lock.take(wait=True)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing(data_path: Path) -> Iterator[None]:
    """Turn a disk error into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise SettingsError(
            f"data_path: preparing the corpus in {quoted(data_path)} failed ({error.strerror or error}), what is done "
            "is kept; free disk space or set data_path to another disk, then run again"
        ) from error


def remove_leftovers(data_path: Path) -> list[Path]:
    """Delete corpora abandoned long ago; those that a process works on are locked and stay.

    Args:
        data_path: Folder of all prepared corpora.

    Returns:
        The deleted unfinished corpora.
    """
    before = time.time() - DAYS * 24 * 60 * 60
    return [folder for folder in sorted(data_path.glob(f".*{UNFINISHED}")) if _remove(folder, before)]


def _remove(folder: Path, before: float) -> bool:
    lock = ProcessLock(folder.with_suffix(LOCK))
    try:
        if max(path.stat().st_mtime for path in (folder, *folder.iterdir())) >= before or lock.take() is not None:
            return False
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # somebody has just finished it
        return False
    finally:
        lock.release()
    return not folder.exists()
