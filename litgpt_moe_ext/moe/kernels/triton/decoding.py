"""A handful of tokens, as in decoding, where reading the weights is all the work.

Each program looks up the expert of its row on the device and reads that expert's weights, in whatever dtype they are
stored. Other experts' weights are not read, nothing is sorted, and the host does not wait. Two launches per layer.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, G width of
the first projection (2 * F with a gate), N a block of outputs, M a block of inputs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch
from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights
from litgpt_moe_ext.moe.kernels.plan import kind_of
from litgpt_moe_ext.moe.kernels.triton.activation import factor_of, value_of
from litgpt_moe_ext.moe.kernels.triton.common import constexpr, rows_of, stack_of


class _Choice(NamedTuple):
    experts: Any
    gates: Any
    top_k: Any


class _Form(NamedTuple):
    kind: str
    gated: bool


def decode(
    x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, weights: ExpertWeights, activation: Activation
) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs, (T, D) in the dtype of `x_TD`; not differentiable.

    Args:
        x_TD: A few tokens.
        gates_TK: Gate values.
        experts_TK: Chosen experts.
        weights: Stacked weights of the experts.
        activation: The activation function.
    """
    up_EGD, up_bias, down_EDF, down_bias = weights
    choice = _Choice(experts_TK.contiguous(), gates_TK.contiguous(), experts_TK.size(1))
    kind = kind_of(activation)
    fused = _Form(kind or "none", activation.gated and kind is not None)
    n_hidden = down_EDF.size(2) if kind is not None else up_EGD.size(1)
    # Kept in float32: a few rows are nothing beside megabytes of weights.
    a_RF = x_TD.new_empty(experts_TK.numel(), n_hidden, dtype=torch.float32)
    grid = (experts_TK.numel(), ceil_div(n_hidden, 16))
    launch(_first, grid, (rows_of(x_TD), stack_of(up_EGD), up_bias, choice, rows_of(a_RF), fused), warps=4)
    if kind is None:
        a_RF = activation(a_RF)
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    grid = (x_TD.size(0), ceil_div(x_TD.size(1), 8))
    launch(_second, grid, (rows_of(a_RF), stack_of(down_EDF), down_bias, choice, rows_of(y_TD)), warps=4)
    return y_TD


@triton.jit
def _product(x, w, o_N, live_N, weight, BLOCK: constexpr):
    # One row of inputs times rows `o_N` of one expert's weights.
    i_M = tl.arange(0, BLOCK)
    sum_NM = tl.full((o_N.shape[0], BLOCK), 0.0, tl.float32)
    for start in range(0, weight.n_in, BLOCK):
        inside_M = start + i_M < weight.n_in
        x_M = tl.load(x + start + i_M, mask=inside_M, other=0.0).to(tl.float32)
        w_NM = w + o_N.to(tl.int64)[:, None] * weight.stride_o + (start + i_M)[None, :] * weight.stride_i
        w_NM = tl.load(w_NM, mask=live_N[:, None] & inside_M[None, :], other=0.0).to(tl.float32)
        sum_NM += w_NM * x_M[None, :]
    return tl.sum(sum_NM, 1)


@triton.jit
def _plus_bias(y_N, bias, expert, o_N, live_N, n_out):
    if bias is None:
        return y_N
    else:
        return y_N + tl.load(bias + expert * n_out + o_N, mask=live_N, other=0.0).to(tl.float32)


@triton.jit
def _first(x, weight, bias, choice, out, FORM: constexpr):
    row = tl.program_id(0)
    width = out.stride
    f_N = tl.program_id(1) * 16 + tl.arange(0, 16)
    live_N = f_N < width
    expert = tl.load(choice.experts + row).to(tl.int64)
    token = x.data + (row // choice.top_k).to(tl.int64) * x.stride
    w = weight.data + expert * weight.stride_e
    h_N = _plus_bias(_product(token, w, f_N, live_N, weight, 128), bias, expert, f_N, live_N, weight.n_out)
    if FORM.kind != "none":
        h_N = value_of(h_N, FORM)
    if FORM.gated:
        up_N = _product(token, w, width + f_N, live_N, weight, 128)
        h_N *= factor_of(_plus_bias(up_N, bias, expert, width + f_N, live_N, weight.n_out), FORM)
    tl.store(out.data + row * width + f_N, h_N, mask=live_N)


@triton.jit
def _second(a, weight, bias, choice, out):
    token = tl.program_id(0)
    d_N = tl.program_id(1) * 8 + tl.arange(0, 8)
    live_N = d_N < weight.n_out
    sum_N = tl.full((8,), 0.0, tl.float32)
    for k in range(choice.top_k):
        row = token * choice.top_k + k
        expert = tl.load(choice.experts + row).to(tl.int64)
        w = weight.data + expert * weight.stride_e
        y_N = _product(a.data + row * a.stride, w, d_N, live_N, weight, 128)
        y_N = _plus_bias(y_N, bias, expert, d_N, live_N, weight.n_out)
        sum_N += y_N * tl.load(choice.gates + row).to(tl.float32)
    tl.store(out.data + token * out.stride + d_N, sum_N.to(out.data.dtype.element_ty), mask=live_N)
