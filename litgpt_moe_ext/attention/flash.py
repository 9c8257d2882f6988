"""Attention with a sink logit per head by flash kernels, which do not support sinks.

If `lse` is the log-sum-exp of the scores, a sink `s` leaves a share of `sigmoid(lse - s)` of the probability, so any
flash kernel that returns `lse` can compute attention with sinks.

Shape legend: B batch, H query heads, G key/value heads (H is a multiple of G), T queries, S keys, d head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from litgpt_moe_ext.attention.kernels.calls import Call, Inputs, Result, check_gradients, check_result
from litgpt_moe_ext.attention.kernels.registry import OWN, functions_of
from litgpt_moe_ext.kernels.launch import operators_are_unwatched


def flash_attention(call: Call, sinks_H: Tensor | None, inputs: Inputs) -> Tensor:
    """Return attention computed by the kernel that a call names, (B, H, T, d).

    Args:
        call: What to compute.
        sinks_H: One logit per query head, or None.
        inputs: The tensors; they are not checked against what the kernel can do.
    """
    return _Flash.apply(call, sinks_H, *inputs)


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
        # A compiler chooses the memory itself, and torch 2.11's loses every gradient of a function that returns a
        # tensor which an operator changed in place or passed through.
        scaled_BHTd = out_BHTd * gate_BHT1
        return scaled_BHTd if scaled_BHTd.dtype == out_BHTd.dtype else scaled_BHTd.to(out_BHTd.dtype)
    # Nothing else refers to the fresh result of a kernel, except a dispatch mode: selective activation checkpointing
    # may keep it for the recomputation.
    if is_in_torch_dispatch_mode():
        out_BHTd = out_BHTd.clone()
    # To multiply mixed dtypes a CPU first copies both operands to the wider one, which takes a sixth of the kernel's
    # time for 512 tokens in bfloat16. A GPU converts on the fly.
    return out_BHTd.mul_(gate_BHT1 if out_BHTd.is_cuda else gate_BHT1.to(out_BHTd.dtype))
