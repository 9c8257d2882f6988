"""A counting sort of rows by expert: each block of tokens writes its rows after those of the blocks before it.

Shape legend: as in `litgpt_moe_ext.moe.kernels.triton.routing.launches`.
"""

from typing import TYPE_CHECKING, Any

import triton

from litgpt_moe_ext.moe.kernels.triton.common import constexpr
from litgpt_moe_ext.moe.kernels.triton.routing.blocks import ROWS, block, rank_of
from litgpt_moe_ext.moe.kernels.triton.routing.sums import sum_up

if TYPE_CHECKING:
    # Triton's own types take what a reduction returns for several values.
    tl: Any = None
else:
    import triton.language as tl


@triton.jit
def store_rows(rows, rank_TE, picked_TE, before_E, count_E, where, FORM: constexpr):
    """Store the rows of a block, given how many of each expert precede it and how many there are."""
    token_T, _, live_T, _, _, _ = where
    first_E = tl.cumsum(count_E, 0) - count_E
    row_TE = (first_E + before_E)[None, :] + tl.cumsum(picked_TE.to(tl.int32), 0) - picked_TE.to(tl.int32)
    tl.store(rows + row_TE, token_T[:, None] * FORM.top_k + rank_TE, mask=picked_TE)
    # Padding comes last; its choices before this block are those of no expert.
    choice_T = token_T * FORM.top_k
    padding_T = (live_T & (tl.sum(picked_TE.to(tl.int32), 1) == 0)).to(tl.int32)
    row_T = tl.sum(count_E, 0) + tl.min(choice_T, 0) - tl.sum(before_E, 0)
    row_T += (tl.cumsum(padding_T, 0) - padding_T) * FORM.top_k
    for k in range(FORM.top_k):
        tl.store(rows + row_T + k, choice_T + k, mask=padding_T > 0)


@triton.jit
def place_rows(experts, ends, before, rows, sizes, FORM: constexpr):
    """Store the rows of a block, given where experts end and how many rows of each precede the block."""
    token_T, e_E, live_T, real_E, _, inside_TE = block(sizes, FORM)
    rank_TE = rank_of(experts, token_T, live_T, e_E, real_E, FORM)
    end_E = tl.load(ends + e_E, mask=real_E, other=0)
    first_E = tl.load(ends + e_E - 1, mask=real_E & (e_E > 0), other=0)
    before_E = tl.load(before + tl.program_id(0).to(tl.int64) * FORM.experts + e_E)
    where = (token_T, e_E, live_T, live_T, real_E, inside_TE)
    store_rows(rows, rank_TE, rank_TE < FORM.top_k, before_E, end_E - first_E, where, FORM)


@triton.jit
def sum_up_and_place(parts, experts, sums, other_loss, sizes, FORM: constexpr):
    """Add up all blocks in the last program; in each of the others, add up counts and store the rows of a block."""
    n_block = sizes.n_sequence * sizes.n_block
    if tl.program_id(0) == n_block:
        sum_up(parts, sums, other_loss, sizes, FORM)
    else:
        token_T, e_E, live_T, real_E, _, inside_TE = block(sizes, FORM)
        rank_TE = rank_of(experts, token_T, live_T, e_E, real_E, FORM)
        count_E = tl.full((FORM.experts,), 0, tl.int32)
        before_E = count_E
        for start in range(0, n_block, FORM.blocks):
            block_B = start + tl.arange(0, FORM.blocks)
            count_BE = parts + block_B[:, None] * (ROWS * FORM.experts) + e_E[None, :]
            live_BE = (block_B < n_block)[:, None] & real_E[None, :]
            count_BE = tl.load(count_BE, mask=live_BE, other=0.0).to(tl.int32)
            count_E += tl.sum(count_BE, 0)
            before_E += tl.sum(tl.where((block_B < tl.program_id(0))[:, None], count_BE, 0), 0)
        where = (token_T, e_E, live_T, live_T, real_E, inside_TE)
        store_rows(sums.rows, rank_TE, rank_TE < FORM.top_k, before_E, count_E, where, FORM)
