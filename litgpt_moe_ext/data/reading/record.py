"""What reading a file takes and gives, and what readers of all kinds share."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.machine import memory_bytes

CHUNK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_USUAL_MEMORY = 16 << 30
# Memory for a byte of a document: encoding takes 160 bytes of it (measured).
_ENCODING_BYTES = 200


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

    def decode(self, content: bytes | bytearray, where: str, offset: int = 0) -> str:
        """Return bytes as text.

        Args:
            content: The bytes.
            where: What to call the file in error messages.
            offset: Where in it they begin.

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

    def read_chunk(self) -> bytes:
        """Return the next bytes; none at the end."""
        return self.stream.read(CHUNK_BYTES)

    def read_whole(self, most: int) -> bytes:
        """Return all that is left.

        Raises:
            SettingsError: It is more than `most` bytes.
        """
        chunks, size = [], 0
        while chunk := self.read_chunk():
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                raise self.too_long(self.start, most)
        return b"".join(chunks)

    def refuse_zeros(self, content: bytes | bytearray, offset: int) -> None:
        """Raise SettingsError if there is a zero among bytes that begin at byte `offset`: no text has one."""
        if b"\x00" in content:
            raise SettingsError(
                f"{self.where} is not text: byte {offset + content.index(0)} is zero; leave it out, or convert it to "
                "UTF-8 text"
            )

    def too_long(self, offset: int, most: int) -> SettingsError:
        """Return the error for a document of more than `most` bytes that begins at byte `offset`."""
        return SettingsError(
            f"{self.where} has more than {most} bytes in one piece from byte {offset} on, too many to encode in the "
            "memory of this machine; cut it into documents (plain text with separator, JSON as one object a line)"
        )


def largest_document() -> int:
    """Return how many bytes of text can be encoded at once in the memory of this machine."""
    return (memory_bytes() or _USUAL_MEMORY) // _ENCODING_BYTES
