"""Causal self-attention of a whole sequence: all of it, in a sliding window, and within documents.

Shape legend: B batch, H query heads, G key/value heads, T tokens, S keys, d head size. In comments W is a window and N
the number of blocks of W tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.attention.documents import Documents, document_mask
from litgpt_moe_ext.attention.sinks import Softmax, fused_sink_attention, sink_attention


def causal_attention(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    softmax: Softmax,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Attend to the visible preceding tokens.

    A GPU kernel that supports windows and documents does everything in one call. Elsewhere the sequence is cut into
    documents, and these into blocks, to avoid a mask of T * T elements; only documents under `torch.compile` or on a
    GPU without such a kernel need one.

    Args:
        q_BHTd: Queries.
        k_BGTd: Keys.
        v_BGTd: Values.
        softmax: How scores become weights.
        window: Number of visible tokens, the token itself included, or `None` for all.
        documents: Documents that do not see each other, or `None`.

    Returns:
        (B, H, T, d).
    """
    T = q_BHTd.size(2)
    if window is not None and window >= T:
        window = None
    in_one_call = window is not None if documents is None else documents.offsets is not None
    if q_BHTd.is_cuda and in_one_call:
        out_BHTd = fused_sink_attention(q_BHTd, k_BGTd, v_BGTd, softmax, window, documents)
        if out_BHTd is not None:
            return out_BHTd
    if documents is not None and documents.lengths is not None:
        return _attend_document_by_document(q_BHTd, k_BGTd, v_BGTd, softmax, window, documents.lengths)
    if documents is not None:
        position_T = torch.arange(T, device=q_BHTd.device)
        visible_B1TT = document_mask(position_T, documents.start_BT, T)
        if window is not None:
            visible_B1TT &= window_mask(position_T, T, window)
        return sink_attention(q_BHTd, k_BGTd, v_BGTd, softmax, visible_B1TT)
    if window is None:
        return sink_attention(q_BHTd, k_BGTd, v_BGTd, softmax)
    return _attend_block_by_block(q_BHTd, k_BGTd, v_BGTd, softmax, window)


def window_mask(position: Tensor, n_keys: int, window: int) -> Tensor:
    """Tell which of the first `n_keys` positions lie in the causal window of each query.

    Args:
        position: Positions of the queries, (T,) or (B, T), integer.
        n_keys: Number of keys, S; key j has position j.
        window: Number of visible positions, the query's own included.

    Returns:
        True where a query may look, bool, (T, S) or (B, 1, T, S).
    """
    distance = position.unsqueeze(-1) - torch.arange(n_keys, device=position.device)
    visible = (distance >= 0) & (distance < window)
    return visible if position.dim() == 1 else visible.unsqueeze(1)


def _attend_block_by_block(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, softmax: Softmax, window: int) -> Tensor:
    # The cost grows with T * W instead of T * T. The first block of W tokens sees only itself. Every other block sees
    # itself and its predecessor through the same mask, (W, 2W), so these run as one batch.
    B, _, T, _ = q_BHTd.shape
    first = sink_attention(q_BHTd[:, :, :window], k_BGTd[:, :, :window], v_BGTd[:, :, :window], softmax)
    q_blocks, k_blocks, v_blocks = (_blocks(x, window) for x in (q_BHTd, k_BGTd, v_BGTd))
    # Query i of a block is key W + i of the two visible blocks.
    position_W = torch.arange(window, 2 * window, device=q_BHTd.device)
    rest = sink_attention(
        q_blocks[:, 1:].flatten(0, 1),
        torch.cat((k_blocks[:, :-1], k_blocks[:, 1:]), dim=3).flatten(0, 1),
        torch.cat((v_blocks[:, :-1], v_blocks[:, 1:]), dim=3).flatten(0, 1),
        softmax,
        window_mask(position_W, 2 * window, window),
    )
    rest = rest.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat((first, rest[:, :, : T - window]), dim=2)


def _blocks(x_BHTd: Tensor, window: int) -> Tensor:
    # (B, N, H, W, d). Padding goes to the end, where only padding queries see it.
    padding = -x_BHTd.size(2) % window
    return F.pad(x_BHTd, (0, 0, 0, padding)).unflatten(2, (-1, window)).transpose(1, 2)


def _attend_document_by_document(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    softmax: Softmax,
    window: int | None,
    lengths: tuple[int, ...],
) -> Tensor:
    B, H, T, _ = q_BHTd.shape
    # One sequence after the other, (1, heads, B * T, d). The gradient of one split is one concatenation; slices would
    # each add a tensor of full size.
    pieces = (
        (x if B == 1 else x.transpose(0, 1).flatten(1, 2).unsqueeze(0)).split(lengths, dim=2)
        for x in (q_BHTd, k_BGTd, v_BGTd)
    )
    outs = [causal_attention(q, k, v, softmax, window) for q, k, v in zip(*pieces, strict=True)]
    out_1HNd = torch.cat(outs, dim=2)
    return out_1HNd if B == 1 else out_1HNd.view(H, B, T, -1).transpose(0, 1)
