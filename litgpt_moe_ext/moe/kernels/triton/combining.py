"""The sum over a token's K experts: each row is read once, added in float32, and each token written once.

Rows arrive in the order of tokens (the grouped product stores them there), so no permutation is read and nothing is
added atomically.

Shape legend: T tokens, K chosen experts per token, D model width, M a block of T, N a block of D.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch
from litgpt_moe_ext.moe.kernels.triton.common import block_of, constexpr


class _Sizes(NamedTuple):
    n_token: Any
    width: Any


class _Form(NamedTuple):
    # With K constant, all rows of a token are under way at once.
    top_k: int
    rows: int
    columns: int


def combine(
    y_RD: Tensor, gates_TK: Tensor | None, n_token: int, dtype: torch.dtype, added_TD: Tensor | None = None
) -> Tensor:
    """Return the sum of each token's rows and `added_TD`, (T, D) in `dtype`.

    Args:
        y_RD: Rows in the order of tokens and their K choices, contiguous.
        gates_TK: Factors of the rows, contiguous, or None.
        n_token: T.
        dtype: Dtype of the result.
        added_TD: Added to the sum, or None.
    """
    n_row, width = y_RD.shape
    y_TD = y_RD.new_empty(n_token, width, dtype=dtype)
    form = _Form(n_row // max(n_token, 1), *block_of(width))
    grid = (ceil_div(n_token, form.rows), ceil_div(width, form.columns))
    added_TD = None if added_TD is None else added_TD.contiguous()
    launch(_combine, grid, (y_RD, gates_TK, added_TD, y_TD, _Sizes(n_token, width), form), warps=4)
    return y_TD


@triton.jit
def _combine(y, gates, added, out, sizes, FORM: constexpr):
    token_M = (tl.program_id(0) * FORM.rows + tl.arange(0, FORM.rows)).to(tl.int64)
    d_N = tl.program_id(1) * FORM.columns + tl.arange(0, FORM.columns)
    live_M = token_M < sizes.n_token
    inside_MN = live_M[:, None] & (d_N < sizes.width)[None, :]
    sum_MN = tl.full((FORM.rows, FORM.columns), 0.0, tl.float32)
    for k in tl.static_range(tl.constexpr(FORM.top_k)):  # to Triton 3.6 the fields of a constant are none
        choice_M = token_M * FORM.top_k + k
        y_MN = y + choice_M[:, None] * sizes.width + d_N[None, :]
        part_MN = tl.load(y_MN, mask=inside_MN, other=0.0).to(tl.float32)
        if gates is not None:
            part_MN *= tl.load(gates + choice_M, mask=live_M, other=0.0).to(tl.float32)[:, None]
        sum_MN += part_MN
    at_MN = token_M[:, None] * sizes.width + d_N[None, :]
    if added is not None:
        sum_MN += tl.load(added + at_MN, mask=inside_MN, other=0.0).to(tl.float32)
    tl.store(out + at_MN, sum_MN.to(out.dtype.element_ty), mask=inside_MN)
