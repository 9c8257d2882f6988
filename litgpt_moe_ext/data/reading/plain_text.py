"""Documents in plain text: one per file, or separated. Line ends of any style become LF."""

import re
from collections.abc import Iterator

from litgpt_moe_ext.data.reading.record import OpenFile, Record, TextFormat, largest_document

# A line end of any style. A CR at the end of the bytes read so far may still be followed by LF.
_LINE_END = rb"(?:\r\n|\r(?!\n)|\n)"


def read_whole_text(file: OpenFile, text_format: TextFormat) -> Iterator[Record]:
    """Yield a file as one document."""
    text = _decode(file, file.read_whole(largest_document()), file.start, text_format)
    yield Record(text, f"byte {file.start}", file.position())


def read_separated_text(file: OpenFile, text_format: TextFormat) -> Iterator[Record]:
    """Yield the documents between separators."""
    parts = re.split(r"\r\n|\r|\n", text_format.separator or "")
    separator = re.compile(_LINE_END.join(re.escape(part.encode()) for part in parts))
    most = sum(len(part.encode()) for part in parts) + 2 * (len(parts) - 1)  # bytes of a separator
    rest, offset, ended, longest = bytearray(), file.start, False, largest_document()
    while not ended:
        searched = max(len(rest) - most, 0)
        chunk = file.read_chunk()
        ended = not chunk
        rest += chunk
        done = 0
        for match in separator.finditer(rest, searched):
            if match.end() == len(rest) and not ended:
                break  # the next bytes may belong to the separator
            yield _document(file, rest[done : match.start()], offset + done, text_format)
            done = match.end()
        del rest[:done]
        offset += done
        if len(rest) > longest:
            raise file.too_long(offset, longest)
    if rest.strip():
        yield _document(file, rest, offset, text_format)


def _document(file: OpenFile, content: bytes | bytearray, offset: int, text_format: TextFormat) -> Record:
    # Concatenated files may each have a byte-order mark.
    text = _decode(file, content, offset, text_format).strip().removeprefix("\ufeff").lstrip()
    return Record(text, f"byte {offset}", file.position())


def _decode(file: OpenFile, content: bytes | bytearray, offset: int, text_format: TextFormat) -> str:
    file.refuse_zeros(content, offset)
    return with_line_feeds(text_format.decode(content, file.where, offset))


def with_line_feeds(text: str) -> str:
    """Return a text with all line ends as LF."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
