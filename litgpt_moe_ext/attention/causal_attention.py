"""Causal self-attention of a whole sequence: all of it, in a sliding window, and within documents.

Shape legend: B batch, H query heads, G key/value heads, T tokens, d head size.
"""

import torch
from torch import Tensor

from litgpt_moe_ext.attention.documents import Documents, document_mask
from litgpt_moe_ext.attention.sinks import Softmax, fused_sink_attention, sink_attention
from litgpt_moe_ext.attention.sliding_window import sliding_window_attention, window_mask


def causal_attention(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    softmax: Softmax,
    window: int | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Attend to the preceding tokens that are visible.

    A GPU kernel that knows windows and documents does all of it in one call. Elsewhere the sequence is cut into
    documents, and these into blocks, so that no mask of T * T elements exists; only documents under `torch.compile` or
    on a GPU without such a kernel need one.

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

    def attend(q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, mask: Tensor | None) -> Tensor:
        return sink_attention(q_BHTd, k_BGSd, v_BGSd, softmax, mask)

    return sliding_window_attention(attend, q_BHTd, k_BGTd, v_BGTd, window)


def _attend_document_by_document(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    softmax: Softmax,
    window: int | None,
    lengths: tuple[int, ...],
) -> Tensor:
    B, H, T, d = q_BHTd.shape
    # One sequence after the other, (1, heads, B * T, d). Splitting once keeps the gradient one concatenation; slices
    # would each add a tensor of full size.
    pieces = (
        (x if B == 1 else x.transpose(0, 1).flatten(1, 2).unsqueeze(0)).split(lengths, dim=2)
        for x in (q_BHTd, k_BGTd, v_BGTd)
    )
    outs = [causal_attention(q, k, v, softmax, window) for q, k, v in zip(*pieces, strict=True)]
    out_1HNd = torch.cat(outs, dim=2)
    return out_1HNd if B == 1 else out_1HNd.view(H, B, T, d).transpose(0, 1)
