"""Routed rows times the weights of their experts, without asking the device how many rows an expert has.

Shape legend: T tokens, K chosen experts per token, E experts, R = T * K routed rows in the order of experts, O and I
widths of output and input.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch, power_of_two
from litgpt_moe_ext.moe.kernels.plan import Product
from litgpt_moe_ext.moe.kernels.triton.common import (
    constexpr,
    dot,
    find_tile,
    precision_for,
    rows_of,
    stack_of,
    token_of,
)
from litgpt_moe_ext.moe.kernels.triton.tiling.tile_choice import rows_tile
from litgpt_moe_ext.moe.kernels.triton.tiling.tiles import RowsWork


class _Result(NamedTuple):
    data: Any
    bias: Any


class _Form(NamedTuple):
    gather: bool
    scatter: bool
    even_out: bool
    even_in: bool
    precision: str
    experts: int
    top_k: int
    wide: bool


def multiply_rows(product: Product) -> Tensor:
    """Return each row times the weights of its expert, plus its bias, (R, O) in the dtype of the rows."""
    x, weight, bias, plan, gather, scatter = product
    n_row, n_out, n_in = plan.rows.numel(), weight.size(1), weight.size(2)
    y_RO = x.new_empty(n_row, n_out)
    if not n_row:
        return y_RO
    precision, how = precision_for(x.device, x.dtype)
    rows, stack = rows_of(x), stack_of(weight)
    sizes = plan.n_expert, n_row, n_out, n_in, plan.top_k
    tile = rows_tile(RowsWork(precision, *sizes, gather, scatter, stack.stride_i != 1), x.device)
    form = _Form(
        gather,
        scatter,
        n_out % tile.out == 0,
        n_in % tile.inner == 0,
        how,
        max(power_of_two(plan.n_expert), 16),
        plan.top_k,
        max(rows.reach, stack.reach) >= 2**31,
    )
    grid = ((ceil_div(n_row, tile.rows) + plan.n_expert) * ceil_div(n_out, tile.out),)
    arguments = (rows, stack, _Result(y_RO, bias), plan, form, tile)
    launch(_multiply_rows, grid, arguments, tile.warps, tile.stages)
    return y_RO


@triton.jit
def _multiply_rows(x, weight, y, plan, FORM: constexpr, TILE: constexpr):
    # So many blocks of rows pass before the next block of weights is read: both then stay in the cache of the card.
    # (A constant outside of the kernel would be compared with its value at every launch.)
    GROUP: tl.constexpr = 8  # pyrefly: ignore[bad-assignment]  # kernels have no types
    n_out_tile = tl.cdiv(weight.n_out, TILE.out)
    n_row_tile = tl.num_programs(0) // n_out_tile
    group = tl.program_id(0) // (GROUP * n_out_tile)
    within = tl.program_id(0) % (GROUP * n_out_tile)
    height = tl.minimum(n_row_tile - group * GROUP, GROUP)
    expert, first, end = find_tile(plan, group * GROUP + within % height, TILE.rows, FORM.experts)
    if expert >= plan.n_expert:
        return
    row_M = first + tl.arange(0, TILE.rows)
    # Rows past the expert's last are computed from its last and not stored.
    near_M = tl.minimum(row_M, end - 1)  # pyrefly: ignore[unsupported-operation]  # kernels have no types
    # Half the registers where 32 bits suffice within an operand.
    WORD: tl.constexpr = tl.int64 if FORM.wide else tl.int32  # pyrefly: ignore[bad-assignment]  # as above
    source_M = near_M.to(WORD)
    if FORM.gather:
        source_M = token_of(tl.load(plan.rows + near_M), FORM.top_k).to(WORD)
    o_N = (within // height) * TILE.out + tl.arange(0, TILE.out)
    i_K = tl.arange(0, TILE.inner)
    x_start = x.data
    w_start = weight.data + expert.to(tl.int64) * weight.stride_e
    x_MK = source_M[:, None] * x.stride + i_K[None, :]
    w_KN = o_N.to(WORD)[None, :] * weight.stride_o + i_K.to(WORD)[:, None] * weight.stride_i
    sum_MN = tl.full((TILE.rows, TILE.out), 0.0, tl.float32)
    for i in range(0, weight.n_in, TILE.inner):
        # Masks only where a block may reach beyond the matrix.
        rest_K = i_K < weight.n_in - i
        a_MK = tl.load(x_start + x_MK) if FORM.even_in else tl.load(x_start + x_MK, mask=rest_K[None, :], other=0.0)
        if FORM.even_in and FORM.even_out:
            b_KN = tl.load(w_start + w_KN)
        else:
            b_KN = tl.load(w_start + w_KN, mask=rest_K[:, None] & (o_N < weight.n_out)[None, :], other=0.0)
        sum_MN = dot(a_MK, b_KN, sum_MN, FORM)
        x_start += TILE.inner
        w_start += TILE.inner * weight.stride_i
    if y.bias is not None:
        bias_N = tl.load(y.bias + expert * weight.n_out + o_N, mask=o_N < weight.n_out, other=0.0)
        sum_MN += bias_N.to(tl.float32)[None, :]
    goal_M = row_M.to(tl.int64)
    if FORM.scatter:
        goal_M = tl.load(plan.rows + near_M).to(tl.int64)
    y_MN = y.data + goal_M[:, None] * weight.n_out + o_N[None, :]
    inside_MN = (row_M < end)[:, None] & (o_N < weight.n_out)[None, :]
    tl.store(y_MN, sum_MN.to(y.data.dtype.element_ty), mask=inside_MN)
