"""Documents out of files: plain text, JSON (lines or a list), CSV, parquet, compressed or inside a tar archive.

`documents` is the only way in. It reads as a stream, so a file may be larger than memory (a JSON list has to be held
whole) and may as well lie behind a URL. What is wrong with a file is a SettingsError that names the file and the place.
"""

import csv
import io
import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from litgpt_moe_ext.data.pipeline.compression import decompress, split_compression
from litgpt_moe_ext.data.pipeline.remote import RemoteFile, is_url, name_of
from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.machine import memory_bytes

_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 1024
_TAR_BLOCK = 512
_JSON = (".json", ".jsonl", ".ndjson")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# One line end of any style. A CR at the end of what was read so far is not decided yet.
_LINE_END = rb"(?:\r\n|\r(?!\n)|\n)"
# First bytes of files that are not text: what they are, and what to do about it.
_NOT_TEXT = (
    (b"\x1f\x8b", "gzip", "let its name end in .gz"),
    (b"BZh", "bzip2", "let its name end in .bz2"),
    (b"\xfd7zXZ\x00", "xz", "let its name end in .xz"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "let its name end in .zst"),
    (b"PAR1", "parquet", "let its name end in .parquet"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"%PDF-", "PDF", "extract its text"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
)
_SAMPLE_BYTES = 4096
_USUAL_MEMORY = 16 << 30
# Memory for a byte of a document: encoding takes 160 bytes of it (measured), parsing a JSON list about 5.
_ENCODING_BYTES = 200
_LIST_BYTES = 40


class Record(NamedTuple):
    """One document of a file.

    Attributes:
        text: The document; may be empty.
        place: Where it is, for messages: `byte 1234` (of the uncompressed file), `row 12` or `item 12`.
        position: Bytes of the file (as it is on disk) that have been read so far; for progress.
        member: Name of the file inside an archive.
    """

    text: str
    place: str
    position: int
    member: str = ""


@dataclass(frozen=True, slots=True)
class TextFormat:
    r"""How to find the documents in a file.

    Attributes:
        field: Name of the JSON key or the column that holds the text.
        separator: What ends a document in a plain text file; None makes each file one document. A line end in it
            matches those of every style. White space around separated documents is dropped.
        invalid_utf8: `error`, or `replace` to put U+FFFD in the place of what is not UTF-8.
        max_expansion: How many times its own size may come out of a compressed file.
    """

    field: str = "text"
    separator: str | None = None
    invalid_utf8: Literal["error", "replace"] = "error"
    max_expansion: float = 200.0

    @property
    def errors(self) -> str:
        """What Python's decoders call `invalid_utf8`."""
        return "strict" if self.invalid_utf8 == "error" else "replace"


@dataclass(frozen=True, slots=True)
class _File:
    """An opened file, or a member of an archive.

    Attributes:
        stream: Its content, decompressed.
        name: Its lower-case name without the suffix of a compression; says how to read it.
        where: What to call it in error messages.
        position: Tells how many bytes of the file on disk have been read.
        start: Bytes of a byte-order mark that were skipped.
    """

    stream: io.BufferedReader
    name: str
    where: str
    position: Callable[[], int]
    start: int = 0


def largest_document() -> int:
    """Return how many bytes of text can be encoded at once in the memory of this machine."""
    return (memory_bytes() or _USUAL_MEMORY) // _ENCODING_BYTES


def documents(path: Path | str, text_format: TextFormat) -> Iterator[Record]:
    """Yield the documents of a file in order.

    The name decides: `.parquet`; `.json`, `.jsonl` and `.ndjson` (objects one a line, or one list of objects); `.csv`
    and `.tsv` with the names of the columns in the first row; anything else is plain text, with line ends of any style,
    which become LF. `.gz`, `.bz2`, `.xz` and `.zst` may follow any but parquet. `.tar` is read member by member in the
    same way; members with a leading dot are left out. A byte-order mark is skipped.

    Args:
        path: The file, or its URL (`litgpt_moe_ext.data.pipeline.remote`).
        text_format: How to find the documents in it.

    Raises:
        SettingsError: The file cannot be read, is damaged, is not text, or lacks the field; with file and place.
    """
    with _open(path) as (raw, size):
        name, compression = split_compression((name_of(str(path)) if is_url(path) else Path(path).name).lower())
        file = _File(raw, name, str(path), raw.tell)
        try:
            if compression:
                stream = decompress(raw, compression, str(path), text_format.max_expansion)
                file = replace(file, stream=stream)
            if name.endswith(".parquet"):
                yield from _parquet(file, path, size, text_format)
            elif name.endswith(".tar"):
                yield from _archive(file, text_format)
            else:
                yield from _text(file, text_format)
        except (EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise SettingsError(
                f"{path} is damaged or truncated: {error} (after byte {raw.tell()} of {size}); download or make it "
                "again"
            ) from error


@contextmanager
def _open(path: Path | str) -> Iterator[tuple[Any, int]]:
    """Give a file and its size."""
    if is_url(path):
        remote = RemoteFile(str(path))
        with io.BufferedReader(remote, _CHUNK_BYTES) as raw:
            yield raw, remote.size
        return
    try:
        raw = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
    with raw:
        yield raw, os.fstat(raw.fileno()).st_size


def _archive(file: _File, text_format: TextFormat) -> Iterator[Record]:
    watched = _WithTail(file.stream)
    with tarfile.open(fileobj=watched, mode="r|") as archive:  # pyrefly: ignore[no-matching-overload] it only reads
        for member in archive:
            base = member.name.rpartition("/")[2]
            content = archive.extractfile(member) if member.isfile() and not base.startswith(".") else None
            if content is not None:
                inner = _File(content, base.lower(), f"{file.where}: {member.name}", file.position)  # pyrefly: ignore[bad-argument-type] extractfile gives one
                for record in _text(inner, text_format):
                    yield record._replace(place=f"{record.place} of {member.name}", member=base)
    while watched.read(_CHUNK_BYTES):
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


def _text(file: _File, text_format: TextFormat) -> Iterator[Record]:
    sample = file.stream.peek(_SAMPLE_BYTES)[:_SAMPLE_BYTES]
    for start, kind, remedy in _NOT_TEXT:
        if sample.startswith(start):
            raise SettingsError(f"{file.where} is {kind}, not text; {remedy}")
    if b"\x00" in sample:
        raise SettingsError(
            f"{file.where} is not text: byte {sample.index(0)} is zero; leave it out, or convert it to UTF-8 text"
        )
    if sample.startswith(_BYTE_ORDER_MARK):
        file = replace(file, start=len(file.stream.read(len(_BYTE_ORDER_MARK))))
        sample = sample[file.start :]
    if file.name.endswith(_JSON):
        read = _json_list if sample.lstrip().startswith(b"[") else _json_lines
    elif file.name.endswith((".csv", ".tsv")):
        read = _table
    elif text_format.separator is not None:
        read = _separated_text
    else:
        read = _whole_text
    return read(file, text_format)


def _json_lines(file: _File, text_format: TextFormat) -> Iterator[Record]:
    offset, longest = file.start, largest_document()
    for line in iter(partial(file.stream.readline, longest + 1), b""):
        if len(line) > longest:
            raise _too_long(file, offset, longest)
        place = f"byte {offset}"
        if not line.isspace():
            item = _parse(line, file.where, offset, text_format)
            yield Record(_field(item, file.where, place, text_format), place, file.position())
        offset += len(line)


def _json_list(file: _File, text_format: TextFormat) -> Iterator[Record]:
    content = _read_whole(file, largest_document() * _LIST_BYTES)
    for number, item in enumerate(_parse(content, file.where, file.start, text_format)):
        place = f"item {number}"
        yield Record(_field(item, file.where, place, text_format), place, file.position())


def _parse(content: bytes, where: str, start: int, text_format: TextFormat) -> Any:
    text = _decode(content, where, start, text_format)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        offset = start + len(text[: error.pos].encode("utf-8", "surrogatepass"))
        raise SettingsError(
            f"{where} is not valid JSON at byte {offset}: {error.msg}; write objects one a line, or one list of objects"
        ) from error
    except RecursionError as error:
        raise SettingsError(f"{where} is nested too deep at byte {start}; write flat objects with a text") from error


def _field(item: object, where: str, place: str, text_format: TextFormat) -> str:
    if not isinstance(item, dict):
        raise SettingsError(
            f"{where} has {type(item).__name__} at {place} where an object with a text field belongs; write objects"
        )
    text = item.get(text_format.field)
    if text_format.field not in item:
        raise SettingsError(
            f"{where} has no field {text_format.field!r} at {place}, only {sorted(item)}; set field to one of them"
        )
    if text is None:
        return ""
    if not isinstance(text, str):
        raise SettingsError(
            f"{where} has {type(text).__name__} in field {text_format.field!r} at {place} where text belongs; set "
            "field to a text field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as an escape
        if text_format.invalid_utf8 == "error":
            raise SettingsError(
                f"{where} has half a surrogate pair at {place}, character {error.start} of the text, which is not "
                "Unicode; convert the file, or set invalid_utf8 to replace"
            ) from error
        text = text.encode("utf-8", "replace").decode("utf-8")
    return text


def _table(file: _File, text_format: TextFormat) -> Iterator[Record]:
    csv.field_size_limit(largest_document())  # instead of the 128 KB that the csv module allows for
    text = io.TextIOWrapper(file.stream, "utf-8", text_format.errors, newline="")
    rows = csv.reader(text, delimiter="\t" if file.name.endswith(".tsv") else ",", strict=True)
    try:
        names = next(rows, [])
        if text_format.field not in names:
            raise SettingsError(
                f"{file.where} has no column {text_format.field!r}, only {names}; set field to one of them"
            )
        column = names.index(text_format.field)
        for number, row in enumerate(rows):
            if len(row) <= column:
                raise SettingsError(
                    f"{file.where} has {len(row)} columns in row {number} (line {rows.line_num}), too few for column "
                    f"{text_format.field!r}; repair the file"
                )
            yield Record(row[column], f"row {number}", file.position())
    except csv.Error as error:
        raise SettingsError(
            f"{file.where} is not a valid table at line {rows.line_num}: {error}; download or make it again"
        ) from error
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{file.where} is not UTF-8 after line {rows.line_num} ({error.reason}); convert the file, or set "
            "invalid_utf8 to replace"
        ) from error
    finally:
        text.detach()


def _whole_text(file: _File, text_format: TextFormat) -> Iterator[Record]:
    text = _decode(_read_whole(file, largest_document()), file.where, file.start, text_format)
    yield Record(_with_line_feeds(text), f"byte {file.start}", file.position())


def _separated_text(file: _File, text_format: TextFormat) -> Iterator[Record]:
    parts = re.split(r"\r\n|\r|\n", text_format.separator or "")
    separator = re.compile(_LINE_END.join(re.escape(part.encode()) for part in parts))
    most = sum(len(part.encode()) for part in parts) + 2 * (len(parts) - 1)  # bytes of a separator
    rest, offset, ended, longest = bytearray(), file.start, False, largest_document()
    while not ended:
        searched = max(len(rest) - most, 0)
        chunk = file.stream.read(_CHUNK_BYTES)
        ended = not chunk
        rest += chunk
        done = 0
        for match in separator.finditer(rest, searched):
            if match.end() == len(rest) and not ended:
                break  # the next bytes may belong to it
            yield _document(file, rest[done : match.start()], offset + done, text_format)
            done = match.end()
        del rest[:done]
        offset += done
        if len(rest) > longest:
            raise _too_long(file, offset, longest)
    if rest.strip():
        yield _document(file, rest, offset, text_format)


def _read_whole(file: _File, most: int) -> bytes:
    chunks, size = [], 0
    while chunk := file.stream.read(_CHUNK_BYTES):
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            raise _too_long(file, file.start, most)
    return b"".join(chunks)


def _too_long(file: _File, offset: int, most: int) -> SettingsError:
    return SettingsError(
        f"{file.where} has more than {most} bytes in one piece from byte {offset} on, too many to encode in the "
        "memory of this machine; cut it into documents (plain text with separator, JSON as one object a line)"
    )


def _document(file: _File, content: bytes | bytearray, offset: int, text_format: TextFormat) -> Record:
    text = _with_line_feeds(_decode(content, file.where, offset, text_format))
    return Record(text.strip(), f"byte {offset}", file.position())


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _decode(content: bytes | bytearray, where: str, offset: int, text_format: TextFormat) -> str:
    try:
        return content.decode("utf-8", text_format.errors)
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{where} is not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file, or set "
            "invalid_utf8 to replace"
        ) from error


def _parquet(file: _File, path: Path | str, size: int, text_format: TextFormat) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file.stream if is_url(path) else path) as table:
            names = table.schema_arrow.names
            if text_format.field not in names:
                raise SettingsError(
                    f"{path} has no column {text_format.field!r}, only {names}; set field to one of them"
                )
            kind = table.schema_arrow.field(text_format.field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise SettingsError(
                    f"{path} has {kind} in column {text_format.field!r} where text belongs; set field to a text column"
                )
            rows = max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[text_format.field]):
                done = size * (row + len(batch)) // rows
                for text in _column(batch.column(0), path, row, text_format):
                    yield Record(text or "", f"row {row}", done)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SettingsError(
            f"{path} is a damaged parquet file ({one_line(error)}, after row {row}); download it again"
        ) from error


def _column(column: Any, path: Path | str, first_row: int, text_format: TextFormat) -> list[str | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        contents = column.cast("binary").to_pylist()
    return [
        None if content is None else _decode(content, f"{path}: row {first_row + number}", 0, text_format)
        for number, content in enumerate(contents)
    ]
