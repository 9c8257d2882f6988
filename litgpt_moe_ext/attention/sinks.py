"""Softmax attention with a learnable sink logit per head (gpt-oss; Xiao et al. 2023, arXiv:2309.17453).

The softmax of a row runs over its scores and one more logit `s`, whose share of the probability is then dropped: a head
may attend to nothing. With `lse` the log-sum-exp of the scores, the share that is left is `sigmoid(lse - s)`, so any
flash kernel that returns `lse` computes this attention.

Shape suffixes: B batch, H query heads, G key/value heads (H is a multiple of G), T queries, S keys, D head size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from litgpt_moe_ext.attention.kernels.backends import FUSED_PATTERNS, choose_backend
from litgpt_moe_ext.attention.kernels.flash import KERNELS, Call


def sink_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Compute attention whose softmax has one extra logit per head that stands for no token.

    Under autocast the inputs are cast as `F.scaled_dot_product_attention` casts them. The softmax and the sinks are
    always at least float32.

    Args:
        q: Queries, (B, H, T, D).
        k: Keys, (B, G, S, D).
        v: Values, (B, G, S, D).
        sinks: One logit per query head, (H,), of any floating type. It is not scaled. `None` is ordinary softmax,
            which without `backend` is `F.scaled_dot_product_attention`.
        scale: Multiplied to the scores.
        mask: Bool (True: may look) or additive floating mask that broadcasts to (B, H, T, S). It takes the place of
            the causal mask.
        causal: Without mask, whether a query sees only keys up to its own position, which needs T == S; otherwise it
            sees them all.
        dropout: Probability of dropping an attention weight; the others grow to make up for it.
        backend: Forces a backend; by default `choose_backend` picks one.

    Returns:
        (B, H, T, D) in the type of `q` (in the autocast type under autocast). A row that may look nowhere gives 0 where
        there are sinks.

    Raises:
        ValueError: If the shapes do not fit together, or a forced backend cannot compute this.
    """
    causal = causal and mask is None
    if sinks is None and backend is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=True
        )
    _check_shapes(q, k, sinks, causal)
    q, k, v = _autocast(q, k, v)
    backend = choose_backend(q, k, v, mask, dropout, forced=backend)
    if backend == "eager":
        return _eager(q, k, v, sinks, mask, causal, scale, dropout)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    elif mask is not None:
        # The kernels read the mask's memory as elements of q's type and do not check it.
        mask = mask.to(q.dtype)
    return _Flash.apply(q, k, v, sinks, mask, None, backend, Call(scale, causal, None, dropout))


def fused_sink_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    scale: float,
    window: int | None,
    offsets: torch.Tensor | None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor | None:
    """Compute causal attention within windows and documents in one kernel call, where a backend can.

    Args:
        q: Queries, (B, H, T, D).
        k: Keys, (B, G, T, D).
        v: Values, (B, G, T, D).
        sinks: One logit per query head, (H,), or `None`.
        scale: Multiplied to the scores.
        window: Number of visible keys, the query's own included, or `None`.
        offsets: Where the documents begin in the B * T tokens, int32, on the device, last entry B * T; or `None`.
        dropout: Probability of dropping an attention weight.
        backend: Forces a backend.

    Returns:
        (B, H, T, D), or `None` if the backend has no such kernel.

    Raises:
        ValueError: If a forced backend cannot compute this.
    """
    q, k, v = _autocast(q, k, v)
    backend = choose_backend(q, k, v, None, dropout, forced=backend)
    if backend not in FUSED_PATTERNS:
        return None
    return _Flash.apply(q, k, v, sinks, None, offsets, backend, Call(scale, True, window, dropout))


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    # Autocast knows nothing of operators that are called directly.
    device_type = tensors[0].device.type
    if (
        tensors[0].dtype == torch.float64
        or not torch.amp.is_autocast_available(device_type)
        or not torch.is_autocast_enabled(device_type)
    ):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)


def _check_shapes(q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor | None, causal: bool) -> None:
    n_head, n_query_groups = q.size(1), k.size(1)
    if n_head % n_query_groups:
        raise ValueError(f"{n_head} query heads must be a multiple of the {n_query_groups} key/value heads")
    if sinks is not None and sinks.shape != (n_head,):
        raise ValueError(f"sinks of shape {tuple(sinks.shape)} must have shape ({n_head},), one logit per query head")
    if causal and q.size(2) != k.size(2):
        raise ValueError(f"{q.size(2)} queries for {k.size(2)} keys need a mask; None is for as many keys as queries")


def _eager(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    sinks_H: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    # The definition, written out: the reference for every other backend, the fallback where there is none, and the
    # fastest way for a handful of queries, which is limited by reading the keys and values once.
    scores_BHTS = grouped_matmul(q_BHTD, k_BGSD.mT) * scale
    if causal:
        mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=q_BHTD.device).tril()
    share_BHTS = sink_softmax(scores_BHTS, sinks_H, mask)
    share_BHTS = F.dropout(share_BHTS, dropout) if dropout else share_BHTS
    return grouped_matmul(share_BHTS.to(v_BGSD.dtype), v_BGSD)


def sink_softmax(
    scores_BHTS: torch.Tensor, sinks_H: torch.Tensor | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Turn scores into weights, in float32 at least.

    Args:
        scores_BHTS: Scores, scaled.
        sinks_H: One logit per query head, or `None`.
        mask: Bool or additive mask that broadcasts to the scores.

    Returns:
        Weights, (B, H, T, S). Their sum over S falls short of 1 by the share of the sink.
    """
    B, H, T, _ = scores_BHTS.shape
    scores_BHTS = scores_BHTS.to(torch.promote_types(scores_BHTS.dtype, torch.float32))
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores_BHTS + mask
    if sinks_H is None:
        return scores_BHTS.softmax(dim=-1)
    sinks_BHT1 = sinks_H.to(scores_BHTS.dtype).view(1, H, 1, 1).expand(B, H, T, 1)
    return torch.cat((scores_BHTS, sinks_BHT1), dim=-1).softmax(dim=-1)[..., :-1]


def grouped_matmul(x_BHTI: torch.Tensor, y_BGIJ: torch.Tensor) -> torch.Tensor:
    """Multiply matrices of every query head with those of its key/value head, repeating none of them.

    Args:
        x_BHTI: Left operands.
        y_BGIJ: Right operands.

    Returns:
        (B, H, T, J).
    """
    B, H, T, I = x_BHTI.shape  # noqa: E741
    G, J = y_BGIJ.size(1), y_BGIJ.size(3)
    # Heads that share keys are rows of one product.
    return (x_BHTI.reshape(B, G, H // G * T, I) @ y_BGIJ).view(B, H, T, J)


class _Flash(torch.autograd.Function):
    """A flash kernel with sinks.

    The stock backward recomputes probabilities as `p = exp(score - lse)` and turns them into score gradients
    `p * (dout @ v - rowsum(dout * out))`. With the sink counted in `lse` and `out`, these are the probabilities and the
    gradients of the softmax with the sink: the dropped column has the value 0, so it adds nothing to the row sum, and
    its own gradient is `-p_sink * rowsum(dout * out)`. Dropout happens after the softmax and changes none of this.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHTD: torch.Tensor,
        k_BGSD: torch.Tensor,
        v_BGSD: torch.Tensor,
        sinks_H: torch.Tensor | None,
        mask: torch.Tensor | None,
        offsets: torch.Tensor | None,
        backend: str,
        call: Call,
    ) -> torch.Tensor:
        out_BHTD, lse_BHT, rest = KERNELS[backend].forward(q_BHTD, k_BGSD, v_BGSD, mask, offsets, call)
        if sinks_H is not None:
            sinks_H1 = sinks_H.to(lse_BHT.dtype).unsqueeze(-1)
            out_BHTD = _scale_in_place(out_BHTD, torch.sigmoid(lse_BHT - sinks_H1).unsqueeze(-1))
            lse_BHT = torch.logaddexp(lse_BHT, sinks_H1)
        ctx.save_for_backward(q_BHTD, k_BGSD, v_BGSD, sinks_H, mask, offsets, out_BHTD, lse_BHT, *rest)
        ctx.backend, ctx.call = backend, call
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BHTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BHTD, k_BGSD, v_BGSD, sinks_H, mask, offsets, out_BHTD, lse_BHT, *rest = ctx.saved_tensors
        dq_BHTD, dk_BGSD, dv_BGSD = KERNELS[ctx.backend].backward(
            dout_BHTD, q_BHTD, k_BGSD, v_BGSD, mask, offsets, out_BHTD, lse_BHT, tuple(rest), ctx.call
        )
        dsinks_H = None
        if sinks_H is not None and ctx.needs_input_grad[3]:
            share_BHT = torch.exp(sinks_H.to(lse_BHT.dtype).unsqueeze(-1) - lse_BHT)
            delta_BHT = (dout_BHTD * out_BHTD).sum(-1, dtype=lse_BHT.dtype)
            dsinks_H = -(share_BHT * delta_BHT).sum((0, 2)).to(sinks_H.dtype)
        return dq_BHTD, dk_BGSD, dv_BGSD, dsinks_H, None, None, None, None


def _scale_in_place(out_BHTD: torch.Tensor, gate_BHT1: torch.Tensor) -> torch.Tensor:
    # Nobody else has what a kernel has just returned, except a mode that watches operators: selective activation
    # checkpointing may keep it for the recomputation. `torch.compile` makes its own graph of operators without side
    # effects, whatever is written here.
    if not torch.compiler.is_compiling() and is_in_torch_dispatch_mode():
        out_BHTD = out_BHTD.clone()
    # A CPU multiplies two types by way of whole copies in the larger one, which takes a sixth of the kernel's time for
    # 512 tokens in bfloat16. A GPU does it on the way.
    return out_BHTD.mul_(gate_BHT1 if out_BHTD.is_cuda else gate_BHT1.to(out_BHTD.dtype))
