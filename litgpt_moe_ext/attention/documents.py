"""Documents in a packed sequence: where they begin, and who may see whom.

A token sees the tokens of its own document up to itself. An EOS token belongs to the document it ends; a BOS token
begins one.

Shape suffixes: B batch, T tokens, S positions of the cache, N = B * T.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

# The offsets of a CUDA batch get a fixed size, as reading the true one would make the host wait. It has room for this
# mean length of documents, which also bounds the number of empty blocks that the kernel starts.
_MIN_MEAN_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Documents:
    """Where the documents of a batch begin.

    Attributes:
        start_BT: Position in the sequence at which the document of each token begins, int64.
        lengths: Number of tokens of each document, in the order of the B * T tokens; the end of a sequence ends a
            document too. Known on a CPU, else `None`.
        offsets: The same as running sums from 0, int32, padded with B * T; on a CUDA device, else `None`.
    """

    start_BT: torch.Tensor
    lengths: tuple[int, ...] | None = None
    offsets: torch.Tensor | None = None


def find_documents(idx_BT: torch.Tensor, boundary: Literal["eos", "bos"], token_id: int) -> Documents:
    """Find the documents in a batch of sequences.

    Args:
        idx_BT: Token ids.
        boundary: Whether `token_id` ends a document or begins one.
        token_id: Id of the EOS or BOS token.

    Returns:
        The documents. On a CPU their lengths are read from the ids, except under `torch.compile`; on a CUDA device the
        host waits for nothing.
    """
    begins_BT = idx_BT == token_id
    if boundary == "eos":
        begins_BT = F.pad(begins_BT, (1, 0))[:, :-1]
    position_T = torch.arange(idx_BT.size(1), device=idx_BT.device)
    start_BT = torch.where(begins_BT, position_T, 0).cummax(dim=1).values
    if idx_BT.is_cuda:
        return Documents(start_BT, offsets=document_offsets(start_BT == position_T))
    if idx_BT.device.type != "cpu" or torch.compiler.is_compiling():
        return Documents(start_BT)
    edges = [*(start_BT == position_T).flatten().nonzero().flatten().tolist(), idx_BT.numel()]
    return Documents(start_BT, lengths=tuple(end - begin for begin, end in zip(edges, edges[1:], strict=False)))


def document_offsets(is_first_BT: torch.Tensor) -> torch.Tensor:
    """Turn marks on the first token of every document into running sums of lengths, without reading any value.

    Args:
        is_first_BT: True for first tokens, bool; the first token of every sequence is one.

    Returns:
        int32, of a length that depends on B and T only. The entries behind the last document are B * T, which makes
        empty documents. More documents than fit fail an assertion on the device.
    """
    is_first_N = is_first_BT.flatten()
    N = is_first_N.numel()
    capacity = is_first_BT.size(0) * max(1, is_first_BT.size(1) // _MIN_MEAN_LENGTH)
    document_N = is_first_N.cumsum(0) - 1
    torch._assert_async(
        document_N[-1] < capacity,
        f"more than {capacity} documents in a batch of shape {tuple(is_first_BT.shape)}: documents shorter than "
        f"{_MIN_MEAN_LENGTH} tokens on average need attention_document_boundary: null",
    )
    offsets = torch.full((capacity + 1,), N, dtype=torch.int32, device=is_first_BT.device)
    position_N = torch.arange(N, dtype=torch.int32, device=is_first_BT.device)
    return offsets.scatter_reduce(0, document_N.clamp(max=capacity), position_N, "amin")


def document_mask(position: torch.Tensor, start_BT: torch.Tensor, n_keys: int) -> torch.Tensor:
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
    starts_BS: torch.Tensor,
    idx_BT: torch.Tensor,
    input_pos: torch.Tensor,
    boundary: Literal["eos", "bos"],
    token_id: int,
) -> Documents:
    """Find the documents of tokens whose predecessors are in a cache.

    Args:
        starts_BS: What is remembered from call to call, int64, zeros at first, one column more than the cache has
            positions: the position itself where a document begins, 0 elsewhere. Columns behind the newest token are
            never read, so a caller may go back. Changed in place.
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
