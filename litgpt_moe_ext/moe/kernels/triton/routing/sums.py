"""The statistics and losses of a router, added up over blocks of tokens.

Shape legend: as in `litgpt_moe_ext.moe.kernels.triton.routing.launches`.
"""

from typing import TYPE_CHECKING, Any

import triton

from litgpt_moe_ext.moe.kernels.triton.common import constexpr
from litgpt_moe_ext.moe.kernels.triton.routing.blocks import ROWS

if TYPE_CHECKING:
    # Triton's own types take what a reduction returns for several values.
    tl: Any = None
else:
    import triton.language as tl

# Experts per program of `sum_blocks` (64 bytes of a row), and blocks added up at a time.
COLUMNS, _BLOCKS = tl.constexpr(16), tl.constexpr(128)


@triton.jit
def _variation(x_E, real_E, n_expert):
    # The squared coefficient of variation of a vector, and its gradient.
    mean = tl.sum(x_E, 0) / n_expert
    apart_E = tl.where(real_E, x_E - mean, 0.0)
    variance = tl.sum(apart_E * apart_E, 0) / n_expert
    # The smallest normal float32.
    square = tl.maximum(mean * mean, 1.1754943508222875e-38)
    falls = tl.where(mean * mean > 1.1754943508222875e-38, 2.0 * variance / (square * mean * n_expert), 0.0)
    return variance / square, 2.0 * apart_E / (square * n_expert) - falls


@triton.jit
def sum_blocks(blocks, parts, before, sizes, FORM: constexpr):
    """Add up the blocks of each sequence; each program takes some experts and one kind of numbers."""
    e_C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1)
    if FORM.load == 0.0:
        row += row // 3  # the fourth row has not been written
    inside_C = e_C < FORM.experts
    wanted_C = e_C < (FORM.experts if row < 4 else 4)  # four numbers are not by expert
    count_C = tl.full((COLUMNS,), 0, tl.int32)
    for sequence in range(0, sizes.n_sequence):
        sum_BC = tl.full((_BLOCKS, COLUMNS), 0.0, tl.float64)
        for start in range(0, sizes.n_block, _BLOCKS):
            block_B = start + tl.arange(0, _BLOCKS)
            wanted_BC = (block_B < sizes.n_block)[:, None] & wanted_C[None, :]
            block_B = sequence * sizes.n_block + block_B.to(tl.int64)
            part_BC = blocks + (block_B * ROWS + row)[:, None] * FORM.experts + e_C[None, :]
            part_BC = tl.load(part_BC, mask=wanted_BC, other=0.0)
            sum_BC += part_BC.to(tl.float64)
            if row == 0:
                count_BC = part_BC.to(tl.int32)
                before_BC = count_C[None, :] + tl.cumsum(count_BC, 0) - count_BC
                tl.store(before + block_B[:, None] * FORM.experts + e_C[None, :], before_BC, mask=wanted_BC)
                count_C += tl.sum(count_BC, 0)
        tl.store(parts + (sequence * ROWS + row) * FORM.experts + e_C, tl.sum(sum_BC, 0), mask=inside_C)


@triton.jit
def sum_up(parts, sums, other_loss, sizes, FORM: constexpr):
    """Add up all blocks in one program: tokens of experts, where they end, losses, their slopes, the tally."""
    e_E = tl.arange(0, FORM.experts)
    real_E = e_E < sizes.n_expert
    count_E = tl.full((FORM.experts,), 0, tl.int32)
    p_E = tl.full((FORM.experts,), 0.0, tl.float64)
    gate_E, load_E, several_E, sequence_loss = p_E, p_E, p_E, tl.sum(p_E, 0)
    # Whole numbers that happen to be 1 are constants to Triton, without a type.
    n_expert = tl.sum(real_E.to(tl.float64), 0)
    for sequence in range(0, sizes.n_sequence):
        earlier_E, earlier_p_E = count_E, p_E
        for start in range(0, sizes.n_block, FORM.blocks):
            block_B = start + tl.arange(0, FORM.blocks)
            live_B = block_B < sizes.n_block
            block_B = sequence * sizes.n_block + block_B.to(tl.int64)
            live_BE = live_B[:, None] & real_E[None, :]
            part_BE = parts + block_B[:, None] * (ROWS * FORM.experts) + e_E[None, :]
            count_BE = tl.load(part_BE, mask=live_BE, other=0.0).to(tl.int32)
            some_BE = live_B[:, None] & (e_E < FORM.experts)[None, :]
            if sums.before is not None:
                before_BE = count_E[None, :] + tl.cumsum(count_BE, 0) - count_BE
                tl.store(sums.before + block_B[:, None] * FORM.experts + e_E[None, :], before_BE, mask=some_BE)
            count_E += tl.sum(count_BE, 0)
            if FORM.trains:
                # Float32 within a few blocks, float64 (slow on desktop cards) over all.
                p_E += tl.sum(tl.load(part_BE + FORM.experts, mask=live_BE, other=0.0), 0).to(tl.float64)
                gate_E += tl.sum(tl.load(part_BE + 2 * FORM.experts, mask=live_BE, other=0.0), 0).to(tl.float64)
                if FORM.load != 0.0:
                    load_E += tl.sum(tl.load(part_BE + 3 * FORM.experts, mask=live_BE, other=0.0), 0).to(tl.float64)
                several_E += tl.sum(tl.load(part_BE + 4 * FORM.experts, mask=some_BE, other=0.0), 0).to(tl.float64)
        if FORM.trains and FORM.sequence != 0.0:
            tokens_E = (count_E - earlier_E).to(tl.float64)
            slope_E = FORM.sequence * n_expert * tokens_E / tl.maximum(tl.sum(tokens_E, 0), 1.0)
            tl.store(sums.slopes + (3 + sequence) * sizes.n_expert + e_E, slope_E.to(tl.float32), mask=real_E)
            sequence_loss += tl.sum(slope_E * (p_E - earlier_p_E), 0)
    tl.store(sums.counts + e_E, count_E.to(tl.int64), mask=real_E)
    tl.store(sums.ends + e_E, tl.cumsum(count_E, 0), mask=real_E)
    if FORM.trains:
        # Losses are recorded multiplied by the number of tokens.
        n_token = tl.maximum(tl.sum(count_E, 0).to(tl.float64) / FORM.top_k, 1.0)
        tl.store(sums.tally + e_E, count_E.to(tl.float64), mask=real_E)
        several = sums.tally + sizes.n_expert
        tl.store(several + e_E, several_E, mask=e_E < 3)
        loss = several + 3
        if FORM.balancing != 0.0:
            slope_E = FORM.balancing * n_expert * count_E.to(tl.float64) / (n_token * FORM.top_k)
            tl.store(loss, tl.sum(slope_E * p_E, 0))
            if FORM.global_batch:
                slope_E = p_E
            tl.store(sums.slopes + e_E, slope_E.to(tl.float32), mask=real_E)
            loss += 1
        if FORM.sequence != 0.0:
            tl.store(loss, sequence_loss)
            loss += 1
        if FORM.z != 0.0:
            tl.store(loss, FORM.z * tl.sum(tl.where(e_E == 3, several_E, 0.0), 0))
            loss += 1
        if FORM.importance != 0.0:
            value, slope_E = _variation(gate_E, real_E, n_expert)
            slope_E *= FORM.importance
            tl.store(sums.slopes + sizes.n_expert + e_E, slope_E.to(tl.float32), mask=real_E)
            tl.store(loss, FORM.importance * value * n_token)
            loss += 1
        if FORM.load != 0.0:
            value, slope_E = _variation(load_E, real_E, n_expert)
            slope_E *= FORM.load
            tl.store(sums.slopes + 2 * sizes.n_expert + e_E, slope_E.to(tl.float32), mask=real_E)
            tl.store(loss, FORM.load * value * n_token)
            loss += 1
        if other_loss is not None:
            # Padding alone has no tokens. Another division would need a stack on some cards.
            n_token *= tl.minimum(tl.sum(count_E, 0), 1).to(tl.float64)
            tl.store(loss, tl.load(other_loss).to(tl.float64) * n_token)
