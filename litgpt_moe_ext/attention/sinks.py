"""Softmax attention with a learnable sink logit per head (gpt-oss; Xiao et al. 2023, arXiv:2309.17453).

The softmax of a row runs over its scores and one more logit `s`, whose share of the probability is then dropped, so a
head may attend to nothing. The written-out softmax is the reference, and the fallback where no flash kernel works
(`litgpt_moe_ext.attention.flash`).

Shape legend: B batch, H query heads, G key/value heads (H is a multiple of G), T queries, S keys, d head size.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.attention.documents import Documents
from litgpt_moe_ext.attention.flash import flash_attention
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs
from litgpt_moe_ext.attention.kernels.choice import choose_kernel
from litgpt_moe_ext.attention.kernels.kernel import Ability
from litgpt_moe_ext.attention.kernels.own import EAGER
from litgpt_moe_ext.attention.kernels.registry import KERNELS, load_functions
from litgpt_moe_ext.kernels.precision import matmul_dtype

load_functions()


class Softmax(NamedTuple):
    """How scores become weights.

    Attributes:
        sinks_H: One logit per query head, of any floating type, not scaled; None for ordinary softmax.
        scale: Factor of the scores.
        dropout: Probability of dropping a weight; the others are scaled up to compensate.
        backend: The only kernel allowed, or None.
    """

    sinks_H: Tensor | None
    scale: float
    dropout: float = 0.0
    backend: str | None = None


def sink_attention(
    q_BHTd: Tensor,
    k_BGSd: Tensor,
    v_BGSd: Tensor,
    softmax: Softmax,
    mask: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Compute attention whose softmax has one extra logit per head, for no token.

    Under autocast the inputs are cast as `F.scaled_dot_product_attention` casts them. The softmax and the sinks are
    always at least float32.

    Args:
        q_BHTd: Queries.
        k_BGSd: Keys.
        v_BGSd: Values.
        softmax: How scores become weights. Without sinks and `backend` it is `F.scaled_dot_product_attention`.
        mask: Bool (True: visible) or additive floating mask that broadcasts to (B, H, T, S). It replaces the causal
            mask.
        causal: Without a mask, whether a query sees only keys up to its own position, which needs T == S; otherwise it
            sees all keys.

    Returns:
        (B, H, T, d) in the type of the queries (under autocast, in autocast's). With sinks, a row that sees nothing
        gives 0.

    Raises:
        ValueError: If the shapes do not fit together.
        SettingsError: If a forced kernel cannot compute this.
    """
    causal = causal and mask is None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]  # kernels take two or four dimensions
    if softmax.sinks_H is None and softmax.backend is None:
        if mask is not None and mask.is_floating_point() and mask.dtype != q_BHTd.dtype:
            # The mask must have the queries' type, or float32 with narrower queries. With float64 queries torch's CPU
            # kernel accepts float32 too, but reads its memory as float64.
            mask = mask.to(torch.promote_types(q_BHTd.dtype, torch.float32))
        return F.scaled_dot_product_attention(
            q_BHTd, k_BGSd, v_BGSd, attn_mask=mask, dropout_p=softmax.dropout, is_causal=causal, scale=softmax.scale,
            enable_gqa=True,
        )  # fmt: skip
    _check_shapes(q_BHTd, k_BGSd, softmax.sinks_H, causal)
    q_BHTd, k_BGSd, v_BGSd = _autocast(q_BHTd, k_BGSd, v_BGSd)
    needs = _needs(softmax, mask=mask)
    kernel = choose_kernel(q_BHTd, k_BGSd, v_BGSd, needs, softmax.backend)
    if kernel == EAGER:
        return _eager(q_BHTd, k_BGSd, v_BGSd, softmax, mask, causal)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q_BHTd.dtype).masked_fill_(~mask, -math.inf)
    elif mask is not None:
        # The kernels read the mask as elements of q's type, unchecked.
        mask = mask.to(q_BHTd.dtype)
    call = Call(kernel, softmax.scale, causal, None, softmax.dropout)
    return flash_attention(call, softmax.sinks_H, Inputs(q_BHTd, k_BGSd, v_BGSd, mask))


def fused_sink_attention(
    q_BHTd: Tensor,
    k_BGTd: Tensor,
    v_BGTd: Tensor,
    softmax: Softmax,
    window: int | None,
    documents: Documents | None,
) -> Tensor | None:
    """Compute causal attention within windows and documents in one kernel call, where a kernel can.

    Args:
        q_BHTd: Queries.
        k_BGTd: Keys.
        v_BGTd: Values.
        softmax: How scores become weights.
        window: Number of visible keys, the query's own included, or None.
        documents: Documents that do not see each other, with offsets, or None.

    Returns:
        (B, H, T, d), or None if no kernel (or not the forced one) can do it.
    """
    offsets, longest = (None, None) if documents is None else (documents.offsets, documents.longest)
    needs = _needs(softmax, window=window, offsets=offsets)
    if softmax.backend is not None:
        abilities = KERNELS[softmax.backend].abilities
        if any(need in ("window", "documents") and need not in abilities for need in needs):
            return None
    q_BHTd, k_BGTd, v_BGTd = _autocast(q_BHTd, k_BGTd, v_BGTd)
    kernel = choose_kernel(q_BHTd, k_BGTd, v_BGTd, needs, softmax.backend)
    if kernel == EAGER:
        return None
    call = Call(kernel, softmax.scale, True, window, softmax.dropout, longest)
    return flash_attention(call, softmax.sinks_H, Inputs(q_BHTd, k_BGTd, v_BGTd, None, offsets))


def _needs(
    softmax: Softmax, mask: Tensor | None = None, window: int | None = None, offsets: Tensor | None = None
) -> tuple[Ability, ...]:
    needs: tuple[Ability, ...] = ()
    if mask is not None:
        needs = ("mask", "mask_gradient") if mask.requires_grad else ("mask",)
    if window is not None:
        needs = (*needs, "window")
    if offsets is not None:
        needs = (*needs, "documents")
    return (*needs, "dropout") if softmax.dropout else needs


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    # Autocast does not cast for operators that are called directly.
    return tuple(x.to(matmul_dtype(x)) for x in tensors)


def _check_shapes(q: Tensor, k: Tensor, sinks: Tensor | None, causal: bool) -> None:
    n_head, n_query_groups = q.size(1), k.size(1)
    if n_head % n_query_groups:
        raise ValueError(f"{n_head} query heads must be a multiple of the {n_query_groups} key/value heads")
    if sinks is not None and sinks.shape != (n_head,):
        raise ValueError(f"sinks of shape {tuple(sinks.shape)} must have shape ({n_head},), one logit per query head")
    if causal and q.size(2) != k.size(2):
        raise ValueError(f"{q.size(2)} queries for {k.size(2)} keys need a mask; None is for as many keys as queries")


def _eager(
    q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, softmax: Softmax, mask: Tensor | None, causal: bool
) -> Tensor:
    # The definition, written out: the reference for every kernel, the fallback without one, and the fastest way for a
    # handful of queries, whose time goes into reading the keys and values once.
    scores_BHTS = grouped_matmul(q_BHTd, k_BGSd.mT) * softmax.scale
    if causal:
        mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=q_BHTd.device).tril()
    share_BHTS = sink_softmax(scores_BHTS, softmax.sinks_H, mask)
    share_BHTS = F.dropout(share_BHTS, softmax.dropout) if softmax.dropout else share_BHTS
    return grouped_matmul(share_BHTS.to(v_BGSd.dtype), v_BGSd)


def sink_softmax(scores_BHTS: Tensor, sinks_H: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Turn scores into weights, in at least float32.

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


def grouped_matmul(x_BHTI: Tensor, y_BGIJ: Tensor) -> Tensor:
    """Multiply the matrix of every query head by the matrix of its key/value head, without repeating the latter.

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
