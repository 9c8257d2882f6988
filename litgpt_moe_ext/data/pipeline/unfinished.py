"""An unfinished corpus: how far it is, who works on it, and what a write that failed means."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from litgpt_moe_ext.data.pipeline.batches import Batch
from litgpt_moe_ext.data.pipeline.sources import SIDES
from litgpt_moe_ext.data.pipeline.store import STATE
from litgpt_moe_ext.durable import flush
from litgpt_moe_ext.errors import SettingsError

_DISK_ERRORS = {errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EFBIG}


@dataclass(slots=True)
class State:
    """How much of the stream the shards hold.

    Attributes:
        source: Index of the source to go on with.
        record: Records of it that are done with.
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
        """Return what an unfinished corpus says, or None if it does not."""
        try:
            return cls(**json.loads((directory / STATE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def save(self, directory: Path) -> None:
        """Have an unfinished corpus say this, once everything that it says of the shards is true."""
        partial = directory / f".{STATE}.partial"
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        flush(partial)
        os.replace(partial, directory / STATE)
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
    """Let one process at a time work on a corpus; the others wait, and say so.

    Args:
        directory: The corpus.
        verbose: Whether to say so.
    """
    lock = FileLock(directory.with_name(f".{directory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if verbose:
            print(f"Waiting for another process that prepares {directory}", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def writing(data_path: Path) -> Iterator[None]:
    """Say what to do about a write that failed."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise SettingsError(
            f"data_path: preparing the corpus in {str(data_path)!r} failed ({error.strerror or error}), what is done "
            "is kept; free disk space or set data_path to another disk, then run again"
        ) from error
