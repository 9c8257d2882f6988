"""Operators that only GPUs have, written out.

Shape legend: B batch, T queries, S keys, H heads, G heads of keys and values, d head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FUSED: dict[str, Callable] = {}


def _fused(function: Callable) -> Callable:
    FUSED[function.__name__] = function
    return function


def _seen(T: int, S: int, causal: bool, left: int | None = None, right: int | None = None) -> Tensor:
    """Return which keys a query sees; the last query sees the last key."""
    distance_TS = torch.arange(S).unsqueeze(0) - torch.arange(T).unsqueeze(1) - (S - T)
    seen_TS = torch.ones(T, S, dtype=torch.bool)
    if causal:
        seen_TS &= distance_TS <= 0
    if left is not None and left >= 0:
        seen_TS &= distance_TS >= -left
    if right is not None and right >= 0:
        seen_TS &= distance_TS <= right
    return seen_TS


def _spread(x_BGSd: Tensor, H: int) -> Tensor:
    return x_BGSd.float().repeat_interleave(H // x_BGSd.size(1), 1)


def _gather(x_BHSd: Tensor, like_BGSd: Tensor) -> Tensor:
    return x_BHSd.unflatten(1, (like_BGSd.size(1), -1)).sum(2).to(like_BGSd.dtype)


def _attend(
    q_BHTd: Tensor, k_BGSd: Tensor, v_BGSd: Tensor, seen_TS: Tensor, scale: float | None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exps."""
    p_BHTS, lse_BHT = _weights(q_BHTd, k_BGSd, seen_TS, scale, bias)
    return (p_BHTS @ _spread(v_BGSd, q_BHTd.size(1))).to(q_BHTd.dtype), lse_BHT


def _weights(
    q_BHTd: Tensor, k_BGSd: Tensor, seen_TS: Tensor, scale: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    factor = q_BHTd.size(-1) ** -0.5 if scale is None else scale
    scores_BHTS = q_BHTd.float() @ _spread(k_BGSd, q_BHTd.size(1)).transpose(-1, -2) * factor
    if bias is not None:
        scores_BHTS = scores_BHTS + bias
    scores_BHTS = scores_BHTS.masked_fill(~seen_TS, float("-inf"))
    lse_BHT = scores_BHTS.logsumexp(-1)
    return (scores_BHTS - lse_BHT.unsqueeze(-1)).exp().nan_to_num(0.0), lse_BHT


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **how: Any
) -> list[Tensor]:
    """Return the gradients of queries, keys and values; `lse` may be other than that of the scores, as with sinks."""
    factor = q.size(-1) ** -0.5 if how["scale"] is None else how["scale"]
    p_BHTS, own_BHT = _weights(q, k, how["seen_TS"], how["scale"], how.get("bias"))
    p_BHTS = p_BHTS * (own_BHT - lse.float()).nan_to_num(0.0).exp().unsqueeze(-1)
    dout = dout.float()
    delta = (dout * out.float()).sum(-1, keepdim=True)
    dscores_BHTS = p_BHTS * (dout @ _spread(v, q.size(1)).transpose(-1, -2) - delta)
    dq = dscores_BHTS @ _spread(k, q.size(1)) * factor
    dk = dscores_BHTS.transpose(-1, -2) @ q.float() * factor
    return [dq.to(q.dtype), _gather(dk, k), _gather(p_BHTS.transpose(-1, -2) @ dout, v)]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _documents(offsets: Tensor, *tensors: Tensor) -> list[list[Tensor]]:
    """Return packed tensors, (tokens, heads, d), by document, with heads first."""
    bounds = offsets.tolist()
    return [
        _heads_first(*(x[start:end].unsqueeze(0) for x in tensors))
        for start, end in zip(bounds, bounds[1:], strict=False)
    ]


def _window(options: dict[str, Any]) -> tuple[int | None, int | None]:
    return options.get("window_size_left"), options.get("window_size_right")


@_fused
def _flash_attention_forward(q, k, v, offsets, _1, _2, _3, _4, causal, _5, *, scale=None, **options):
    if offsets is None:
        q, k, v = _heads_first(q, k, v)
        out, lse = _attend(q, k, v, _seen(q.size(2), k.size(2), causal, *_window(options)), scale)
        return out.transpose(1, 2), lse
    outs, lses = [], []
    for q_, k_, v_ in _documents(offsets, q, k, v):
        out, lse = _attend(q_, k_, v_, _seen(q_.size(2), q_.size(2), causal, *_window(options)), scale)
        outs.append(out.transpose(1, 2)[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


@_fused
def _flash_attention_backward(
    dout, q, k, v, out, lse, offsets, _1, _2, _3, _4, causal, _5, _6, *, scale=None, **options
):
    if offsets is None:
        seen = _seen(q.size(1), k.size(1), causal, *_window(options))
        return _heads_first(*_attend_backward(*_heads_first(dout, q, k, v, out), lse, seen_TS=seen, scale=scale))
    parts = []
    starts = offsets.tolist()
    for start, tensors in zip(starts, _documents(offsets, dout, q, k, v, out), strict=False):
        T = tensors[0].size(2)
        seen = _seen(T, T, causal, *_window(options))
        gradients = _attend_backward(*tensors, lse[:, start : start + T].unsqueeze(0), seen_TS=seen, scale=scale)
        parts.append([x.transpose(1, 2)[0] for x in gradients])
    return [torch.cat(gradients) for gradients in zip(*parts, strict=True)]


@_fused
def _efficient_attention_forward(q, k, v, bias, _1, _2, _3, _4, _5, mask_type, with_lse=False, *, scale=None, **_):
    q, k, v = _heads_first(q, k, v)
    out, lse = _attend(q, k, v, _seen(q.size(2), k.size(2), mask_type != 0), scale, bias)
    padded = torch.nn.functional.pad(lse, (0, -lse.size(-1) % 32), value=float("inf"))
    return [out.transpose(1, 2), *([padded] if with_lse else [])]


@_fused
def _efficient_attention_backward(
    dout, q, k, v, bias, out, _1, _2, _3, _4, lse, _5, _6, _7, mask_type, _8, *, scale=None, **_
):
    seen = _seen(q.size(1), k.size(1), mask_type != 0)
    lse = lse[..., : q.size(1)]
    how = {"seen_TS": seen, "scale": scale, "bias": bias}
    return _heads_first(*_attend_backward(*_heads_first(dout, q, k, v, out), lse, **how))


@_fused
def _fused_rms_norm(x, _, weight, eps):
    factor = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps))
    y = x.float() * factor
    return (y if weight is None else y * weight.float()).to(x.dtype), factor


@_fused
def _fused_rms_norm_backward(dout, x, _, factor, weight, _mask):
    normed, dnormed = x.float() * factor, dout.float() * weight.float()
    dx = factor * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    return [dx.to(x.dtype), (dout.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)]
