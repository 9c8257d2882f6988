"""A directory that appears only once everything in it is written."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.files.durable import cut_off, flush, flush_tree, rename
from litgpt_moe_ext.files.lock import ProcessLock
from litgpt_moe_ext.wording import quoted


@contextmanager
def new_directory(out_dir: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Give a temporary directory that becomes `out_dir` at the end of the block, or vanishes if the block fails.

    Leftovers of a killed process are removed first.

    Args:
        out_dir: The final name, which must be free.
        needed_bytes: Number of bytes that will be written.

    Yields:
        The directory to write to.

    Raises:
        SettingsError: If `out_dir` exists, is being made by another process, cannot be made or cannot be written, or if
            its disk has too little space.
    """
    require_absent(out_dir)
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    with _alone(out_dir):
        shutil.rmtree(partial, ignore_errors=True)
        _require_space(out_dir, needed_bytes)
        try:
            with _cannot_be_made(out_dir):
                partial.mkdir()
            with _cannot_be_written(out_dir):
                yield partial
                flush_tree(partial)
                require_absent(out_dir)  # it may have been created in the meantime
                rename(partial, out_dir)
            flush(out_dir.absolute().parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _alone(out_dir: Path) -> Iterator[None]:
    # Create the parent folders of `out_dir`, and be the only process that creates it.
    missing = [parent for parent in out_dir.absolute().parents if not os.path.exists(parent)]
    lock = ProcessLock(out_dir.with_name(f".{out_dir.name}.lock"))
    try:
        with _cannot_be_made(out_dir):
            out_dir.parent.mkdir(parents=True, exist_ok=True)
            owner = lock.take()
        if owner is not None:
            raise SettingsError(
                f"out_dir: {quoted(out_dir)} is being made by {owner}; wait until it ends, or name another directory"
            )
        yield
    finally:
        lock.release()
        _remove_empty(missing)


def _require_space(out_dir: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(out_dir.parent).free
    if needed_bytes > free:
        raise SettingsError(
            f"out_dir: {quoted(out_dir)} needs {needed_bytes / 1e9:.3g} GB, but its disk has {free / 1e9:.3g} GB left; "
            "free some space, or name a directory on another disk"
        )


@contextmanager
def _cannot_be_made(out_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsError(f"out_dir: {quoted(out_dir)} cannot be made ({error}); name another directory") from error


@contextmanager
def _cannot_be_written(out_dir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not cut_off(error):
            raise
        reason = one_line(error) if isinstance(error, OSError) else "a file was cut off"
        raise SettingsError(
            f"out_dir: {quoted(out_dir)} could not be written ({reason}), and nothing is left of it; free some space, "
            "or name a directory on another disk"
        ) from error


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        # A folder that `out_dir`, or something else, is in by now is not empty.
        with suppress(OSError):
            folder.rmdir()


def require_absent(out_dir: Path) -> None:
    """Raise SettingsError if the name is taken."""
    if os.path.lexists(out_dir):
        raise SettingsError(f"out_dir: {quoted(out_dir)} exists; name a new directory")
