"""Files behind URLs of any kind that `fsspec` supports, such as `hf://` and `https://`, read in pieces."""

import io
import time
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from litgpt_moe_ext.errors import SettingsError

_BLOCK_BYTES = 8 << 20
_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 1.0
# Servers' names for the fingerprint of a file's content.
_FINGERPRINTS = ("ETag", "etag", "Content-MD5", "Digest")


def is_url(path: object) -> bool:
    """Return whether a path is a URL rather than a local file."""
    return "://" in str(path)


def name_of(url: str) -> str:
    """Return the file name in a URL."""
    return PurePosixPath(urlsplit(url).path).name


class RemoteFile(io.RawIOBase):
    """A file behind a URL that can be read at any position, transferring only the blocks that are read.

    A failed read is retried a few times with growing pauses.

    Args:
        url: The URL.

    Attributes:
        size: Bytes of the file.

    Raises:
        SettingsError: It does not exist, or the server cannot be reached or sends no parts of files.
    """

    def __init__(self, url: str) -> None:
        self._file: Any = None  # first, as `close` is called even after an error here
        self.url = url
        system, path = _system_of(url)
        try:
            self._file = system.open(path, "rb", block_size=_BLOCK_BYTES)
        except Exception as error:  # each kind of server has its own errors
            raise _unreachable(url, error) from error
        if not getattr(self._file, "size", None):
            raise SettingsError(
                f"{url} cannot be streamed, as the server does not say how long it is and sends no parts of it; "
                "download the file and name the local copy"
            )
        self.size: int = self._file.size

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase.readinto`."""
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        position = self._file.tell()
        for attempt in range(_ATTEMPTS):
            try:
                return self._file.read(size)
            except ValueError as error:  # a server that ignores the requested range
                raise SettingsError(
                    f"{self.url} cannot be streamed ({error}); download the file and name the local copy"
                ) from error
            except Exception as error:
                if attempt == _ATTEMPTS - 1:
                    raise SettingsError(
                        f"{self.url} cannot be read at byte {position} of {self.size}, {_ATTEMPTS} times ({error!r}); "
                        "run again when the server can be reached, what is prepared is kept"
                    ) from error
                time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def readable(self) -> bool:
        """See `io.IOBase.readable`."""
        return True

    def seekable(self) -> bool:
        """See `io.IOBase.seekable`."""
        return True

    def tell(self) -> int:
        """See `io.IOBase.tell`."""
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.IOBase.seek`."""
        return self._file.seek(offset, whence)

    def close(self) -> None:
        """See `io.IOBase.close`."""
        if self._file is not None:
            self._file.close()
        super().close()


def remote_facts(url: str) -> tuple[int, str]:
    """Return the size of a file in bytes and an identity of its content, without reading it.

    For LFS files on the Hugging Face hub, the identity is their SHA-256.

    Raises:
        SettingsError: It does not exist, or the server cannot be reached or gives nothing to notice changes by.
    """
    system, path = _system_of(url)
    try:
        facts = system.info(path)
    except Exception as error:
        raise _unreachable(url, error) from error
    if facts.get("lfs"):
        identity = facts["lfs"]["sha256"]
    elif facts.get("blob_id"):
        identity = f"blob {facts['blob_id']}"
    else:
        fingerprint = next((str(facts[name]) for name in _FINGERPRINTS if facts.get(name)), None)
        if fingerprint is None:
            raise SettingsError(
                f"{url} cannot be streamed, as the server sends no ETag and a change of the file would go unnoticed; "
                "download the file and name the local copy"
            )
        identity = f"{url} {fingerprint}"
    return facts.get("size") or 0, identity


def _system_of(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:  # an unknown kind of URL, or one that needs another package
        raise SettingsError(f"{url} cannot be read ({error}); write another URL") from error


def _unreachable(url: str, error: Exception) -> SettingsError:
    # fsspec reports any HTTP error as a missing file; the cause is the real error.
    cause = error.__cause__ or error
    if isinstance(error, FileNotFoundError) and (cause is error or getattr(cause, "status", None) == 404):
        return SettingsError(f"{url} does not exist; check the address")
    return SettingsError(f"{url} cannot be reached ({cause!r}); check the address and the network")
