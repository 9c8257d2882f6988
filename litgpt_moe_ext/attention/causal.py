"""Causal self-attention of a whole sequence: all of it, in a sliding window, and within documents.

Shape suffixes: B batch, H query heads, G key/value heads, T tokens, D head size.
"""

from typing import NamedTuple

import torch

from litgpt_moe_ext.attention.documents import Documents, document_mask
from litgpt_moe_ext.attention.sinks import fused_sink_attention, sink_attention
from litgpt_moe_ext.attention.window import sliding_window_attention, window_mask


class Softmax(NamedTuple):
    """How scores become weights.

    Attributes:
        sinks: One logit per query head, (H,), or `None`.
        scale: Multiplied to the scores.
        dropout: Probability of dropping a weight.
        backend: The only kernel allowed, or `None`.
    """

    sinks: torch.Tensor | None
    scale: float
    dropout: float = 0.0
    backend: str | None = None

    def attend(
        self, q_BHTD: torch.Tensor, k_BGTD: torch.Tensor, v_BGTD: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend under a mask, causally if it is `None`; see `sink_attention`."""
        return sink_attention(
            q_BHTD, k_BGTD, v_BGTD, self.sinks,
            scale=self.scale, mask=mask, dropout=self.dropout, backend=self.backend,
        )  # fmt: skip


def causal_attention(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    softmax: Softmax,
    window: int | None = None,
    documents: Documents | None = None,
) -> torch.Tensor:
    """Attend to the preceding tokens that are visible.

    A GPU kernel that knows windows and documents does all of it in one call. Elsewhere the sequence is cut into
    documents, and these into blocks, so that no mask of T * T elements exists; only documents under `torch.compile` or
    on a GPU without such a kernel need one.

    Args:
        q_BHTD: Queries.
        k_BGTD: Keys.
        v_BGTD: Values.
        softmax: How scores become weights.
        window: Number of visible tokens, the token itself included, or `None` for all.
        documents: Documents that do not see each other, or `None`.

    Returns:
        (B, H, T, D).
    """
    if window is not None and window >= q_BHTD.size(2):
        window = None
    if window is None and documents is None:
        return softmax.attend(q_BHTD, k_BGTD, v_BGTD, None)
    if q_BHTD.is_cuda:
        out_BHTD = fused_sink_attention(
            q_BHTD, k_BGTD, v_BGTD, softmax.sinks,
            scale=softmax.scale, window=window, offsets=documents and documents.offsets, dropout=softmax.dropout,
            backend=softmax.backend,
        )  # fmt: skip
        if out_BHTD is not None:
            return out_BHTD
    if documents is None:
        return sliding_window_attention(softmax.attend, q_BHTD, k_BGTD, v_BGTD, window)
    if documents.lengths is not None:
        return _attend_document_by_document(q_BHTD, k_BGTD, v_BGTD, softmax, window, documents.lengths)
    T = q_BHTD.size(2)
    position_T = torch.arange(T, device=q_BHTD.device)
    visible_B1TT = document_mask(position_T, documents.start_BT, T)
    if window is not None:
        visible_B1TT &= window_mask(position_T, T, window)
    return softmax.attend(q_BHTD, k_BGTD, v_BGTD, visible_B1TT)


def _attend_document_by_document(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    softmax: Softmax,
    window: int | None,
    lengths: tuple[int, ...],
) -> torch.Tensor:
    B, H, T, D = q_BHTD.shape
    # One sequence after the other, (1, heads, B * T, D). Splitting once keeps the gradient one concatenation; slices
    # would each add a tensor of full size.
    pieces = (
        (x if B == 1 else x.transpose(0, 1).flatten(1, 2).unsqueeze(0)).split(lengths, dim=2)
        for x in (q_BHTD, k_BGTD, v_BGTD)
    )
    outs = [causal_attention(q, k, v, softmax, window) for q, k, v in zip(*pieces, strict=True)]
    out_1HND = torch.cat(outs, dim=2)
    return out_1HND if B == 1 else out_1HND.view(H, B, T, D).transpose(0, 1)
