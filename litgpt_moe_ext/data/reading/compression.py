"""Compressed files, read as streams with a limit on their uncompressed size."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import Any, BinaryIO

from litgpt_moe_ext.errors import SettingsError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_SHORT_FORMS = {".tgz": ".tar.gz", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
_CHUNK_BYTES = 1 << 16  # small, so that little is lost before a damaged part
_FREE_BYTES = 100 << 20  # uncompressed size that any file may have


def split_compression(name: str) -> tuple[str, str]:
    """Return a lower-case file name without its compression suffix, and that suffix or the empty string."""
    for short, long in _SHORT_FORMS.items():
        if name.endswith(short):
            name = name.removesuffix(short) + long
    suffix = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    return name.removesuffix(suffix), suffix


def decompress(raw: BinaryIO, suffix: str, where: str, max_expansion: float) -> io.BufferedReader:
    """Return the content of a compressed file as a stream.

    Args:
        raw: The compressed file, at its beginning.
        suffix: One of `COMPRESSIONS`.
        where: Name of the file in error messages.
        max_expansion: Maximum ratio of uncompressed to compressed size, beyond the first 100 MiB.
    """
    stream = _OPENERS[suffix](raw)
    return io.BufferedReader(_Limited(stream, raw.tell, where, max_expansion), _CHUNK_BYTES)


def _open_zstd(raw: BinaryIO) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": lambda raw: bz2.BZ2File(raw),
    ".xz": lambda raw: lzma.LZMAFile(raw),  # noqa: SIM115 closed with the file under it
    ".zst": _open_zstd,
}


class _Limited(io.RawIOBase):
    """A stream that refuses to expand its input too much.

    Text compresses to a third or a tenth; a file made to fill disk or memory, to a thousandth.
    """

    def __init__(self, stream: Any, consumed: Callable[[], int], where: str, max_expansion: float) -> None:
        self._stream = stream
        self._consumed = consumed
        self._where = where
        self._max_expansion = max_expansion
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        if not (data or self._consumed()):  # some of the libraries read this as empty
            raise EOFError("it is empty")
        buffer[: len(data)] = data
        self._given += len(data)
        if self._given > max(_FREE_BYTES, self._max_expansion * self._consumed()):
            raise SettingsError(
                f"max_expansion: {self._max_expansion:g} times their size may come out of compressed files, and "
                f"{self._where} gave {self._given} bytes for {self._consumed()}; if that is text, raise max_expansion"
            )
        return len(data)
