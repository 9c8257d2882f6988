"""A router's decision for a block of tokens, and the block's share of the statistics.

Shape legend: as in `litgpt_moe_ext.moe.kernels.triton.routing.launches`.
"""

from typing import TYPE_CHECKING, Any

import triton

from litgpt_moe_ext.moe.kernels.triton.common import constexpr
from litgpt_moe_ext.moe.kernels.triton.routing.blocks import (
    ROWS,
    block,
    gate_values,
    margins,
    rank,
    softmax,
    text,
    values,
)
from litgpt_moe_ext.moe.kernels.triton.routing.rows import store_rows

if TYPE_CHECKING:
    # Triton's own types take what a reduction returns for several values.
    tl: Any = None
else:
    import triton.language as tl


@triton.jit
def _sum_tokens(x_TE, inside_TE):
    return tl.sum(tl.where(inside_TE, x_TE, 0.0), 0)


@triton.jit
def _store_choice(chosen, w_TE, rank_TE, where, sizes, FORM: constexpr):
    token_T, e_E, live_T, text_T, _, inside_TE = where
    goal_TE = token_T[:, None] * FORM.top_k + rank_TE
    stored_TE = (rank_TE < FORM.top_k) & live_T[:, None]
    tl.store(chosen.weights + goal_TE, tl.where(inside_TE, w_TE * FORM.scale, 0.0), mask=stored_TE)
    e_TE = tl.where(text_T[:, None], e_E.to(tl.int64)[None, :], sizes.n_expert)
    tl.store(chosen.experts + goal_TE, e_TE, mask=stored_TE)


@triton.jit
def _store_counts(rank_TE, where, whole, part_E, FORM: constexpr):
    # Store the block's part or, for a single block, the results of `sum_up` and `place_rows`.
    _, e_E, _, _, real_E, inside_TE = where
    count_E = _sum_tokens((rank_TE < FORM.top_k).to(tl.float32), inside_TE)
    if whole is None:
        tl.store(part_E, count_E)
    else:
        count_E = count_E.to(tl.int32)
        tl.store(whole.counts + e_E, count_E.to(tl.int64), mask=real_E)
        tl.store(whole.ends + e_E, tl.cumsum(count_E, 0), mask=real_E)
        picked_TE = (rank_TE < FORM.top_k) & inside_TE
        store_rows(whole.rows, rank_TE, picked_TE, count_E * 0, count_E, where, FORM)


@triton.jit
def route_block_evenly(given, chosen, whole, parts, sizes, FORM: constexpr):
    """Choose for a block of a router that does not learn; it has no scores, hence no statistics of them."""
    # float64 tells hashes apart.
    token_T, e_E, live_T, real_E, at_TE, inside_TE = block(sizes, FORM)
    text_T = text(given, token_T, live_T)
    key_TE = tl.load(given.logits_TE + at_TE, mask=inside_TE, other=0).to(tl.float64)
    inside_TE = text_T[:, None] & real_E[None, :]
    rank_TE = rank(key_TE, e_E, sizes, FORM)
    w_TE = tl.full((FORM.rows, FORM.experts), 1.0 / FORM.top_k, tl.float32)
    where = (token_T, e_E, live_T, text_T, real_E, inside_TE)
    _store_choice(chosen, w_TE, rank_TE, where, sizes, FORM)

    part_E = parts + tl.program_id(0).to(tl.int64) * (ROWS * FORM.experts) + e_E
    _store_counts(rank_TE, where, whole, part_E, FORM)
    if FORM.trains:
        gate = tl.sum(text_T.to(tl.float32), 0) * FORM.scale
        tl.store(part_E + FORM.experts, tl.full((FORM.experts,), 0.0, tl.float32))
        tl.store(part_E + 2 * FORM.experts, tl.full((FORM.experts,), 0.0, tl.float32))
        tl.store(part_E + 4 * FORM.experts, tl.where(e_E == 0, gate, 0.0))


@triton.jit
def route_block(given, chosen, whole, parts, sizes, FORM: constexpr):
    """Choose for a block of tokens; store gate values, experts and the block's sums; for a single block also rows."""
    token_T, e_E, live_T, real_E, at_TE, inside_TE = block(sizes, FORM)
    z_TE, _, std_TE, v_TE = values(given, at_TE, inside_TE, real_E)
    text_T = text(given, token_T, live_T)
    inside_TE = text_T[:, None] & real_E[None, :]
    p_TE, lse_T = softmax(z_TE)
    s_TE = tl.sigmoid(z_TE) if FORM.score == "sigmoid" else p_TE
    key_TE = v_TE
    if FORM.score != "chosen":
        key_TE = s_TE
        if given.bias_E is not None:
            key_TE += tl.load(given.bias_E + e_E, mask=real_E, other=0.0)[None, :]
    rank_TE = rank(key_TE, e_E, sizes, FORM)
    picked_TE = rank_TE < FORM.top_k
    w_TE, _ = gate_values(s_TE, v_TE, picked_TE, FORM)
    where = (token_T, e_E, live_T, text_T, real_E, inside_TE)
    _store_choice(chosen, w_TE, rank_TE, where, sizes, FORM)

    part_E = parts + tl.program_id(0).to(tl.int64) * (ROWS * FORM.experts) + e_E
    _store_counts(rank_TE, where, whole, part_E, FORM)
    if FORM.trains:
        if FORM.score == "sigmoid":
            p_TE = s_TE / (tl.sum(s_TE, 1) + 1e-20)[:, None]
        tl.store(part_E + FORM.experts, _sum_tokens(p_TE, inside_TE))
        tl.store(part_E + 2 * FORM.experts, _sum_tokens(w_TE, inside_TE))
        if FORM.load != 0.0:
            margin_TE, _, _ = margins(z_TE, std_TE, v_TE, picked_TE, real_E)
            among_TE = 0.5 * (1.0 + tl.erf(margin_TE * 0.7071067811865476))
            tl.store(part_E + 3 * FORM.experts, _sum_tokens(among_TE, inside_TE))
        squares = tl.sum(_sum_tokens(z_TE * z_TE, inside_TE), 0)
        entropy_TE = tl.where(p_TE > 0.0, -p_TE * tl.log(tl.where(p_TE > 0.0, p_TE, 1.0)), p_TE * 0.0)
        entropy = tl.sum(_sum_tokens(entropy_TE, inside_TE), 0)
        gate = tl.sum(_sum_tokens(w_TE * FORM.scale, inside_TE), 0)
        z_loss = tl.sum(tl.where(text_T, lse_T * lse_T, 0.0), 0)
        several_E = tl.where(e_E == 0, gate, tl.where(e_E == 1, squares, tl.where(e_E == 2, entropy, z_loss)))
        tl.store(part_E + 4 * FORM.experts, several_E)
