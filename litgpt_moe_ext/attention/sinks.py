"""Softmax attention with a learnable sink logit per head (gpt-oss; Xiao et al. 2023, arXiv:2309.17453).

The softmax of a row runs over its scores and one more logit `s`, whose share of the probability is then dropped: a head
may attend to nothing. With `lse` the log-sum-exp of the scores, the share that is left is `sigmoid(lse - s)`, so any
flash kernel that returns `lse` computes this attention.

Shape suffixes: B batch, H query heads, G key/value heads (H is a multiple of G), T queries, S keys, D head size.
"""

import functools
import math
import warnings
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable

Backend = Literal["eager", "flash_cpu"]

_FLASH_CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sink_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Compute attention whose softmax has one extra logit per head that stands for no token.

    Under autocast the inputs are cast as `F.scaled_dot_product_attention` casts them. The softmax and the sinks are
    always at least float32.

    Args:
        q: Queries, (B, H, T, D).
        k: Keys, (B, G, S, D).
        v: Values, (B, G, S, D).
        sinks: One logit per query head, (H,), of any floating type. It is not scaled.
        scale: Multiplied to the scores.
        mask: Bool (True: may look) or additive floating mask that broadcasts to (B, H, T, S). `None` means causal and
            needs T == S.
        backend: Forces a backend; by default `choose_backend` picks one.

    Returns:
        (B, H, T, D) in the type of `q` (in the autocast type under autocast). A row that may look nowhere gives 0.

    Raises:
        ValueError: If the shapes do not fit together.
    """
    _check_shapes(q, k, sinks, mask)
    if _autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if backend is None:
        backend = choose_backend(q, k, v, mask)
        if backend == "eager" and q.device.type != "meta" and q.size(2) > 1 and not torch.compiler.is_compiling():
            _warn_of_eager(q.device.type, q.dtype)
    if backend == "eager":
        return _eager(q, k, v, sinks, mask, scale)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    return _FlashCPU.apply(q, k, v, sinks, mask, scale)


def choose_backend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> Backend:
    """Pick the fastest backend that gives right results for these tensors.

    Args:
        q: Queries, (B, H, T, D).
        k: Keys, (B, G, S, D).
        v: Values, (B, G, S, D).
        mask: The mask that goes with them.

    Returns:
        `"flash_cpu"` for what PyTorch's CPU flash kernel can do, else `"eager"`. On the meta device `"eager"` counts as
        many operations as `F.scaled_dot_product_attention` does there.
    """
    # The kernel divides by the sequence length, and returns wrong numbers for other head sizes or strides.
    flash_cpu = (
        q.device.type == "cpu"
        and q.dtype in _FLASH_CPU_DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.size(-1) == k.size(-1) == v.size(-1)
        and min(q.numel(), k.numel()) > 0
        and all(x.stride(-1) == 1 for x in (q, k, v))
        and (mask is None or not mask.requires_grad)
    )
    return "flash_cpu" if flash_cpu else "eager"


@functools.cache
def _warn_of_eager(device_type: str, dtype: torch.dtype) -> None:
    # Cached, so that a training run says it once.
    warnings.warn(
        f"Attention with sinks has no flash kernel for these {dtype} tensors on {device_type}: memory and time grow "
        "with the square of the sequence length. Without sinks (attention_sinks: false) PyTorch chooses a kernel.",
        stacklevel=3,
    )


def _autocast_enabled(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _check_shapes(q: torch.Tensor, k: torch.Tensor, sinks: torch.Tensor, mask: torch.Tensor | None) -> None:
    n_head, n_query_groups = q.size(1), k.size(1)
    if n_head % n_query_groups:
        raise ValueError(f"{n_head} query heads must be a multiple of the {n_query_groups} key/value heads")
    if sinks.shape != (n_head,):
        raise ValueError(f"sinks of shape {tuple(sinks.shape)} must have shape ({n_head},), one logit per query head")
    if mask is None and q.size(2) != k.size(2):
        raise ValueError(f"{q.size(2)} queries for {k.size(2)} keys need a mask; None is for as many keys as queries")


def _eager(
    q_BHTD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    sinks_H: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    # The definition, written out: the reference for every other backend and the fallback where there is none.
    B, H, T, D = q_BHTD.shape
    G, S = k_BGSD.shape[1:3]
    # Heads that share keys are rows (R = H / G * T) of one matrix product, so no key or value is repeated.
    q_BGRD = q_BHTD.reshape(B, G, H // G * T, D)
    scores_BHTS = (q_BGRD @ k_BGSD.mT * scale).view(B, H, T, S)
    scores_BHTS = scores_BHTS.to(_softmax_dtype(q_BHTD))
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q_BHTD.device).tril()
    scores_BHTS = scores_BHTS.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores_BHTS + mask
    sinks_BHT1 = sinks_H.to(scores_BHTS.dtype).view(1, H, 1, 1).expand(B, H, T, 1)
    share_BHTS = torch.cat((scores_BHTS, sinks_BHT1), dim=-1).softmax(dim=-1)[..., :-1]
    out_BGRD = share_BHTS.to(v_BGSD.dtype).reshape(B, G, H // G * T, S) @ v_BGSD
    return out_BGRD.view(B, H, T, v_BGSD.size(-1))


def _softmax_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


class _FlashCPU(torch.autograd.Function):
    """PyTorch's CPU flash attention with sinks.

    The stock backward recomputes probabilities as `p = exp(score - lse)` and turns them into score gradients
    `p * (dout @ v - rowsum(dout * out))`. With the sink counted in `lse` and `out`, these are the probabilities and the
    gradients of the softmax with the sink: the dropped column has the value 0, so it adds nothing to the row sum, and
    its own gradient is `-p_sink * rowsum(dout * out)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHTD: torch.Tensor,
        k_BGSD: torch.Tensor,
        v_BGSD: torch.Tensor,
        sinks_H: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        out_BHTD, lse_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHTD, k_BGSD, v_BGSD, 0.0, mask is None, attn_mask=mask, scale=scale
        )
        sinks_H1 = sinks_H.to(lse_BHT.dtype).unsqueeze(-1)
        out_BHTD.mul_(torch.sigmoid(lse_BHT - sinks_H1).unsqueeze(-1))
        ctx.save_for_backward(q_BHTD, k_BGSD, v_BGSD, sinks_H, mask, out_BHTD, torch.logaddexp(lse_BHT, sinks_H1))
        ctx.scale = scale
        return out_BHTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BHTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q_BHTD, k_BGSD, v_BGSD, sinks_H, mask, out_BHTD, lse_BHT = ctx.saved_tensors
        dq_BHTD, dk_BGSD, dv_BGSD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_BHTD, q_BHTD, k_BGSD, v_BGSD, out_BHTD, lse_BHT, 0.0, mask is None, attn_mask=mask, scale=ctx.scale
        )
        dsinks_H = None
        if ctx.needs_input_grad[3]:
            share_BHT = torch.exp(sinks_H.to(lse_BHT.dtype).unsqueeze(-1) - lse_BHT)
            delta_BHT = (dout_BHTD.to(lse_BHT.dtype) * out_BHTD).sum(-1)
            dsinks_H = -(share_BHT * delta_BHT).sum((0, 2)).to(sinks_H.dtype)
        return dq_BHTD, dk_BGSD, dv_BGSD, dsinks_H, None, None
