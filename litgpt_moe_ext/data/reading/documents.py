"""The documents of a file, wherever it is and whatever its form."""

import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt_moe_ext.data.reading.archives import read_archive
from litgpt_moe_ext.data.reading.compression import decompress, split_compression
from litgpt_moe_ext.data.reading.formats import read_text
from litgpt_moe_ext.data.reading.record import CHUNK_BYTES, OpenFile, Record, TextFormat
from litgpt_moe_ext.data.reading.remote import RemoteFile, is_url, name_of
from litgpt_moe_ext.data.reading.tables import read_parquet
from litgpt_moe_ext.errors import SettingsError


def documents(path: Path | str, text_format: TextFormat) -> Iterator[Record]:
    """Yield the documents of a file in order.

    The name decides: `.parquet`; `.json`, `.jsonl` and `.ndjson` (objects one a line, or one list of objects); `.csv`
    and `.tsv` with the names of the columns in the first row; anything else is plain text, with line ends of any style,
    which become LF, as they do in the cells of `.csv` and `.tsv`. `.gz`, `.bz2`, `.xz` and `.zst` may follow any but
    parquet. `.tar` is read member by member in the same way, but for parquet and other archives; members with a leading
    dot are left out. A byte-order mark is skipped, also where files were joined: at the start of a separated document
    or a JSON line. Empty lines of JSON lines and of tables are too.

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
                yield from read_archive(file, text_format)
            else:
                yield from read_text(file, text_format)
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
        with io.BufferedReader(remote, CHUNK_BYTES) as raw:
            yield raw, remote.size
        return
    try:
        raw = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror or error}); check the file") from error
    with raw:
        yield raw, os.fstat(raw.fileno()).st_size
