"""What kind of thing a token is part of: for Python by Python's own tokenizer, for other text by its characters."""

import io
import itertools
import keyword
import token as token_types
import tokenize
from collections.abc import Sequence

PYTHON_CLASSES = (
    "keyword",
    "name",
    "number",
    "string",
    "comment",
    "operator",
    "indentation",
    "line break",
    "space",
    "other",
)
TEXT_CLASSES = ("word start", "word part", "number", "punctuation", "line break", "space")

# Python 3.12 and later read an f-string as several tokens.
_STRING_NAMES = ("STRING", "FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
_STRING_TYPES = {getattr(token_types, name) for name in _STRING_NAMES if hasattr(token_types, name)}


def python_classes(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Return one of `PYTHON_CLASSES` for each token of a Python source.

    A token belongs to what its first character other than blanks is part of. Text that Python's tokenizer cannot read
    to its end (a file cut off) is classified as far as it goes; the rest is "other".

    Args:
        text: The source.
        spans: First character and the one after the last of each token.
    """
    kinds = _python_kinds(text)
    return [_class_of_blanks(text, start, stop) or kinds[_first_visible(text, start, stop)] for start, stop in spans]


def text_classes(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """Return one of `TEXT_CLASSES` for each token of any text.

    Args:
        text: The text.
        spans: First character and the one after the last of each token.
    """
    return [_text_class(text, start, stop) for start, stop in spans]


def _python_kinds(text: str) -> list[str]:
    # Class of every character.
    kinds = ["other"] * len(text)
    # As the tokenizer counts lines, to which a form feed is a blank.
    starts = [0, *itertools.accumulate(len(line) for line in io.StringIO(text, newline=""))]
    try:
        for found in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
            kind = _python_kind(found)
            if kind is not None:
                first, last = (starts[row - 1] + column for row, column in (found.start, found.end))
                kinds[first:last] = [kind] * (last - first)
    except (tokenize.TokenError, SyntaxError):
        pass  # cut off, or not Python from here on
    return kinds


def _python_kind(found: tokenize.TokenInfo) -> str | None:
    if found.type == token_types.NAME:
        return "keyword" if keyword.iskeyword(found.string) else "name"
    if found.type in _STRING_TYPES:
        return "string"
    simple = {token_types.NUMBER: "number", token_types.COMMENT: "comment", token_types.OP: "operator"}
    return simple.get(found.type)


def _class_of_blanks(text: str, start: int, stop: int) -> str | None:
    piece = text[start:stop]
    if piece.strip():
        return None
    if "\n" in piece:
        return "line break"
    line = text.rfind("\n", 0, start) + 1
    return "space" if text[line:start].strip(" \t") else "indentation"


def _first_visible(text: str, start: int, stop: int) -> int:
    return next(i for i in range(start, stop) if not text[i].isspace())


def _text_class(text: str, start: int, stop: int) -> str:
    piece = text[start:stop]
    if not piece.strip():
        return "line break" if "\n" in piece else "space"
    first = _first_visible(text, start, stop)
    if text[first].isdigit():
        return "number"
    if not text[first].isalpha():
        return "punctuation"
    return "word part" if first == start and start > 0 and text[start - 1].isalnum() else "word start"
