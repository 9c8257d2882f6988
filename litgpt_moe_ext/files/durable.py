"""Making sure that what was written is on the disk before it gets its final name."""

import errno
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITE_TEST = ".write-test-"
"""How the names of files begin that only try whether a directory can be written to."""


def refusal(folder: Path) -> str | None:
    """Return why no folder can be made in a folder, or None: leaves nothing behind."""
    # Asks for no permission, which whoever may do everything has where file systems such as /proc refuse all the same.
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=WRITE_TEST, ignore_cleanup_errors=True):
            return None
    except OSError as error:
        return error.strerror or str(error)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a new file that takes the place of another one when the scope ends, or is gone if it fails.

    A process that is killed in the scope may leave it behind, as `.NAME.*.partial`.

    Args:
        path: The other one, which is whole at any time; it need not be there.
    """
    # In the same folder, because only a rename within one file system is atomic.
    partial = path.with_name(f".{path.name.lstrip('.')}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def cut_off(error: Exception) -> bool:
    """Return whether torch could not write all of a file: a RuntimeError that names this part of it, and no cause."""
    return isinstance(error, RuntimeError) and "inline_container" in str(error)


def is_stream(path: Path) -> bool:
    """Return whether a path is a device, a pipe or an open file such as /dev/stdout, to be written to, not replaced."""
    return path.exists() and not path.is_dir() and (not path.is_file() or _is_open_file(path))


def _is_open_file(path: Path) -> bool:
    # Links that an open file is named by end in its file as well; not so in what lies in /dev/shm.
    path = path.parent.resolve() / path.name
    if path.parts[1] == "proc" or path.parts[1:3] == ("dev", "fd"):
        return True
    return path.is_symlink() and _is_open_file(path.parent / path.readlink())


def flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # only POSIX can open a folder
    # Windows flushes only handles that may write.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # How file systems that flush no folders (some of FUSE, some servers) say so.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Flush all files and folders in a folder, and the folder."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() or path.is_dir():  # to open a pipe waits for the other end
            flush(path)
    flush(directory)
