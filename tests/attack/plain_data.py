"""What the documentation says of a corpus, written down once more, as plainly as it can be: lists, and no arrays."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


def with_line_feeds(text: str) -> str:
    """Return a text whose line ends are all LF."""
    return "\n".join(text.replace("\r\n", "\n").split("\r"))


def not_empty(documents: Sequence[str]) -> list[str]:
    """Return the documents that hold more than white space."""
    return [text for text in documents if text.strip()]


def encode(directory: Path, documents: Sequence[str], prepend_bos: bool) -> list[list[int]]:
    """Return the tokens of each document, with what ends it, and perhaps what begins it.

    Args:
        directory: The tokenizer.
        documents: The texts, in which special tokens are text.
        prepend_bos: Whether each begins with a token of its own.
    """
    content = json.loads((directory / "tokenizer.json").read_text())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    begin = [ids[config["bos_token"]]] if prepend_bos else []
    content |= {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return [[*begin, *tokenizer.encode(text).ids, ids[config["eos_token"]]] for text in documents]


def read_shards(corpus: Path, side: str) -> list[int]:
    """Return the tokens that a prepared corpus has on one side."""
    tokens: list[int] = []
    for file in sorted(corpus.glob(f"{side}_*.bin")):
        content = file.read_bytes()
        magic, version, count = struct.unpack("<3i", content[:12])
        kind = {(20240520, 1): "H", (20240801, 7): "I"}[magic, version]
        tokens += struct.unpack(f"<{count}{kind}", content[1024:])
    return tokens


def stream_rows(documents: Sequence[Sequence[int]], length: int) -> list[tuple[int, ...]]:
    """Return the rows of documents one after the other: of `length` inputs, and the last target."""
    tokens = [token for document in documents for token in document]
    return [tuple(tokens[at : at + length + 1]) for at in range(0, len(tokens) - length, length)]


def pieces(documents: Sequence[Sequence[int]], length: int) -> list[tuple[int, ...]]:
    """Return documents in pieces that fit a row; each begins with the token by which the one before it ends."""
    return [
        tuple(document[at : at + length + 1]) for document in documents for at in range(0, len(document) - 1, length)
    ]


def best_fit_sizes(sizes: Sequence[int], room: int) -> list[int]:
    """Return how full rows are if each piece, the longest first, goes where the least room is left.

    Args:
        sizes: Of the pieces.
        room: Of a row.
    """
    rows: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [number for number, full in enumerate(rows) if full + size <= room]
        if fitting:
            rows[max(fitting, key=rows.__getitem__)] += size
        else:
            rows.append(size)
    return rows


def made_of(row: Sequence[int], parts: Sequence[Sequence[int]]) -> bool:
    """Return whether a row is some of these parts, one after the other, each whole."""
    ends = {0}
    for end in range(len(row) + 1):
        if end in ends:
            ends |= {end + len(part) for part in parts if tuple(row[end : end + len(part)]) == tuple(part)}
    return len(row) in ends
