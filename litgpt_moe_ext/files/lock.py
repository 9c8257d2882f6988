"""One process per place: two that write the same files would destroy each other's."""

import contextlib
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout


class ProcessLock:
    """A lock of the operating system, which ends with its process however that ends.

    Args:
        file: The lock, in an existing folder; there is another file beside it while it is taken.
    """

    def __init__(self, file: Path) -> None:
        self._owner_file = file.with_name(f"{file.name}.owner")
        self._lock = FileLock(file)

    def take(self) -> str | None:
        """Take the lock; return None, or who has it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            try:
                return self._owner_file.read_text(encoding="utf-8")
            except OSError:
                return "another process"
        with contextlib.suppress(OSError):  # nothing but a message depends on it
            self._owner_file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        return None

    def release(self) -> None:
        """Give the lock back, if it was taken."""
        if self._lock.is_locked:
            # While it is still held: a name that is deleted after the release may be the next owner's already. Whoever
            # has opened the deleted file meanwhile is told so by filelock, and opens anew.
            for file in (self._owner_file, Path(self._lock.lock_file)):
                with contextlib.suppress(OSError):  # Windows deletes no open file
                    file.unlink(missing_ok=True)
            self._lock.release()
