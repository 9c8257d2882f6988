"""Adds the biases of experts to the rows of torch's product, optionally bringing them into the order of tokens.

Shape legend: E experts, R = T * K routed rows in the order of experts, O width of the output, M a block of R, N a block
of O.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch, power_of_two
from litgpt_moe_ext.moe.kernels.plan import Plan
from litgpt_moe_ext.moe.kernels.triton.common import block_of, constexpr


class _Rows(NamedTuple):
    data: Any
    rows: Any
    width: Any


class _Form(NamedTuple):
    rows: int
    columns: int
    experts: int
    scatter: bool


def add_biases(y_RO: Tensor, bias_EO: Tensor, plan: Plan, scatter: bool) -> Tensor:
    """Return each row plus the bias of its expert, (R, O) in the dtype of the rows.

    Args:
        y_RO: Rows in the order of experts, contiguous; overwritten unless `scatter`.
        bias_EO: Biases, contiguous, any floating dtype.
        plan: Which rows belong to which expert.
        scatter: Whether the rows of the result are in the order of tokens and their K choices.
    """
    sum_RO = torch.empty_like(y_RO) if scatter else y_RO
    y = _Rows(y_RO, *y_RO.shape)
    form = _Form(*block_of(y.width), power_of_two(plan.n_expert), scatter)
    grid = (ceil_div(y.rows, form.rows), ceil_div(y.width, form.columns))
    launch(_add_biases, grid, (y, bias_EO, plan, sum_RO, form), warps=4)
    return sum_RO


@triton.jit
def _add_biases(y, bias, plan, out, FORM: constexpr):
    row_M = tl.program_id(0) * FORM.rows + tl.arange(0, FORM.rows)
    o_N = tl.program_id(1) * FORM.columns + tl.arange(0, FORM.columns)
    expert_E = tl.arange(0, FORM.experts)
    end_E = tl.load(plan.ends + expert_E, mask=expert_E < plan.n_expert, other=2147483647)
    expert_M = tl.sum((end_E[None, :] <= row_M[:, None]).to(tl.int32), 1)
    live_M = row_M < y.rows
    inside_MN = live_M[:, None] & (o_N < y.width)[None, :]
    # Rows after the last expert's are padding, which has no bias.
    bias_MN = bias + expert_M.to(tl.int64)[:, None] * y.width + o_N[None, :]
    bias_MN = tl.load(bias_MN, mask=inside_MN & (expert_M < plan.n_expert)[:, None], other=0.0).to(tl.float32)
    y_MN = tl.load(y.data + row_M.to(tl.int64)[:, None] * y.width + o_N[None, :], mask=inside_MN, other=0.0)
    goal_M = tl.load(plan.rows + row_M, mask=live_M, other=0) if FORM.scatter else row_M.to(tl.int64)
    out_MN = out + goal_M[:, None] * y.width + o_N[None, :]
    tl.store(out_MN, (y_MN.to(tl.float32) + bias_MN).to(out.dtype.element_ty), mask=inside_MN)
