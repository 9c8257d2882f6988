"""Documents in a packed sequence: where they begin, and which tokens see each other.

A token sees the tokens of its own document up to itself. An EOS token belongs to the document it ends; a BOS token
begins one.

Shape legend: B batch, T tokens, S positions of the cache, N = B * T.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.tokens.rows import Rows, host_copy

# If the ids are not in host memory, the offsets of a CUDA batch get a fixed size, because reading the true one would
# wait for the device. Every sequence has room for documents of this mean length, and for this many more. The kernel
# starts empty blocks for unused room.
_MEAN_LENGTH = 16
_MORE = 64
# Kernels start blocks of up to this many tokens, so rounding lengths up to a multiple of it adds no block.
_BLOCK = 128

Boundary = Literal["eos", "bos"]


class Extent(NamedTuple):
    """The number and length of documents for which a kernel must have room.

    Attributes:
        documents: Number of documents in the batch, at most.
        longest: Number of tokens of a document, at most.
    """

    documents: int
    longest: int


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a batch begin.

    Attributes:
        start_BT: Position in the sequence at which the document of each token begins, int64.
        lengths: Number of tokens of each document, in the order of the B * T tokens; the end of a sequence ends a
            document too. Known on a CPU, else `None`.
        offsets: The same as running sums from 0, int32, padded with B * T; on a CUDA device, else `None`.
        longest: Upper bound of the lengths of documents; with `offsets` only.
        overflow: A scalar on the device; 0, or NaN if there are more documents than `offsets` has room for or longer
            ones than `longest`; with `offsets` only. It is added to the hidden states, so that a wrong result cannot be
            mistaken for a right one. (A failed assertion on the device would make every tensor of the process
            unusable.)
    """

    start_BT: Tensor
    lengths: tuple[int, ...] | None = None
    offsets: Tensor | None = None
    longest: int | None = None
    overflow: Tensor | None = None


def find_documents(idx_BT: Tensor, boundary: Boundary, token_id: int) -> Documents:
    """Find the documents in a batch of sequences.

    Args:
        idx_BT: Token ids.
        boundary: Whether `token_id` ends a document or begins one.
        token_id: Id of the EOS or BOS token.

    Returns:
        The documents. On a CPU their lengths are read from the ids, except under `torch.compile`. On a CUDA device the
        host does not wait; the room they need is read from a host copy of the ids, if there is one. Tensors without
        data, used to count memory and FLOPs, stand for one document per sequence.
    """
    begins_BT = idx_BT == token_id
    if boundary == "eos":
        begins_BT = F.pad(begins_BT, (1, 0))[:, :-1]
    position_T = torch.arange(idx_BT.size(1), device=idx_BT.device)
    start_BT = torch.where(begins_BT, position_T, 0).cummax(dim=1).values
    if idx_BT.is_cuda:
        extent = needed_extent(idx_BT, boundary, token_id)
        offsets, overflow = document_offsets(start_BT == position_T, extent)
        return Documents(start_BT, offsets=offsets, longest=extent.longest, overflow=overflow)
    if idx_BT.device.type not in ("cpu", "meta") or torch.compiler.is_compiling():
        return Documents(start_BT)
    if idx_BT.is_meta or not (type(idx_BT) is Tensor or isinstance(idx_BT, Rows)):
        return Documents(start_BT, lengths=(idx_BT.size(1),) * idx_BT.size(0))
    return Documents(start_BT, lengths=tuple(_lengths(idx_BT, boundary, token_id).tolist()))


def needed_extent(idx_BT: Tensor, boundary: Boundary, token_id: int) -> Extent:
    """Return how much room the documents of a batch need, without reading from a device.

    Args:
        idx_BT: Token ids.
        boundary: Whether `token_id` ends a document or begins one.
        token_id: Id of the EOS or BOS token.

    Returns:
        The extent passed to `reserve_extent` for these ids. Otherwise the number of documents and the length of the
        longest, rounded up to a whole block, from the host copy of the ids. Without a copy, and under `torch.compile`,
        whose sizes may depend on B and T only, `largest_extent`.
    """
    if torch.compiler.is_compiling():
        return largest_extent(*idx_BT.shape)
    if (reserved := getattr(idx_BT, "_reserved_extent", None)) is not None:
        return reserved
    if (host_BT := host_copy(idx_BT)) is None:
        return largest_extent(*idx_BT.shape)
    lengths = _lengths(host_BT, boundary, token_id)
    return Extent(lengths.size, min(-(-int(lengths.max()) // _BLOCK) * _BLOCK, idx_BT.size(1)))


def reserve_extent(idx_BT: Tensor, extent: Extent) -> None:
    """Have `needed_extent` return `extent` for ids whose values will change; it is stored on this very tensor."""
    idx_BT._reserved_extent = extent  # pyrefly: ignore[missing-attribute]: as `host_copy` does


def _lengths(idx_BT: Tensor, boundary: Boundary, token_id: int) -> np.ndarray:
    is_first_BT = idx_BT.numpy() == token_id
    if boundary == "eos":
        is_first_BT[:, 1:] = is_first_BT[:, :-1].copy()
    is_first_BT[:, :1] = True
    return np.diff(np.flatnonzero(is_first_BT), append=is_first_BT.size)


def largest_extent(B: int, T: int) -> Extent:
    """Return the room for a batch whose shape alone is known.

    Returns:
        T / 16 + 64 documents, of any length, for every sequence; always enough for up to 68 tokens.
    """
    return Extent(min(B * T, B * (T // _MEAN_LENGTH + _MORE)), T)


def document_offsets(is_first_BT: Tensor, extent: Extent) -> tuple[Tensor, Tensor]:
    """Turn marks on the first token of every document into running sums of lengths, without waiting for the device.

    Args:
        is_first_BT: True for first tokens, bool, including the first token of every sequence.
        extent: The room.

    Returns:
        Offsets, int32, (`extent.documents` + 1,), whose entries after the last document are B * T, for empty documents;
        and a scalar, 0, or NaN if the documents do not fit.
    """
    is_first_N = is_first_BT.flatten()
    N, T, device = is_first_N.numel(), is_first_BT.size(1), is_first_BT.device
    capacity = extent.documents
    document_N = is_first_N.cumsum(0) - 1
    fits = document_N[-1] < capacity
    offsets = torch.full((capacity + 1,), N, dtype=torch.int32, device=device)
    position_N = torch.arange(N, dtype=torch.int32, device=device)
    offsets = offsets.scatter_reduce(0, document_N.clamp(max=capacity), position_N, "amin")
    # Documents that do not fit are merged into the last one, which ends with the batch.
    offsets[-1].fill_(N)  # an assignment would copy the number from the host, and wait
    if extent.longest < T:
        fits = fits & (offsets.diff().amax() <= extent.longest)
    return offsets, torch.where(fits, 0.0, math.nan)


def document_mask(position: Tensor, start_BT: Tensor, n_keys: int) -> Tensor:
    """Tell which of the first `n_keys` positions belong to the document of each query and do not follow it.

    Args:
        position: Positions of the queries, (T,) or (B, T).
        start_BT: Where their documents begin.
        n_keys: Number of keys, S; key j has position j.

    Returns:
        True where a query may look, bool, (B, 1, T, S).
    """
    key_S = torch.arange(n_keys, device=position.device)
    visible_BTS = (key_S >= start_BT.unsqueeze(-1)) & (key_S <= position.unsqueeze(-1))
    return visible_BTS.unsqueeze(1)


def remember_documents(
    starts_BS: Tensor,
    idx_BT: Tensor,
    input_pos: Tensor,
    boundary: Boundary,
    token_id: int,
) -> Documents:
    """Find the documents of tokens whose predecessors are in a cache.

    Args:
        starts_BS: State kept between calls, int64, zeros at first, one column more than the cache has positions: the
            position itself where a document begins, 0 elsewhere. Columns after the newest token are never read, so a
            caller may go back. Changed in place.
        idx_BT: Token ids.
        input_pos: Their positions, (T,) or (B, T).
        boundary: Whether `token_id` ends a document or begins one.
        token_id: Id of the EOS or BOS token.

    Returns:
        The documents, with starts only.
    """
    position_BT = input_pos.expand(idx_BT.shape)
    column_BT = position_BT + 1 if boundary == "eos" else position_BT
    starts_BS.scatter_(1, column_BT, torch.where(idx_BT == token_id, column_BT, 0))
    return Documents(starts_BS.cummax(dim=1).values.gather(1, position_BT))
