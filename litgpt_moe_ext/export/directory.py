"""A directory that appears when everything in it is written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from litgpt_moe_ext.durable import flush, flush_tree
from litgpt_moe_ext.errors import SettingsError


@contextmanager
def new_directory(out_dir: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Give a temporary directory that becomes `out_dir` at the end of the block, or vanishes if the block fails.

    Args:
        out_dir: The final name, which must be free.
        needed_bytes: How much will be written there.

    Yields:
        The directory to write to.

    Raises:
        SettingsError: If `out_dir` exists or cannot be made, or if its disk has too little space.
    """
    require_absent(out_dir)
    parent = out_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed_bytes > free:
        raise SettingsError(
            f"out_dir: {str(out_dir)!r} needs {needed_bytes / 1e9:.1f} GB, but {parent} has {free / 1e9:.1f} GB left; "
            "free some space, or name a directory on another disk"
        )
    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise SettingsError(f"out_dir: {str(out_dir)!r} cannot be made ({error}); name another directory") from error
    try:
        yield partial
        flush_tree(partial)
        os.rename(partial, out_dir)
        flush(out_dir.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_absent(out_dir: Path) -> None:
    """Raise SettingsError if there is something of this name."""
    if out_dir.exists():
        raise SettingsError(f"out_dir: {str(out_dir)!r} exists; name a new directory")
