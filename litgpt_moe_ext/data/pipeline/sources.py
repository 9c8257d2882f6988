"""Where documents come from: files, URLs, or a dataset of the Hugging Face library, all as one class."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.reading.record import Record, TextFormat
from litgpt_moe_ext.data.reading.remote import name_of, remote_facts
from litgpt_moe_ext.data.reading.tables import texts_of
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.checksums import sha256_of

Side = Literal["train", "val"]
SIDES: tuple[Side, ...] = ("train", "val")
_QUESTIONS_AT_ONCE = 16
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """A sequence of documents.

    Attributes:
        name: For messages, and to keep sources apart.
        split: Side of its documents; None decides for each document, by a hash of its text.
        size: Bytes on disk (0 if unknown); for progress.
        identity: Equal for equal content.
        records: Starts reading from the beginning.
        check: Called after reading; raises SettingsError if the content has changed.
    """

    name: str
    split: Side | None
    size: int
    identity: str
    records: Callable[[], Iterator[Record]]
    check: Callable[[], None] = lambda: None


def file_sources(
    files: Sequence[Path], split: Side | None, text_format: TextFormat, hashes: FileHashes
) -> list[Source]:
    """Return a source per file.

    Raises:
        SettingsError: A file cannot be read.
    """
    sources = []
    for file in files:
        stat, content = file.stat(), hashes.hash(file)
        records, check = partial(documents, file, text_format), partial(require_unchanged, file, stat, content)
        sources.append(Source(str(file), split, stat.st_size, _identity(file, content), records, check))
    return sources


def require_unchanged(file: Path, before: os.stat_result, content: str) -> None:
    """Refuse a file that changed while it was read, as the key of the corpus depends on its content.

    Args:
        file: The file, which may no longer exist.
        before: Its `stat` result from before it was hashed, perhaps hours ago.
        content: Its SHA-256 (hex).

    Raises:
        SettingsError: Its content has changed.
    """
    if not file.exists():
        return
    stat = file.stat()
    if (stat.st_size, stat.st_mtime_ns) != (before.st_size, before.st_mtime_ns) and sha256_of(file) != content:
        raise SettingsError(f"{file} has changed since the preparation began; run again when nothing writes to it")


def split_sources(
    train: Sequence[Path], val: Sequence[Path], text_format: TextFormat, hashes: FileHashes
) -> list[Source]:
    """Return the sources of files to train on and of files to validate on.

    Raises:
        SettingsError: A file, or the content of one, is among both.
    """
    if both := set(train) & set(val):
        raise SettingsError(f"val_path: {sorted(both)[0]} would train and validate; set val_path to files of their own")
    ours, theirs = file_sources(train, "train", text_format, hashes), file_sources(val, "val", text_format, hashes)
    training = {source.identity: source.name for source in ours}
    for source in theirs:
        if source.size and source.identity in training:
            raise SettingsError(
                f"val_path: {source.name} has the content of {training[source.identity]}, which would train and "
                "validate; remove one of them, or set val_path to files of their own"
            )
    return ours + theirs


def remote_sources(urls: Sequence[str], split: Side | None, text_format: TextFormat) -> list[Source]:
    """Return a source per URL, each read only as far as its documents are needed.

    Raises:
        SettingsError: A file does not exist, or its server cannot be reached or gives nothing to notice changes by.
    """
    with ThreadPoolExecutor(_QUESTIONS_AT_ONCE) as pool:
        facts = list(pool.map(remote_facts, urls))
    return [
        Source(url, split, size, _identity(Path(name_of(url)), content), partial(documents, url, text_format))
        for url, (size, content) in zip(urls, facts, strict=True)
    ]


def dataset_source(dataset: Any, name: str, split: Side | None, text_format: TextFormat) -> Source:
    """Return the rows of a `datasets.Dataset` as a source.

    Raises:
        SettingsError: It has no such column.
    """
    if text_format.field not in dataset.column_names:
        raise SettingsError(
            f"field: {text_format.field!r} is not a column of {name}; set field to one of {dataset.column_names}"
        )
    texts = dataset.select_columns([text_format.field])
    # The library knows only the size of the whole dataset, of which this may be a slice.
    rows = sum(split.num_examples for split in (dataset.info.splits or {}).values())
    size = (dataset.info.dataset_size or 0) * len(dataset) // max(rows, 1)
    return Source(name, split, size, dataset._fingerprint, partial(_rows, texts, name, text_format, size))


def _rows(dataset: Any, name: str, text_format: TextFormat, size: int) -> Iterator[Record]:
    rows, number = max(len(dataset), 1), 0
    for table in dataset.with_format("arrow").iter(_ROWS_AT_ONCE):
        for text in texts_of(table[text_format.field], f"{name}: row", number, text_format):
            if text is not None and not isinstance(text, str):
                raise SettingsError(
                    f"field: {text_format.field!r} of {name} holds {type(text).__name__} at row {number}; set field to "
                    "a column of text"
                )
            number += 1
            yield Record(text or "", f"row {number - 1}", size * number // rows)


def _identity(file: Path, content: str) -> str:
    return f"{''.join(file.suffixes[-2:])}:{content}"  # the name says how to read it
