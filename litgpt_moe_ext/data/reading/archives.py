"""Documents in the members of a tar archive."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from litgpt_moe_ext.data.reading.compression import decompress, split_compression
from litgpt_moe_ext.data.reading.formats import read_text
from litgpt_moe_ext.data.reading.record import CHUNK_BYTES, OpenFile, Record, TextFormat

_TAR_BLOCK = 512


def read_archive(file: OpenFile, text_format: TextFormat) -> Iterator[Record]:
    """Yield the documents of all members, each read as a file of its name; those with a leading dot are left out."""
    watched = _WithTail(file.stream)
    with tarfile.open(fileobj=watched, mode="r|") as archive:  # pyrefly: ignore[no-matching-overload] it only reads
        for member in archive:
            base = member.name.rpartition("/")[2]
            content = archive.extractfile(member) if member.isfile() and not base.startswith(".") else None
            if content is not None:
                name, compression = split_compression(base.lower())
                where = f"{file.where}: {member.name}"
                if compression:
                    content = decompress(content, compression, where, text_format.max_expansion)  # pyrefly: ignore[bad-argument-type] extractfile gives one
                inner = OpenFile(content, name, where, file.position)  # pyrefly: ignore[bad-argument-type] as above
                for record in read_text(inner, text_format):
                    yield record._replace(place=f"{record.place} of {member.name}", member=base)
    while watched.read(CHUNK_BYTES):
        pass
    if watched.tail.strip(b"\x00"):
        raise EOFError("the archive has no end mark, so members may be missing")


class _WithTail:
    """A stream that remembers the last block that was read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.tail = b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.tail = (self.tail + data)[-_TAR_BLOCK:]
        return data
