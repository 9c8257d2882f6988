"""Documents in a column of a table: CSV, TSV and parquet."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from litgpt_moe_ext.data.reading.plain_text import with_line_feeds
from litgpt_moe_ext.data.reading.record import OpenFile, Record, TextFormat, largest_document
from litgpt_moe_ext.data.reading.remote import is_url
from litgpt_moe_ext.errors import SettingsError, one_line

_PARQUET_ROWS = 1024


def read_csv(file: OpenFile, text_format: TextFormat) -> Iterator[Record]:
    """Yield a document for every row of a table after its first row, the column names; none if it is empty."""
    csv.field_size_limit(largest_document())  # instead of the csv module's 128 KiB
    text = io.TextIOWrapper(file.stream, "utf-8", text_format.errors, newline="")
    rows = csv.reader(text, delimiter="\t" if file.name.endswith(".tsv") else ",", strict=True)
    try:
        filled = (row for row in rows if row)
        if (names := next(filled, None)) is None:
            return
        column = _find_column(file, names, text_format)
        for number, row in enumerate(filled):
            if len(row) <= column:
                raise SettingsError(
                    f"{file.where} has {len(row)} columns in row {number} (line {rows.line_num}), too few for column "
                    f"{text_format.field!r}; repair the file"
                )
            if "\x00" in row[column]:
                raise SettingsError(
                    f"{file.where} is not text: a character of row {number} (line {rows.line_num}) is zero; repair the "
                    "file"
                )
            yield Record(with_line_feeds(row[column]), f"row {number}", file.position())
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


def read_parquet(file: OpenFile, size: int, text_format: TextFormat) -> Iterator[Record]:
    """Yield a document for every row.

    Args:
        file: The file, local or behind a URL.
        size: Its bytes, for progress.
        text_format: How to find the documents.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file.stream if is_url(file.where) else file.where) as table:
            kind = table.schema_arrow.field(_find_column(file, table.schema_arrow.names, text_format)).type
            if pa.types.is_dictionary(kind):  # as of a pandas column of categories
                kind = kind.value_type
            # `null` is the type of a column without any text.
            if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
                raise SettingsError(
                    f"{file.where} has {kind} in column {text_format.field!r} where text belongs; set field to a text "
                    "column"
                )
            rows = max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[text_format.field]):
                done = size * (row + len(batch)) // rows
                # If its name has a dot, a part of a nested column may have the same name.
                column = batch.column(_find_column(file, batch.schema.names, text_format))
                for text in texts_of(column, f"{file.where}: row", row, text_format):
                    yield Record(text or "", f"row {row}", done)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SettingsError(
            f"{file.where} is a damaged parquet file ({one_line(error)}, after row {row}); download it again"
        ) from error


def _find_column(file: OpenFile, names: list[str], text_format: TextFormat) -> int:
    if text_format.field not in names:
        raise SettingsError(f"{file.where} has no column {text_format.field!r}, only {names}; set field to one of them")
    return names.index(text_format.field)


def texts_of(column: Any, where: str, first_row: int, text_format: TextFormat) -> list[Any]:
    """Return the values of an Arrow column, decoding bytes as text.

    Args:
        column: The column.
        where: Its name in error messages, before the row number.
        first_row: Number of its first row.
        text_format: How to treat bytes that are not UTF-8.

    Raises:
        SettingsError: A text is not UTF-8, and `invalid_utf8` is `error`.
    """
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        contents = column.cast("binary").to_pylist()
    return [
        None if content is None else text_format.decode(content, f"{where} {first_row + number}")
        for number, content in enumerate(contents)
    ]
