"""Placing documents into windows so that few are cut and little is padding. Pure functions over NumPy arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Packing:
    """Which pieces of a token stream share a window.

    Attributes:
        starts: Position of each piece in the stream, int64, shape (pieces,), ordered by window.
        lengths: Tokens of each piece, int64, shape (pieces,).
        window_starts: Index of the first piece of each window, and at the end the number of pieces; int64, shape
            (windows + 1,).
    """

    starts: np.ndarray
    lengths: np.ndarray
    window_starts: np.ndarray


def document_lengths(shards: Sequence[np.ndarray], eos_id: int, bos_id: int | None = None) -> np.ndarray:
    """Return the lengths of the documents in a stream, int64.

    Tokens after the last end of document count as a document.

    Args:
        shards: The stream; no document spans two shards.
        eos_id: Token at the end of each document.
        bos_id: Token at its beginning, if there is one.
    """
    ends, position = [np.empty(0, np.int64)], 0
    for shard in shards:
        ends.append(_document_ends(shard, eos_id, bos_id) + position)
        position += len(shard)
    borders = np.concatenate([[0], *ends])
    if borders[-1] != position:
        borders = np.append(borders, position)
    return np.diff(borders)


def first_documents(
    shards: Sequence[np.ndarray], count: int, eos_id: int, bos_id: int | None = None
) -> Sequence[np.ndarray]:
    """Return shards with only the first documents of a stream, divided as in `document_lengths`."""
    kept = []
    for shard in shards:
        ends = _document_ends(shard, eos_id, bos_id)
        if len(ends) >= count:
            return [*kept, shard[: ends[count - 1]]]
        kept.append(shard)
        count -= len(ends)
    return kept


def _document_ends(shard: np.ndarray, eos_id: int, bos_id: int | None) -> np.ndarray:
    # If one token both begins and ends documents, as in GPT-2, every second one is an end.
    per_document = 2 if bos_id == eos_id else 1
    return np.flatnonzero(np.asarray(shard) == eos_id)[per_document - 1 :: per_document] + 1


def first_tokens(shards: Sequence[np.ndarray], count: int) -> Sequence[np.ndarray]:
    """Return shards with only the first tokens of a stream."""
    kept = []
    for shard in shards:
        kept.append(shard[:count])
        count -= len(kept[-1])
        if not count:
            break
    return kept


def cut_documents(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces that fit a window of `block_size + 1` tokens.

    The pieces of a long document share one token with their neighbour, so that each token of a document but its first
    is a target exactly once. A document of one token has no target and is left out.

    Args:
        lengths: Tokens of each document of the stream, shape (documents,).
        block_size: Number of targets of a window.

    Returns:
        Starts and lengths of the pieces, int64, in stream order.
    """
    starts = np.cumsum(lengths) - lengths
    pieces = -(-(lengths - 1) // block_size)
    document = np.repeat(np.arange(len(lengths)), pieces)
    within = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * block_size
    return starts[document] + within, np.minimum(lengths[document] - within, block_size + 1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign pieces to windows by best-fit decreasing.

    From the longest to the shortest, each piece goes into the window with the least room that still holds it. That is
    the packing of Ding et al., "Fewer Truncations Improve Language Modeling", section 3 (arXiv 2404.10830).

    Args:
        lengths: Tokens of each piece, from 1 to `capacity`.
        capacity: Tokens of a window.

    Returns:
        The window of each piece, int64, shape (pieces,), windows numbered from 0 by their first piece.
    """
    window_of = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # windows by the room left in them
    rooms = 0  # bit r is set if some window has room r: the least room >= length is one shift away
    windows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            window = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, window = capacity, windows
            windows += 1
        window_of[piece] = window
        left = room - length
        if left:
            with_room[left].append(window)
            rooms |= 1 << left
    _, first, inverse = np.unique(window_of, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first, kind="stable")] = np.arange(len(first))
    return number[inverse]


def pack(lengths: np.ndarray, block_size: int, together: bool) -> Packing:
    """Place the documents of a stream into windows of `block_size + 1` tokens.

    Args:
        lengths: Tokens of each document, shape (documents,).
        block_size: Number of targets of a window.
        together: Whether several documents may share a window (best fit), or each begins its own.
    """
    starts, pieces = cut_documents(lengths, block_size)
    window_of = best_fit(pieces, block_size + 1) if together else np.arange(len(pieces))
    order = np.argsort(window_of, kind="stable")
    window_starts = np.concatenate([[0], np.cumsum(np.bincount(window_of))])
    return Packing(starts[order], pieces[order], window_starts.astype(np.int64))
