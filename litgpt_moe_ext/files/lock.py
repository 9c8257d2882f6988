"""A lock on a directory, as two processes that write the same files would destroy each other's."""

import contextlib
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout


class ProcessLock:
    """A lock of the operating system, released however its process ends.

    Args:
        file: The lock file, in an existing folder; another file lies beside it while the lock is held.
    """

    def __init__(self, file: Path) -> None:
        self._owner_file = file.with_name(f"{file.name}.owner")
        self._lock = FileLock(file)

    def take(self, wait: bool = False) -> str | None:
        """Take the lock and return None, or return who holds it; with `wait`, do so once nobody holds it any more."""
        try:
            self._lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            try:
                return self._owner_file.read_text(encoding="utf-8")
            except OSError:
                return "another process"
        with contextlib.suppress(OSError):  # nothing but a message depends on it
            self._owner_file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        return None

    def release(self) -> None:
        """Release the lock if it was taken."""
        if self._lock.is_locked:
            # Delete the files while the lock is held: afterwards they may already belong to the next owner. filelock
            # notices if another process has opened the deleted file, and opens it anew.
            for file in (self._owner_file, Path(self._lock.lock_file)):
                with contextlib.suppress(OSError):  # Windows cannot delete open files
                    file.unlink(missing_ok=True)
            self._lock.release()
