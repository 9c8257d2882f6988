"""Which reader a file of text is for."""

from collections.abc import Iterator
from dataclasses import replace

from litgpt_moe_ext.data.reading.json_text import read_json_lines, read_json_list
from litgpt_moe_ext.data.reading.plain_text import read_separated_text, read_whole_text
from litgpt_moe_ext.data.reading.record import BYTE_ORDER_MARK, OpenFile, Record, TextFormat
from litgpt_moe_ext.data.reading.tables import read_csv
from litgpt_moe_ext.errors import SettingsError

_JSON = (".json", ".jsonl", ".ndjson")
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
    (b"\xff\xfe\x00\x00", "UTF-32 text", "convert it to UTF-8, for example with iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "convert it to UTF-8, for example with iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8"),
)
_SAMPLE_BYTES = 4096


def read_text(file: OpenFile, text_format: TextFormat) -> Iterator[Record]:
    """Yield the documents of a file that is neither parquet nor an archive.

    Raises:
        SettingsError: It is not text.
    """
    sample = file.stream.peek(_SAMPLE_BYTES)[:_SAMPLE_BYTES]
    for start, kind, remedy in _NOT_TEXT:
        if sample.startswith(start):
            is_named = remedy.endswith(file.name.rpartition(".")[2])  # in an archive, which cannot be opened in there
            raise SettingsError(f"{file.where} is {kind}, not text; {'unpack the archive' if is_named else remedy}")
    file.refuse_zeros(sample, 0)
    if sample.startswith(BYTE_ORDER_MARK):
        file = replace(file, start=len(file.stream.read(len(BYTE_ORDER_MARK))))
        sample = sample[file.start :]
    if file.name.endswith(_JSON):
        read = read_json_list if sample.lstrip().startswith(b"[") else read_json_lines
    elif file.name.endswith((".csv", ".tsv")):
        read = read_csv
    elif text_format.separator is not None:
        read = read_separated_text
    else:
        read = read_whole_text
    return read(file, text_format)
