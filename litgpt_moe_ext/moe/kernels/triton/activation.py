"""Activations of experts in Triton, forward and backward, with dropout and gate values; one launch each.

Everything between loading and storing is float32. The gate and up projections of routed experts are side by side in one
matrix; those of shared experts, which have neither dropout nor gate values, are in one matrix or in two.

Shape legend: T tokens, K chosen experts per token, R = T * K routed rows in the order of experts, F hidden width
of one expert, G width of the first projection (2 * F with a gate), M a block of R or T, N a block of F.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch
from litgpt_moe_ext.moe.kernels.plan import Gates, Gradients, Mask, kind_of
from litgpt_moe_ext.moe.kernels.triton.common import block_of, constexpr


class _Hidden(NamedTuple):
    # The argument of the activation function, and the factor of its value; the same without a gate.
    x: Any
    up: Any
    stride: Any
    rows: Any
    width: Any


class _Outputs(NamedTuple):
    # Gradients of the fields of `_Hidden` and of the gate values; `a` as in `Gradients`. The last two are None without
    # gate values.
    x: Any
    up: Any
    a: Any
    gates: Any


class _Form(NamedTuple):
    kind: str
    gated: bool
    rows: int
    block: int


def activate(h_RG: Tensor, activation: Any, mask: Mask) -> Tensor:
    """Return the hidden activations, (R, F), in the dtype of `h_RG`.

    Args:
        h_RG: Output of the first projection, contiguous.
        activation: The activation function.
        mask: Which activations are kept.
    """
    return _apply(_parts(h_RG, activation), activation, mask)


def glu(gate: Tensor, up_TF: Tensor | None, activation: Any) -> Tensor:
    """Return the hidden activations, (T, F), of a gated activation.

    Args:
        gate: Output of the gate projection, (T, F), or, without `up_TF`, of both side by side, (T, 2F); contiguous.
        up_TF: Output of the up projection, contiguous, or None.
        activation: The activation function.
    """
    return _apply(_gate_and_up(gate, up_TF, activation), activation, Mask())


def activate_backward(h_RG: Tensor, da_RF: Tensor, gates: Gates, activation: Any, mask: Mask) -> Gradients:
    """Run the backward pass of gate values, dropout and activation, recomputing the activations.

    Args:
        h_RG: Input of the activation, contiguous.
        da_RF: Gradient of the activations before they are multiplied by gate values, contiguous.
        gates: The gate values, contiguous.
        activation: The activation function.
        mask: Which activations were kept.
    """
    gradients = Gradients(
        torch.empty_like(h_RG), torch.empty_like(da_RF), torch.empty_like(gates.gates_TK, dtype=torch.float32)
    )
    x, up, *_ = _parts(gradients.h_RG, activation)
    outputs = _Outputs(x, up, gradients.a_RF, gradients.gates_TK)
    _go_back((_parts(h_RG, activation), da_RF, gates, mask, outputs), activation)
    return gradients


def glu_backward(da_TF: Tensor, gate: Tensor, up_TF: Tensor | None, activation: Any) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` and `up_TF`; empty for an `up_TF` of None.

    Args:
        da_TF: Gradient of the hidden activations, contiguous.
        gate: As above.
        up_TF: As above.
        activation: As above.
    """
    dgate, dup_TF = torch.empty_like(gate), None if up_TF is None else torch.empty_like(up_TF)
    x, up, *_ = _gate_and_up(dgate, dup_TF, activation)
    hidden = _gate_and_up(gate, up_TF, activation)
    _go_back((hidden, da_TF, Gates(None, None), Mask(), _Outputs(x, up, None, None)), activation)
    return dgate, gate.new_empty(0) if dup_TF is None else dup_TF


def _parts(h_RG: Tensor, activation: Any) -> _Hidden:
    n_row, width = h_RG.shape
    if not activation.gated:
        return _Hidden(h_RG, h_RG, width, n_row, width)
    return _Hidden(h_RG, h_RG.narrow(1, width // 2, width // 2), width, n_row, width // 2)


def _gate_and_up(gate: Tensor, up_TF: Tensor | None, activation: Any) -> _Hidden:
    if up_TF is None:
        return _parts(gate, activation)
    n_token, width = gate.shape
    return _Hidden(gate, up_TF, width, n_token, width)


def _apply(hidden: _Hidden, activation: Any, mask: Mask) -> Tensor:
    a, form = hidden.x.new_empty(hidden.rows, hidden.width), _form(activation, hidden.width)
    grid = (ceil_div(hidden.rows, form.rows), ceil_div(hidden.width, form.block))
    launch(_activate, grid, (hidden, a, mask, form), warps=4)
    return a


def _go_back(arguments: tuple[Any, ...], activation: Any) -> None:
    hidden = arguments[0]
    form = _form(activation, hidden.width)
    launch(_activate_backward, (ceil_div(hidden.rows, form.rows),), (*arguments, form), warps=4)


def _form(activation: Any, width: int) -> _Form:
    return _Form(str(kind_of(activation)), activation.gated, *block_of(width))


@triton.jit
def value_of(x, FORM: constexpr):
    """Return the activation function `FORM.kind` of float32 numbers; NaN stays NaN."""
    if FORM.kind == "silu":
        return x * tl.sigmoid(x)
    elif FORM.kind == "clamped_silu":
        x = tl.where(x > 7.0, 7.0, x)
        return x * tl.sigmoid(1.702 * x)
    elif FORM.kind == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FORM.kind == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif FORM.kind == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    elif FORM.kind == "identity":
        return x
    else:
        return tl.where(x <= 0.0, 0.0, x * x)


@triton.jit
def factor_of(up, FORM: constexpr):
    """Return the factor of the activation function's value, from the up projection."""
    if FORM.kind == "clamped_silu":
        return tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
    else:
        return up


@triton.jit
def _slope_of(x, FORM: constexpr):
    if FORM.kind == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif FORM.kind == "clamped_silu":
        s = tl.sigmoid(1.702 * x)
        return tl.where(x > 7.0, 0.0, s * (1.0 + 1.702 * x * (1.0 - s)))
    elif FORM.kind == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif FORM.kind == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif FORM.kind == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    elif FORM.kind == "identity":
        return tl.full(x.shape, 1.0, tl.float32)
    else:
        return tl.where(x <= 0.0, 0.0, 2.0 * x)


@triton.jit
def _load(hidden, row_M, f_N, GATED: constexpr):
    # The block's positions among activations and among projections, which of them exist, the argument of the function,
    # and its factor.
    inside_MN = (row_M < hidden.rows)[:, None] & (f_N < hidden.width)[None, :]
    row_M = row_M.to(tl.int64)
    at_MN = row_M[:, None] * hidden.width + f_N[None, :]
    of_MN = row_M[:, None] * hidden.stride + f_N[None, :]
    x_MN = tl.load(hidden.x + of_MN, mask=inside_MN, other=0.0).to(tl.float32)
    if GATED:
        up_MN = tl.load(hidden.up + of_MN, mask=inside_MN, other=0.0).to(tl.float32)
    else:
        up_MN = tl.full(x_MN.shape, 1.0, tl.float32)
    return at_MN, of_MN, inside_MN, x_MN, up_MN


@triton.jit
def _factor(mask, at_MN, inside_MN):
    if mask.keep_RF is None:
        return tl.full(at_MN.shape, 1.0, tl.float32)
    else:
        return tl.load(mask.keep_RF + at_MN, mask=inside_MN, other=0).to(tl.float32) * mask.scale


@triton.jit
def _activate(hidden, a, mask, FORM: constexpr):
    row_M = tl.program_id(0) * FORM.rows + tl.arange(0, FORM.rows)
    f_N = tl.program_id(1) * FORM.block + tl.arange(0, FORM.block)
    at_MN, _, inside_MN, x_MN, up_MN = _load(hidden, row_M, f_N, FORM.gated)
    a_MN = value_of(x_MN, FORM) * factor_of(up_MN, FORM) * _factor(mask, at_MN, inside_MN)
    tl.store(a + at_MN, a_MN.to(a.dtype.element_ty), mask=inside_MN)


@triton.jit
def _activate_backward(hidden, da, gates, mask, outputs, FORM: constexpr):
    row_M = tl.program_id(0) * FORM.rows + tl.arange(0, FORM.rows)
    live_M = row_M < hidden.rows
    choice_M, gate_M1 = row_M, tl.full((FORM.rows, 1), 1.0, tl.float32)
    if gates.rows_R is not None:
        choice_M = tl.load(gates.rows_R + row_M, mask=live_M, other=0)
        gate_M1 = tl.load(gates.gates_TK + choice_M, mask=live_M, other=0.0).to(tl.float32)[:, None]
    dot_MN = tl.full((FORM.rows, FORM.block), 0.0, tl.float32)
    for start in range(0, hidden.width, FORM.block):
        f_N = start + tl.arange(0, FORM.block)
        at_MN, of_MN, inside_MN, x_MN, up_MN = _load(hidden, row_M, f_N, FORM.gated)
        factor_MN = _factor(mask, at_MN, inside_MN)
        value_MN, times_MN = value_of(x_MN, FORM), factor_of(up_MN, FORM)
        da_MN = tl.load(da + at_MN, mask=inside_MN, other=0.0).to(tl.float32)
        if outputs.a is not None:
            a_MN = value_MN * times_MN * factor_MN
            dot_MN += a_MN * da_MN
            tl.store(outputs.a + at_MN, (a_MN * gate_M1).to(da.dtype.element_ty), mask=inside_MN)
        da_MN = da_MN * gate_M1 * factor_MN
        dx_MN = da_MN * times_MN * _slope_of(x_MN, FORM)
        tl.store(outputs.x + of_MN, dx_MN.to(da.dtype.element_ty), mask=inside_MN)
        if FORM.gated:
            dup_MN = da_MN * value_MN
            if FORM.kind == "clamped_silu":
                dup_MN = tl.where(tl.abs(up_MN) > 7.0, 0.0, dup_MN)
            tl.store(outputs.up + of_MN, dup_MN.to(da.dtype.element_ty), mask=inside_MN)
    if gates.rows_R is not None:
        tl.store(outputs.gates + choice_M, tl.sum(dot_MN, 1), mask=live_M)
