"""Softmax attention with a learnable sink logit per head (gpt-oss; Xiao et al. 2023, arXiv:2309.17453).

The softmax of a row runs over its scores and one more logit `s`, whose share of the probability is then dropped: a head
may attend to nothing. With `lse` the log-sum-exp of the scores, the share that is left is `sigmoid(lse - s)`, so any
flash kernel that returns `lse` computes this attention.

Shape legend: B batch, H query heads, G key/value heads (H is a multiple of G), T queries, S keys, d head size.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from litgpt_moe_ext.attention.documents import Documents
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs, Result, check_gradients, check_result
from litgpt_moe_ext.attention.kernels.choice import choose_kernel
from litgpt_moe_ext.attention.kernels.registry import EAGER, KERNELS, OWN, Ability, functions_of, load_functions
from litgpt_moe_ext.kernels.compiled import assume_constant_result
from litgpt_moe_ext.kernels.launch import operators_are_unwatched

load_functions()


class Softmax(NamedTuple):
    """How scores become weights.

    Attributes:
        sinks_H: One logit per query head, of any floating type, not scaled; None for ordinary softmax.
        scale: Multiplied to the scores.
        dropout: Probability of dropping a weight; the others grow to make up for it.
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
    """Compute attention whose softmax has one extra logit per head that stands for no token.

    Under autocast the inputs are cast as `F.scaled_dot_product_attention` casts them. The softmax and the sinks are
    always at least float32.

    Args:
        q_BHTd: Queries.
        k_BGSd: Keys.
        v_BGSd: Values.
        softmax: How scores become weights. Without sinks and `backend` it is `F.scaled_dot_product_attention`.
        mask: Bool (True: may look) or additive floating mask that broadcasts to (B, H, T, S). It takes the place of
            the causal mask.
        causal: Without mask, whether a query sees only keys up to its own position, which needs T == S; otherwise it
            sees them all.

    Returns:
        (B, H, T, d) in the type of the queries (in the autocast type under autocast). A row that may look nowhere gives
        0 where there are sinks.

    Raises:
        ValueError: If the shapes do not fit together.
        SettingsError: If a forced kernel cannot compute this.
    """
    causal = causal and mask is None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]  # kernels take two or four dimensions
    if softmax.sinks_H is None and softmax.backend is None:
        if mask is not None and mask.is_floating_point() and mask.dtype != q_BHTd.dtype:
            # Torch takes float32 beside narrower queries, and no other type but theirs. Beside float64 its CPU kernel
            # takes float32 as well, and reads its memory as that of float64.
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
        # The kernels read the mask's memory as elements of q's type and do not check it.
        mask = mask.to(q_BHTd.dtype)
    call = Call(kernel, softmax.scale, causal, None, softmax.dropout)
    return _Flash.apply(call, softmax.sinks_H, q_BHTd, k_BGSd, v_BGSd, mask, None)


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
    return _Flash.apply(call, softmax.sinks_H, q_BHTd, k_BGTd, v_BGTd, None, offsets)


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
    # Autocast knows nothing of operators that are called directly.
    device_type = tensors[0].device.type
    if (
        tensors[0].dtype == torch.float64
        or not _has_autocast(device_type)
        or not torch.is_autocast_enabled(device_type)
    ):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device_type)) for x in tensors)


@assume_constant_result
def _has_autocast(device_type: str) -> bool:
    # torch before 2.12 cannot trace the question.
    return torch.amp.is_autocast_available(device_type)


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
    # The definition, written out: the reference for every other kernel, the fallback where there is none, and the
    # fastest way for a handful of queries, which is limited by reading the keys and values once.
    scores_BHTS = grouped_matmul(q_BHTd, k_BGSd.mT) * softmax.scale
    if causal:
        mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=q_BHTd.device).tril()
    share_BHTS = sink_softmax(scores_BHTS, softmax.sinks_H, mask)
    share_BHTS = F.dropout(share_BHTS, softmax.dropout) if softmax.dropout else share_BHTS
    return grouped_matmul(share_BHTS.to(v_BGSd.dtype), v_BGSd)


def sink_softmax(scores_BHTS: Tensor, sinks_H: Tensor | None, mask: Tensor | None = None) -> Tensor:
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


def grouped_matmul(x_BHTI: Tensor, y_BGIJ: Tensor) -> Tensor:
    """Multiply the matrix of every query head with the matrix of its key/value head, repeating none of them.

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
    def forward(ctx: Any, call: Call, sinks_H: Tensor | None, *tensors: Any) -> Tensor:
        """Compute attention.

        Args:
            ctx: Autograd's context.
            call: What to compute.
            sinks_H: One logit per query head, or None.
            tensors: The fields of `Inputs`.

        Returns:
            (B, H, T, d).
        """
        inputs = Inputs(*tensors)
        result = functions_of(call.kernel).forward(inputs, call)
        if call.kernel not in OWN:
            check_result(call.kernel, result, inputs)
        out_BHTd, lse_BHT, rest = result
        if sinks_H is not None:
            out_BHTd, lse_BHT = _add_sinks(out_BHTd, lse_BHT, sinks_H)
        ctx.save_for_backward(sinks_H, *tensors, out_BHTd, lse_BHT, *rest)
        ctx.call = call
        return out_BHTd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_BHTd: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Return the gradients of the arguments of `forward`."""
        sinks_H, q_BHTd, k_BGSd, v_BGSd, mask, offsets, out_BHTd, lse_BHT, *rest = ctx.saved_tensors
        inputs, result = Inputs(q_BHTd, k_BGSd, v_BGSd, mask, offsets), Result(out_BHTd, lse_BHT, tuple(rest))
        gradients = functions_of(ctx.call.kernel).backward(dout_BHTd, inputs, result, ctx.call)
        if ctx.call.kernel not in OWN:
            check_gradients(ctx.call.kernel, gradients)
        dq_BHTd, dk_BGSd, dv_BGSd = gradients
        dsinks_H = None
        if sinks_H is not None and ctx.needs_input_grad[1]:
            dsinks_H = _sink_gradients(dout_BHTd, out_BHTd, lse_BHT, sinks_H)
        return None, dsinks_H, dq_BHTd, dk_BGSd, dv_BGSd, None, None


def _add_sinks(out_BHTd: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    if _has_epilogue(out_BHTd, lse_BHT):
        _epilogue().add_sinks(out_BHTd, lse_BHT, sinks_H)
        return out_BHTd, lse_BHT
    sinks_H1 = sinks_H.to(lse_BHT.dtype).unsqueeze(-1)
    out_BHTd = _scale_in_place(out_BHTd, torch.sigmoid(lse_BHT - sinks_H1).unsqueeze(-1))
    return out_BHTd, torch.logaddexp(lse_BHT, sinks_H1)


def _sink_gradients(dout_BHTd: Tensor, out_BHTd: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> Tensor:
    if _has_epilogue(out_BHTd, lse_BHT):
        return _epilogue().sink_gradients(dout_BHTd, out_BHTd, lse_BHT, sinks_H)
    share_BHT = torch.exp(sinks_H.to(lse_BHT.dtype).unsqueeze(-1) - lse_BHT)
    delta_BHT = (dout_BHTd * out_BHTd).sum(-1, dtype=lse_BHT.dtype)
    return -(share_BHT * delta_BHT).sum((0, 2)).to(sinks_H.dtype)


def _has_epilogue(out_BHTd: Tensor, lse_BHT: Tensor) -> bool:
    return operators_are_unwatched(out_BHTd) and out_BHTd.stride(-1) == 1 and lse_BHT.dtype == torch.float32


def _epilogue() -> Any:
    # Imports Triton.
    from litgpt_moe_ext.attention.kernels import sink_epilogue

    return sink_epilogue


def _scale_in_place(out_BHTd: Tensor, gate_BHT1: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        # A compiler chooses the memory itself, and that of torch 2.11 loses every gradient of a function that returns
        # what an operator has changed in place or only renamed.
        scaled_BHTd = out_BHTd * gate_BHT1
        return scaled_BHTd if scaled_BHTd.dtype == out_BHTd.dtype else scaled_BHTd.to(out_BHTd.dtype)
    # Nothing else refers to what a kernel has just returned, except a mode that watches operators: selective activation
    # checkpointing may keep it for the recomputation.
    if is_in_torch_dispatch_mode():
        out_BHTd = out_BHTd.clone()
    # A CPU multiplies two types after copying both to the larger one, which takes a sixth of the kernel's time for
    # 512 tokens in bfloat16. A GPU does it on the way.
    return out_BHTd.mul_(gate_BHT1 if out_BHTd.is_cuda else gate_BHT1.to(out_BHTd.dtype))
