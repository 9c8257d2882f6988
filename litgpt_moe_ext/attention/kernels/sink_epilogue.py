"""Adds sinks to the result of a flash kernel in Triton: one launch each way, and a sum over blocks backward.

Torch's operators take several launches forward and more backward, some over tensors as large as the output. All
arithmetic is float32; blocks are added in a fixed order, so two runs give the same bits.

Shape legend: B batch, H heads, T queries, d head size, N a block of the head size, P blocks of a head.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch, power_of_two

if TYPE_CHECKING:
    # To a type checker a constant of a kernel is whatever it was called with.
    constexpr = Any
else:
    from triton.language import constexpr


class _View(NamedTuple):
    data: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any


class _Form(NamedTuple):
    head_size: int
    rows: int
    block: int


def add_sinks(out_BHTd: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> None:
    """Change the result of attention without sinks into the result with sinks, in place.

    Args:
        out_BHTd: The output, the elements of a head contiguous; multiplied by `sigmoid(lse - sink)`.
        lse_BHT: Log-sum-exp of the scores, float32; becomes `logaddexp(lse, sink)`.
        sinks_H: The sinks, of any floating type.
    """
    B, H, T, d = out_BHTd.shape
    form = _form(d)
    grid = (B * H * ceil_div(T, form.rows),)
    launch(_add_sinks, grid, (_view(out_BHTd), _view(lse_BHT), sinks_H.contiguous(), H, T, form), warps=4)


def sink_gradients(dout_BHTd: Tensor, out_BHTd: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> Tensor:
    """Return the gradients of the sinks, (H,), in their type.

    Args:
        dout_BHTd: Gradient of the output.
        out_BHTd: The output with sinks.
        lse_BHT: Log-sum-exp of the scores and the sinks, float32.
        sinks_H: The sinks.
    """
    dout_BHTd, out_BHTd = (x if x.stride(-1) == 1 else x.contiguous() for x in (dout_BHTd, out_BHTd))
    B, H, T, d = out_BHTd.shape
    form = _form(d)
    part_HP = lse_BHT.new_empty(H, B * ceil_div(T, form.rows))
    per_head = (sinks_H.contiguous(), part_HP)
    arguments = (_view(dout_BHTd), _view(out_BHTd), _view(lse_BHT), per_head, (H, T), form)
    launch(_sum_gradients, (part_HP.numel(),), arguments, warps=4)
    return part_HP.sum(1).to(sinks_H.dtype)


def _view(x: Tensor) -> _View:
    return _View(x, *x.stride()[:3])


@functools.cache
def _form(head_size: int) -> _Form:
    block = max(power_of_two(head_size), 16)
    return _Form(head_size, max(2048 // block, 1), block)


@triton.jit
def _block(H, T, FORM: constexpr):
    # The head of the program's block, its index among the blocks of the head, its batch entry and its queries.
    # Consecutive programs have the same queries of different heads, which kernels write side by side.
    head, number = tl.program_id(0) % H, tl.program_id(0) // H
    n_tile = tl.cdiv(T, FORM.rows)
    row_T = number % n_tile * FORM.rows + tl.arange(0, FORM.rows)
    return head, number, number // n_tile, row_T, row_T < T


@triton.jit
def _rows_of(x, batch, head, row_T):
    # Past 2^31 elements too.
    start = x.data + batch.to(tl.int64) * x.stride_b + head.to(tl.int64) * x.stride_h
    return start + row_T.to(tl.int64) * x.stride_t


@triton.jit
def _columns(live_T, FORM: constexpr):
    # The elements of a head, and which elements of the block exist.
    n_N = tl.arange(0, FORM.block)
    if FORM.head_size == FORM.block:
        return n_N, live_T[:, None]
    else:
        return n_N, live_T[:, None] & (n_N < FORM.head_size)[None, :]


@triton.jit
def _add_sinks(out, lse, sinks, H, T, FORM: constexpr):
    head, _, batch, row_T, live_T = _block(H, T, FORM)
    n_N, inside_TN = _columns(live_T, FORM)
    out_TN = _rows_of(out, batch, head, row_T)[:, None] + n_N[None, :]
    x_TN = tl.load(out_TN, mask=inside_TN, other=0.0).to(tl.float32)
    lse_T = _rows_of(lse, batch, head, row_T)
    before_T = tl.load(lse_T, mask=live_T, other=0.0)
    sink = tl.load(sinks + head).to(tl.float32)
    tl.store(out_TN, (x_TN * tl.sigmoid(before_T - sink)[:, None]).to(out.data.dtype.element_ty), mask=inside_TN)
    # Several warps read these few numbers and one writes them, which must wait until all have read.
    tl.debug_barrier()
    # The difference of equal infinities would be NaN.
    apart_T = tl.where(before_T == sink, 0.0, tl.abs(before_T - sink))
    tl.store(lse_T, tl.maximum(before_T, sink) + tl.log(1.0 + tl.exp(-apart_T)), mask=live_T)


@triton.jit
def _sum_gradients(dout, out, lse, per_head, sizes, FORM: constexpr):
    sinks, part_HP = per_head
    H, T = sizes
    head, number, batch, row_T, live_T = _block(H, T, FORM)
    n_N, inside_TN = _columns(live_T, FORM)
    dout_TN = tl.load(_rows_of(dout, batch, head, row_T)[:, None] + n_N[None, :], mask=inside_TN, other=0.0)
    out_TN = tl.load(_rows_of(out, batch, head, row_T)[:, None] + n_N[None, :], mask=inside_TN, other=0.0)
    delta_T = tl.sum(dout_TN.to(tl.float32) * out_TN.to(tl.float32), 1)
    lse_T = tl.load(_rows_of(lse, batch, head, row_T), mask=live_T, other=0.0)
    share_T = tl.exp(tl.load(sinks + head).to(tl.float32) - lse_T)
    part = -tl.sum(tl.where(live_T, share_T * delta_T, 0.0), 0)
    tl.store(part_HP + head * (tl.num_programs(0) // H) + number, part)
