"""Making sure that data is on disk before it gets its final name."""

import errno
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from litgpt_moe_ext.wording import quoted

WRITE_TEST = ".write-test-"
"""Prefix of the names of files that test whether a directory is writable."""

# Windows renames nothing that is open. Scanners for viruses, search indexes and cloud folders open what has just been
# written, and let go of it soon.
_ATTEMPTS = 50 if os.name == "nt" else 1
_PAUSE_SECONDS = 0.1


def refusal(folder: Path) -> str | None:
    """Return why no folder can be created in a folder, or None; leaves nothing behind."""
    # Tries instead of checking permissions: root has them even on file systems such as /proc that refuse.
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=WRITE_TEST, ignore_cleanup_errors=True):
            return None
    except OSError as error:
        return error.strerror or str(error)


def reason(error: OSError, path: Path) -> str:
    """Return why nothing can be made at a path; of a link to nothing, the system says only that it exists."""
    if isinstance(error, FileExistsError) and (link := dead_link(path)) is not None:
        return f"{quoted(link)} is a link to {quoted(os.readlink(link))}, which is not there"
    return error.strerror or str(error)


def dead_link(path: Path) -> Path | None:
    """Return the path, or the folder on the way to it, that is a link to nothing, such as a disk that is gone."""
    return next((place for place in (path, *path.parents) if place.is_symlink() and not place.exists()), None)


def rename(path: Path, target: Path) -> None:
    """Give a file or a folder another name in the same file system; a file replaces a file.

    On Windows, wait up to five seconds for programs that have it, or something in it, open.
    """
    for left in reversed(range(_ATTEMPTS)):
        try:
            os.replace(path, target)
            return
        except PermissionError:
            if not left:
                raise
            time.sleep(_PAUSE_SECONDS)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a new file that replaces `path` at the end of the scope, or is deleted on failure.

    A process killed within the scope may leave it behind, as `.NAME.*.partial`.

    Args:
        path: The file to replace, which is whole at any time; it need not exist.
    """
    # In the same folder, because only a rename within one file system is atomic.
    partial = path.with_name(f".{path.name.lstrip('.')}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        flush(partial)
        rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def cut_off(error: Exception) -> bool:
    """Return whether an error is torch's RuntimeError for an incompletely written file, which names no cause."""
    return isinstance(error, RuntimeError) and "inline_container" in str(error)


def is_stream(path: Path) -> bool:
    """Return whether a path is a device, a pipe or an open file such as /dev/stdout, to be written to, not replaced."""
    return path.exists() and not path.is_dir() and (not path.is_file() or _is_open_file(path))


def _is_open_file(path: Path) -> bool:
    # Links that name open files also resolve to ordinary files, so look at the link's own path; /dev/shm is ordinary.
    path = path.parent.resolve() / path.name
    if path.parts[1] == "proc" or path.parts[1:3] == ("dev", "fd"):
        return True
    return path.is_symlink() and _is_open_file(path.parent / path.readlink())


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX can open a folder
    # Windows flushes only handles that may write.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems (some of FUSE, some servers) cannot flush folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Flush all files and folders in a folder, and the folder."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() or path.is_dir():  # opening a pipe would wait for its other end
            flush(path)
    flush(directory)
