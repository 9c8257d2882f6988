"""Documents in JSON: one object per line, or one list of objects."""

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from litgpt_moe_ext.data.reading.record import BYTE_ORDER_MARK, OpenFile, Record, TextFormat, largest_document
from litgpt_moe_ext.errors import SettingsError

# Parsing a list takes about 5 bytes of memory for each of its bytes, a fortieth of what encoding a document takes.
_LIST_BYTES = 40
_HALVES = re.compile("[\ud800-\udfff]")  # halves of surrogate pairs, which are not characters


def read_json_lines(file: OpenFile, text_format: TextFormat) -> Iterator[Record]:
    """Yield the texts of objects, one a line."""
    offset, longest = file.start, largest_document()
    for line in iter(partial(file.stream.readline, longest + 1), b""):
        if len(line) > longest:
            raise file.too_long(offset, longest)
        place = f"byte {offset}"
        # Files that were joined may have brought a byte-order mark each, perhaps before an empty line.
        content = line.removeprefix(BYTE_ORDER_MARK)
        if content.strip():
            item = _parse(content, file.where, offset, text_format)
            yield Record(_field(item, file.where, place, text_format), place, file.position())
        offset += len(line)


def read_json_list(file: OpenFile, text_format: TextFormat) -> Iterator[Record]:
    """Yield the texts of the objects of a list."""
    content = file.read_whole(largest_document() * _LIST_BYTES)
    for number, item in enumerate(_parse(content, file.where, file.start, text_format)):
        place = f"item {number}"
        yield Record(_field(item, file.where, place, text_format), place, file.position())


def _parse(content: bytes, where: str, start: int, text_format: TextFormat) -> Any:
    text = text_format.decode(content, where, start)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        offset = start + len(text[: error.pos].encode("utf-8", "surrogatepass"))
        raise SettingsError(
            f"{where} is not valid JSON at byte {offset}: {error.msg}; write objects one a line, or one list of objects"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep, or an integer of thousands of digits
        raise SettingsError(f"{where} cannot be read at byte {start} ({error}); write flat objects of text") from error


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
        text = _HALVES.sub("\ufffd", text)
    return text
