"""Documents out of files: plain text, JSON (lines or a list), parquet, each also gzipped or inside a tar archive.

`documents` is the only way in. It reads as a stream, so a file may be larger than memory (a JSON list has to be held
whole) and may as well lie behind a URL. What is wrong with a file is a SettingsError that names the file and the place.
"""

import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from litgpt_moe_ext.data.pipeline.remote import RemoteFile, is_url, name_of
from litgpt_moe_ext.errors import SettingsError

_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 1024
_JSON = (".json", ".jsonl", ".ndjson")


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
    """How to find the documents in a file.

    Attributes:
        field: Name of the JSON key or parquet column that holds the text.
        separator: What ends a document in a plain text file; None makes each file one document. White space around
            separated documents is dropped.
        invalid_utf8: `error`, or `replace` to put U+FFFD in the place of what is not UTF-8.
    """

    field: str = "text"
    separator: str | None = None
    invalid_utf8: Literal["error", "replace"] = "error"


def documents(path: Path | str, text_format: TextFormat) -> Iterator[Record]:
    """Yield the documents of a file in order.

    The name decides: `.parquet`; `.json`, `.jsonl` and `.ndjson` (objects one a line, or one list of objects);
    anything else is plain text. `.gz` may follow any but parquet. `.tar`, `.tar.gz` and `.tgz` are read member
    by member in the same way; members with a leading dot are left out.

    Args:
        path: The file, or its URL (`litgpt_moe_ext.data.pipeline.remote`).
        text_format: How to find the documents in it.

    Raises:
        SettingsError: The file cannot be read, is damaged, is not UTF-8, or lacks the field; with file and place.
    """
    name = (name_of(path) if is_url(path) else Path(path).name).lower()
    with _open(path) as (raw, position, size):
        try:
            if name.endswith(".parquet"):
                yield from _parquet(raw, path, size, text_format)
            elif name.endswith((".tar", ".tar.gz", ".tgz")):
                yield from _archive(path, raw, text_format, position)
            elif name.endswith(".gz"):
                with gzip.open(raw) as file:
                    yield from _members(file, str(path), name.removesuffix(".gz"), text_format, position)
            else:
                yield from _members(raw, str(path), name, text_format, position)
        except (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError) as error:
            raise SettingsError(
                f"{path} is damaged or truncated: {error} (after byte {position()} of {size}); download or make it "
                "again"
            ) from error


@contextmanager
def _open(path: Path | str) -> Iterator[tuple[BinaryIO, Callable[[], int], int]]:
    """Give a file, how many of its bytes were read, and its size."""
    if is_url(path):
        remote = RemoteFile(str(path))
        with io.BufferedReader(remote, _CHUNK_BYTES) as raw:
            yield raw, raw.tell, remote.size
    else:
        try:
            raw = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise SettingsError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
        with raw:
            yield raw, raw.tell, os.fstat(raw.fileno()).st_size


def _archive(path: Path | str, raw: BinaryIO, text_format: TextFormat, position: Callable[[], int]) -> Iterator[Record]:
    with tarfile.open(fileobj=raw, mode="r|*") as archive:
        for member in archive:
            base = member.name.rpartition("/")[2]
            if member.isfile() and not base.startswith("."):
                file = archive.extractfile(member)
                where = f"{path}: {member.name}"
                for record in _members(file, where, base.lower(), text_format, position):
                    yield record._replace(place=f"{record.place} of {member.name}", member=base)


def _members(
    file: BinaryIO, where: str, name: str, text_format: TextFormat, position: Callable[[], int]
) -> Iterator[Record]:
    if name.endswith(_JSON):
        start = file.peek(64).lstrip() if hasattr(file, "peek") else b""
        read = _json_list if start.startswith(b"[") else _json_lines
    elif text_format.separator is not None:
        read = _separated_text
    else:
        read = _whole_text
    return read(file, where, text_format, position)


def _json_lines(file: BinaryIO, where: str, text_format: TextFormat, position: Callable[[], int]) -> Iterator[Record]:
    offset = 0
    for line in file:
        place = f"byte {offset}"
        offset += len(line)
        if line.isspace():
            continue
        yield Record(_field(_parse(line, where, place, text_format), where, place, text_format), place, position())


def _json_list(file: BinaryIO, where: str, text_format: TextFormat, position: Callable[[], int]) -> Iterator[Record]:
    for number, item in enumerate(_parse(file.read(), where, "byte 0", text_format)):
        place = f"item {number}"
        yield Record(_field(item, where, place, text_format), place, position())


def _parse(content: bytes, where: str, place: str, text_format: TextFormat) -> object:
    start = int(place.removeprefix("byte "))
    text = _decode(content, where, start, text_format)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        offset = start + len(text[: error.pos].encode("utf-8", "surrogatepass"))
        raise SettingsError(
            f"{where} is not valid JSON at byte {offset}: {error.msg}; write objects one a line, or one list of objects"
        ) from error


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


def _whole_text(file: BinaryIO, where: str, text_format: TextFormat, position: Callable[[], int]) -> Iterator[Record]:
    yield Record(_decode(file.read(), where, 0, text_format), "byte 0", position())


def _separated_text(
    file: BinaryIO, where: str, text_format: TextFormat, position: Callable[[], int]
) -> Iterator[Record]:
    separator = text_format.separator.encode()
    rest, offset = b"", 0
    while chunk := file.read(_CHUNK_BYTES):
        *whole, rest = (rest + chunk).split(separator)
        for content in whole:
            yield Record(_decode(content, where, offset, text_format).strip(), f"byte {offset}", position())
            offset += len(content) + len(separator)
    if rest.strip():
        yield Record(_decode(rest, where, offset, text_format).strip(), f"byte {offset}", position())


def _decode(content: bytes, where: str, offset: int, text_format: TextFormat) -> str:
    if text_format.invalid_utf8 == "replace":
        return content.decode("utf-8", "replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{where} is not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file, or set "
            "invalid_utf8 to replace"
        ) from error


def _parquet(raw: BinaryIO, path: Path | str, size: int, text_format: TextFormat) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(raw if is_url(path) else path) as file:
            names = file.schema_arrow.names
            if text_format.field not in names:
                raise SettingsError(
                    f"{path} has no column {text_format.field!r}, only {names}; set field to one of them"
                )
            kind = file.schema_arrow.field(text_format.field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise SettingsError(
                    f"{path} has {kind} in column {text_format.field!r} where text belongs; set field to a text column"
                )
            rows = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_format.field]):
                done = size * (row + len(batch)) // rows
                for text in _column(batch.column(0), path, row, text_format):
                    yield Record(text or "", f"row {row}", done)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SettingsError(
            f"{path} is a damaged parquet file ({error}, after row {row}); download it again"
        ) from error


def _column(column, path: Path | str, first_row: int, text_format: TextFormat) -> list[str | None]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        contents = column.cast("binary").to_pylist()
    return [
        None if content is None else _decode(content, f"{path}: row {first_row + number}", 0, text_format)
        for number, content in enumerate(contents)
    ]
