"""The documents of a local or remote file in any supported format."""

import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, BinaryIO

from litgpt_moe_ext.data.reading.compression import decompress, split_compression
from litgpt_moe_ext.data.reading.json_text import read_json_lines, read_json_list
from litgpt_moe_ext.data.reading.plain_text import read_separated_text, read_whole_text
from litgpt_moe_ext.data.reading.record import BYTE_ORDER_MARK, CHUNK_BYTES, OpenFile, Record, TextFormat
from litgpt_moe_ext.data.reading.remote import RemoteFile, is_url, name_of
from litgpt_moe_ext.data.reading.tables import read_csv, read_parquet
from litgpt_moe_ext.errors import SettingsError

_JSON = (".json", ".jsonl", ".ndjson")
# First bytes of files that are not text: what they are, and what to do about it. "BZh" and "PAR1" alone are words.
_NOT_TEXT = (
    (b"\x1f\x8b", "gzip", "let its name end in .gz"),
    *((b"BZh%d1AY&SY" % level, "bzip2", "let its name end in .bz2") for level in range(1, 10)),
    (b"\xfd7zXZ\x00", "xz", "let its name end in .xz"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "let its name end in .zst"),
    (b"PAR1\x15", "parquet", "let its name end in .parquet"),  # as the header of a page begins
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"%PDF-", "PDF", "extract its text"),
    (b"\xff\xfe\x00\x00", "UTF-32", "convert it to UTF-8, for example with iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32", "convert it to UTF-8, for example with iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16", "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16", "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
)
_SAMPLE_BYTES = 4096
_TAR_BLOCK = 512


def documents(path: Path | str, text_format: TextFormat) -> Iterator[Record]:
    """Yield the documents of a file in order.

    The name decides: `.parquet`; `.json`, `.jsonl` and `.ndjson` (objects one a line, or one list of objects); `.csv`
    and `.tsv` with the names of the columns in the first row; anything else is plain text, with line ends of any style,
    which become LF, as they do in the cells of `.csv` and `.tsv`. `.gz`, `.bz2`, `.xz` and `.zst` may follow any but
    parquet. `.tar` is read member by member in the same way, but for parquet and other archives; members with a leading
    dot are left out. A link is an empty document, as what it names is another member, or not in the archive. A
    byte-order mark is skipped, also where files were joined: at the start of a separated document or a JSON line. Empty
    lines of JSON lines and of tables are too. An empty file is one empty document.

    Args:
        path: The file, or its URL (`litgpt_moe_ext.data.reading.remote`).
        text_format: How to find the documents in it.

    Raises:
        SettingsError: The file cannot be read, is damaged, is not text, or lacks the field; with file and place.
    """
    with _open(path) as (raw, size):
        name, compression = split_compression((name_of(str(path)) if is_url(path) else Path(path).name).lower())
        file = OpenFile(raw, name, str(path), raw.tell)
        try:
            if compression:
                stream = decompress(raw, compression, str(path), text_format.max_expansion)
                file = replace(file, stream=stream)
            if name.endswith(".parquet"):
                yield from read_parquet(file, size, text_format)
            elif name.endswith(".tar"):
                yield from _read_archive(file, text_format)
            else:
                yield from _read_text(file, text_format)
        except (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise SettingsError(
                f"{path} is damaged or truncated: {error} (after byte {raw.tell()} of {size}); download or make it "
                "again"
            ) from error


@contextmanager
def _open(path: Path | str) -> Iterator[tuple[Any, int]]:
    """Yield a file and its size."""
    if is_url(path):
        remote = RemoteFile(str(path))
        with io.BufferedReader(remote, CHUNK_BYTES) as raw:
            yield raw, remote.size
        return
    try:
        raw = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
    with raw:
        yield raw, os.fstat(raw.fileno()).st_size


def _read_archive(file: OpenFile, text_format: TextFormat) -> Iterator[Record]:
    watched = _WithTail(file.stream)
    with tarfile.open(fileobj=watched, mode="r|") as archive:  # pyrefly: ignore[no-matching-overload] it only reads
        for member in archive:
            base = member.name.rpartition("/")[2]
            if base.startswith("."):
                continue
            if member.islnk() or member.issym():
                yield Record("", f"the link {member.name} to {member.linkname}", file.position(), base)
            opened = archive.extractfile(member) if member.isfile() else None
            if opened is not None:
                name, compression = split_compression(base.lower())
                where, raw = f"{file.where}: {member.name}", _Member(opened)
                if compression:
                    content = decompress(raw, compression, where, text_format.max_expansion)  # pyrefly: ignore[bad-argument-type] it only reads
                else:
                    content = io.BufferedReader(raw)
                inner = OpenFile(content, name, where, file.position)  # pyrefly: ignore[bad-argument-type] as above
                for record in _read_text(inner, text_format):
                    yield record._replace(place=f"{record.place} of {member.name}", member=base)
    while watched.read(CHUNK_BYTES):
        pass
    if watched.tail.strip(b"\x00"):
        raise EOFError("the archive has no end mark, so members may be missing")


class _Member(io.RawIOBase):
    """A member of an archive that is read from its beginning to its end; asked whether it can seek, tarfile's fails."""

    def __init__(self, member: IO[bytes]) -> None:
        self._member = member

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._member.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def tell(self) -> int:
        return self._member.tell()


class _WithTail:
    """A stream that remembers the last block that was read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.tail = b""

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.tail = (self.tail + data)[-_TAR_BLOCK:]
        return data


def _read_text(file: OpenFile, text_format: TextFormat) -> Iterator[Record]:
    sample = file.stream.peek(_SAMPLE_BYTES)[:_SAMPLE_BYTES]
    for start, kind, remedy in _NOT_TEXT:
        if sample.startswith(start):
            is_named = remedy.endswith(file.name.rpartition(".")[2])  # in an archive, which cannot be opened in there
            raise SettingsError(
                f"{file.where} is {kind}, not UTF-8 text; {'unpack the archive' if is_named else remedy}"
            )
    file.refuse_zeros(sample, 0)
    if sample.startswith(BYTE_ORDER_MARK):
        file = replace(file, start=len(file.stream.read(len(BYTE_ORDER_MARK))))
        sample = sample[file.start :]
    if not sample:  # in tables and JSON too, so that it is counted as left out
        return iter([Record("", f"byte {file.start}", file.position())])
    if file.name.endswith(_JSON):
        read = read_json_list if sample.lstrip().startswith(b"[") else read_json_lines
    elif file.name.endswith((".csv", ".tsv")):
        read = read_csv
    elif text_format.separator is not None:
        read = read_separated_text
    else:
        read = read_whole_text
    return read(file, text_format)
