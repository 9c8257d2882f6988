"""Hashes of files, to notice changes and to find prepared corpora again."""

import json
import os
import time
from pathlib import Path

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.checksums import sha256_of
from litgpt_moe_ext.files.durable import replacing

HASHES = ".file_hashes.json"
# A file written so shortly before it was hashed may be written again with the same time of change.
_SETTLED_SECONDS = 2.0


class FileHashes:
    """SHA-256 of files, remembered by path, size and times of change.

    Copying a file may set its modification time (mtime), but not its change time (ctime), so both are compared.

    Args:
        folder: Folder of the cache file `HASHES`; without that file, everything is hashed again.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / HASHES
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        self._known: dict[str, list] = known if isinstance(known, dict) else {}
        self._changed = False

    def hash(self, path: Path) -> str:
        """Return the SHA-256 (hex) of a file's content.

        Raises:
            SettingsError: It cannot be read.
        """
        try:
            stat = path.stat()
            if (known := self._remembered(path, stat)) is not None:
                return known
            started = time.time()
            digest = sha256_of(path)
        except OSError as error:
            raise SettingsError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
        if stat.st_mtime < started - _SETTLED_SECONDS:
            self._known[str(path.absolute())] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, digest]
            self._changed = True
        return digest

    def _remembered(self, path: Path, stat: os.stat_result) -> str | None:
        known = self._known.get(str(path.absolute()))
        of_file = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        return known[-1] if isinstance(known, list) and known[:-1] == of_file else None

    def remembers(self, path: Path) -> bool:
        """Return whether a file was hashed before and has not changed since."""
        return self._remembered(path, path.stat()) is not None

    def save(self) -> None:
        """Write the cache. A failure is only reported, as the corpus does not need it."""
        if not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as partial_path:
                partial_path.write_text(json.dumps(self._known), encoding="utf-8")
        except OSError as error:
            print(
                f"File hashes could not be saved ({error}), so the next run reads the files again",
                flush=True,
            )
        self._changed = False


class UnreadFiles(FileHashes):
    """Replaces hashes by paths: no file is read, and each counts as different from all others."""

    def __init__(self) -> None:
        pass

    def hash(self, path: Path) -> str:
        """Return the path of a file."""
        return str(path)
