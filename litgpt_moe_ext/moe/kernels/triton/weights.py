"""Gradients of the experts' weights and biases: sums over the rows of each expert, in a fixed order.

One program computes one block of one expert's gradient from all rows of the expert, so nothing is added atomically and
two runs give the same bits. Experts without rows get zeros.

Shape legend: T tokens, K chosen experts per token, E experts, R = T * K routed rows in the order of experts, O and I
widths of output and input.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch
from litgpt_moe_ext.moe.kernels.plan import Outer, Plan
from litgpt_moe_ext.moe.kernels.triton.common import (
    constexpr,
    dot,
    precision_for,
    rows_of,
    stack_of,
    token_of,
)
from litgpt_moe_ext.moe.kernels.triton.tiling.tile_choice import weights_tile
from litgpt_moe_ext.moe.kernels.triton.tiling.tiles import WeightsWork


class _Form(NamedTuple):
    gather_left: bool
    gather_right: bool
    even_out: bool
    even_in: bool
    precision: str
    wide: bool
    add: bool
    top_k: int


def sum_outer_products(outer: Outer, dtype: torch.dtype, total_EOI: Tensor | None = None) -> Tensor:
    """Return the sum of `left^T right` over the rows of each expert, (E, O, I) in `dtype`, added to a `total_EOI`."""
    left, right, plan, gather_left, gather_right = outer
    add = total_EOI is not None
    n_out, n_in = left.size(1), right.size(1)
    sum_EOI = total_EOI if add else left.new_empty(plan.n_expert, n_out, n_in, dtype=dtype)
    precision, how = precision_for(left.device, left.dtype)
    sizes = plan.n_expert, plan.rows.size(0), n_out, n_in, plan.top_k
    work = WeightsWork(precision, *sizes, gather_left, gather_right, add, sum_EOI.dtype == torch.float32)
    tile = weights_tile(work, left.device)
    left_rows, right_rows = rows_of(left), rows_of(right)
    wide = max(left_rows.reach, right_rows.reach) >= 2**31
    even = n_out % tile.out == 0, n_in % tile.inner == 0
    form = _Form(gather_left, gather_right, *even, how, wide, add, plan.top_k)
    grid = (ceil_div(n_out, tile.out) * ceil_div(n_in, tile.inner), plan.n_expert)
    arguments = (left_rows, right_rows, stack_of(sum_EOI), plan, form, tile)
    launch(_sum_outer_products, grid, arguments, tile.warps, tile.stages)
    return sum_EOI


@triton.jit
def _choice(plan, row_M, end):
    return tl.load(plan.rows + row_M, mask=row_M < end, other=0)


@triton.jit
def _near_choice(plan, row_M, first, end):
    # That of the expert's last row past its rows; an expert without rows has none to read. Narrow before threads
    # exchange it.
    near_M = tl.minimum(row_M, end - 1)
    return tl.load(plan.rows + near_M, mask=near_M >= first, other=0).to(tl.int32)


@triton.jit
def _first_row(plan, expert):
    return tl.load(plan.ends + expert - 1, mask=expert > 0, other=0)


@triton.jit
def _sum_outer_products(left, right, out, plan, FORM: constexpr, TILE: constexpr):
    expert = tl.program_id(1)
    n_in_tile = tl.cdiv(out.n_in, TILE.inner)
    o_N = (tl.program_id(0) // n_in_tile) * TILE.out + tl.arange(0, TILE.out)
    i_K = (tl.program_id(0) % n_in_tile) * TILE.inner + tl.arange(0, TILE.inner)
    first, end = _first_row(plan, expert), tl.load(plan.ends + expert)
    # Half the registers where 32 bits suffice within an operand.
    WORD: tl.constexpr = tl.int64 if FORM.wide else tl.int32  # pyrefly: ignore[bad-assignment]  # kernels have no types
    sum_NK = tl.full((TILE.out, TILE.inner), 0.0, tl.float32)
    # Where the rows of the next step are is looked up one step ahead: loads that wait for a load of the same step would
    # not be started early.
    next_M = _near_choice(plan, first + tl.arange(0, TILE.rows), first, end)
    for start in range(first, end, TILE.rows):
        row_M = start + tl.arange(0, TILE.rows)
        # Rows past the expert's last are zeros on the left, so on the right they may be the last, without a mask.
        live_M, near_M = row_M < end, tl.minimum(row_M, end - 1)
        token_M = token_of(next_M, FORM.top_k)
        next_M = _near_choice(plan, row_M + TILE.rows, first, end)
        left_M = (token_M if FORM.gather_left else near_M).to(WORD)
        right_M = (token_M if FORM.gather_right else near_M).to(WORD)
        left_NM = left.data + left_M[None, :] * left.stride + o_N[:, None]
        right_MK = right.data + right_M[:, None] * right.stride + i_K[None, :]
        # Masks of columns only where a block may reach beyond the matrix.
        inside_NM = live_M[None, :] if FORM.even_out else live_M[None, :] & (o_N < out.n_out)[:, None]
        a_NM = tl.load(left_NM, mask=inside_NM, other=0.0)
        inside_MK = live_M[:, None] & (i_K < out.n_in)[None, :]
        b_MK = tl.load(right_MK) if FORM.even_in else tl.load(right_MK, mask=inside_MK, other=0.0)
        sum_NK = dot(a_NM, b_MK, sum_NK, FORM)
    out_NK = out.data + expert.to(tl.int64) * out.stride_e
    out_NK = out_NK + o_N.to(tl.int64)[:, None] * out.stride_o + i_K[None, :]
    inside_NK = (o_N < out.n_out)[:, None] & (i_K < out.n_in)[None, :]
    sum_NK = sum_NK.to(out.data.dtype.element_ty)
    if FORM.add:
        # Rounded before and after, as where autograd adds what has been written.
        sum_NK = sum_NK.to(tl.float32) + tl.load(out_NK, mask=inside_NK, other=0.0).to(tl.float32)
    tl.store(out_NK, sum_NK.to(out.data.dtype.element_ty), mask=inside_NK)


class _Sums(NamedTuple):
    data: Any
    gates: Any
    width: Any


class _SumForm(NamedTuple):
    gather: bool
    top_k: int


def sum_rows(x: Tensor, gates_TK: Tensor | None, plan: Plan, gather: bool, dtype: torch.dtype) -> Tensor:
    """Return the sum of the rows of each expert, (E, O) in `dtype`.

    Args:
        x: Rows: of tokens, (T, O), if `gather`, otherwise in the order of experts, (R, O).
        gates_TK: Factors of the rows, or None.
        plan: Which rows belong to which expert.
        gather: Whether `x` has one row for each token.
        dtype: Of the result; sums are taken in float32.
    """
    sum_EO = x.new_empty(plan.n_expert, x.size(1), dtype=dtype)
    sums = _Sums(sum_EO, None if gates_TK is None else gates_TK.contiguous(), x.size(1))
    grid = (ceil_div(x.size(1), 64), plan.n_expert)
    launch(_sum_rows, grid, (rows_of(x), sums, plan, _SumForm(gather, plan.top_k)), warps=4, stages=2)
    return sum_EO


@triton.jit
def _sum_rows(x, sums, plan, FORM: constexpr):
    expert = tl.program_id(1)
    o_N = tl.program_id(0) * 64 + tl.arange(0, 64)
    first, end = _first_row(plan, expert), tl.load(plan.ends + expert)
    sum_MN = tl.full((32, 64), 0.0, tl.float32)
    for start in range(first, end, 32):
        row_M = start + tl.arange(0, 32)
        live_M = row_M < end
        source_M = token_of(_choice(plan, row_M, end), FORM.top_k) if FORM.gather else row_M
        x_MN = x.data + source_M.to(tl.int64)[:, None] * x.stride + o_N[None, :]
        part_MN = tl.load(x_MN, mask=live_M[:, None] & (o_N < sums.width)[None, :], other=0.0).to(tl.float32)
        if sums.gates is not None:
            choice_M = tl.load(plan.rows + row_M, mask=live_M, other=0)
            part_MN *= tl.load(sums.gates + choice_M, mask=live_M, other=0.0).to(tl.float32)[:, None]
        sum_MN += part_MN
    sum_N = tl.sum(sum_MN, 0)
    tl.store(
        sums.data + expert.to(tl.int64) * sums.width + o_N, sum_N.to(sums.data.dtype.element_ty), mask=o_N < sums.width
    )
