"""The input and output of reading files, and helpers shared by all readers."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.machine import memory_bytes

CHUNK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_USUAL_MEMORY = 16 << 30
# Bytes of memory per byte of a document: encoding takes 160 (measured).
_ENCODING_BYTES = 200


class Record(NamedTuple):
    """One document of a file.

    Attributes:
        text: The document; may be empty.
        place: Its location, for messages: `byte 1234` (of the uncompressed file), `row 12` or `item 12`.
        position: Bytes of the file on disk read so far; for progress.
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
        separator: End of a document in plain text files; None makes each file one document. A line end in it matches
            any style. White space around separated documents is dropped.
        invalid_utf8: `error`, or `replace` to replace invalid bytes with U+FFFD.
        max_expansion: Maximum ratio of uncompressed to compressed size.
    """

    field: str = "text"
    separator: str | None = None
    invalid_utf8: Literal["error", "replace"] = "error"
    max_expansion: float = 200.0

    @property
    def errors(self) -> str:
        """`invalid_utf8` as the argument `errors` of Python's decoders."""
        return "strict" if self.invalid_utf8 == "error" else "replace"

    def decode(self, content: bytes | bytearray, where: str, offset: int = 0) -> str:
        """Return bytes as text.

        Args:
            content: The bytes.
            where: Name of the file in error messages.
            offset: Position of the bytes in the file.

        Raises:
            SettingsError: They are not UTF-8, and `invalid_utf8` is `error`.
        """
        try:
            return content.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise SettingsError(
                f"{where} is not UTF-8 at byte {offset + error.start} ({error.reason}); convert the file, or set "
                "invalid_utf8 to replace"
            ) from error


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An opened file, or a member of an archive.

    Attributes:
        stream: Its content, decompressed.
        name: Its lower-case name without compression suffix, which determines the format.
        where: Its name in error messages.
        position: Returns how many bytes of the file on disk have been read.
        start: Length of the skipped byte-order mark.
    """

    stream: io.BufferedReader
    name: str
    where: str
    position: Callable[[], int]
    start: int = 0

    def read_chunk(self) -> bytes:
        """Return the next bytes; empty at the end."""
        return self.stream.read(CHUNK_BYTES)

    def read_whole(self, most: int) -> bytes:
        """Return all remaining bytes.

        Raises:
            SettingsError: There are more than `most` bytes.
        """
        chunks, size = [], 0
        while chunk := self.read_chunk():
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                raise self.too_long(self.start, most)
        return b"".join(chunks)

    def refuse_zeros(self, content: bytes | bytearray, offset: int) -> None:
        """Raise SettingsError for a zero byte, which no text has; `offset` is the position of `content`."""
        if b"\x00" in content:
            raise SettingsError(
                f"{self.where} is not text: byte {offset + content.index(0)} is zero; leave it out, or convert it to "
                "UTF-8 text"
            )

    def too_long(self, offset: int, most: int) -> SettingsError:
        """Return the error for a document of more than `most` bytes that starts at byte `offset`."""
        return SettingsError(
            f"{self.where} has more than {most} bytes in one piece from byte {offset} on, too many to encode in the "
            "memory of this machine; cut it into documents (plain text with separator, JSON as one object a line)"
        )


def largest_document() -> int:
    """Return how many bytes of text this machine's memory allows to encode at once."""
    return (memory_bytes() or _USUAL_MEMORY) // _ENCODING_BYTES
