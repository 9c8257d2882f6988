"""A router's decision, its losses and its statistics in two to four launches, and their backward pass in one.

Written out with torch's operators (`litgpt_moe_ext.moe.router`, which stays the reference) this is twenty to forty
launches per layer, of a few microseconds each, for arithmetic that takes less. Everything between loading and storing
is float32, sums over all tokens are float64; blocks are added in a fixed order, so two runs give the same bits.

1. `_route` decides for a block of tokens and sums up the block. One that is alone, and does not train, is all there is.
2. `_sum_up`, a single program, adds up the blocks: tokens per expert, losses, their slopes, and how many rows of an
   expert precede a block. Where it would have much to read (many experts and tokens), `_sum_blocks` adds them up
   before, a few experts and one kind of numbers in each program, and leaves it one block of each sequence.
3. `_place` sorts the rows by expert, by counting. Of few blocks each looks at the others itself, in one launch with 2.

A block has tokens of one sequence only where a loss is per sequence; elsewhere all tokens count as one sequence.

Shape legend: T tokens (in a kernel: of a block), E experts, K chosen experts per token, R = T * K routed rows,
S sequences, B blocks of a sequence, N numbers of a tally, L rows of slopes.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch
from litgpt_moe_ext.moe.kernels.fused_router import Given, Rule, block_shape
from litgpt_moe_ext.moe.kernels.triton.common import constexpr
from litgpt_moe_ext.moe.kernels.triton.routing_blocks import (
    block,
    gate_values,
    margins,
    rank,
    rank_of,
    softmax,
    text,
    values,
)

if TYPE_CHECKING:
    # Triton's own types take what a reduction returns for several values.
    tl: Any = None
else:
    import triton.language as tl

# Numbers of a block are kept in rows of E: tokens, probabilities, gate values and expected tokens of each expert, and
# one row of sums that are not by expert.
_ROWS = tl.constexpr(5)
# More numbers than this are added up by several programs: 2 MiB, which one would read for longer than a launch takes.
_MOST_FOR_ONE = 2**19
# Up to so many blocks, of up to so many experts, are looked at by each.
_FEW_BLOCKS, _FEW_EXPERTS = 64, 128
# Experts of each of them, 64 bytes in a row, and blocks that it adds up at a time.
_COLUMNS, _BLOCKS = tl.constexpr(16), tl.constexpr(128)


class _Sizes(NamedTuple):
    # Tokens and blocks are those of one sequence.
    n_token: Any
    n_expert: Any
    n_block: Any
    n_sequence: Any


class _Chosen(NamedTuple):
    weights: Any
    experts: Any


class _Form(NamedTuple):
    # A rule, with what the kernels need besides.
    score: str
    top_k: int
    normalize: bool
    scale: float
    groups: int
    best_groups: int
    best_in_group: int
    balancing: float
    sequence: float
    z: float
    importance: float
    load: float
    global_batch: bool
    rows: int
    experts: int
    blocks: int
    trains: bool


class _Sums(NamedTuple):
    # Rows of each expert before each block are None where they have been written, or nobody asks.
    counts: Any
    ends: Any
    before: Any
    rows: Any
    slopes: Any
    tally: Any


class _Alone(NamedTuple):
    # What there is to sum up of a block that is alone. Triton before 3.7 does not ask whether a group is None that has
    # a None in it.
    counts: Any
    ends: Any
    rows: Any


def route(given: Given, rule: Rule, trains: bool) -> tuple[Tensor, ...]:
    """Decide for all tokens; returns what `litgpt_moe_ext.moe.kernels.fused_router.Decision` holds, in its order."""
    n_token, n_expert = given.logits_TE.shape
    new = functools.partial(given.logits_TE.new_empty, dtype=torch.float32)
    form = _form(rule, n_expert, trains)
    sizes, S = _sizes(n_token, n_expert, rule.sequences, form), rule.sequences
    chosen = _Chosen(new(n_token, rule.top_k), new(n_token, rule.top_k, dtype=torch.int64))
    parts = new(S * sizes.n_block, _ROWS.value, form.experts)
    n_loss = sum(coef != 0 for coef in rule.coefs) + (given.other_loss is not None)
    sums = _Sums(
        counts=new(n_expert, dtype=torch.int64),
        ends=new(n_expert, dtype=torch.int32),
        before=None,
        rows=new(n_token * rule.top_k, dtype=torch.int64),
        slopes=new(3 + (S if rule.sequence else 0), n_expert),
        tally=new(n_expert + 3 + n_loss if trains else 0, dtype=torch.float64),
    )
    kernel = _route_evenly if rule.score == "even" else _route
    n_block = S * sizes.n_block
    # A program has at most 1024 threads, a warp of AMD's up to 64, each with more registers.
    warps = _warps(form, 32 if torch.version.hip is None else 16)
    # A few tokens without statistics, as when text is generated, are a single program's.
    alone = not trains and n_block == 1
    whole = _Alone(sums.counts, sums.ends, sums.rows) if alone else None
    launch(kernel, (n_block,), (given, chosen, whole, parts, sizes, form), warps)
    if not alone and n_block <= _FEW_BLOCKS and form.experts <= _FEW_EXPERTS:
        arguments = (parts, chosen.experts, sums, given.other_loss, sizes, form)
        launch(_sum_up_and_place, (n_block + 1,), arguments, _warps(form))
    elif not alone:
        before_SBE = sums.ends.new_empty(n_block * form.experts)
        _add_up(parts, sums._replace(before=before_SBE), given.other_loss, sizes, form)
        launch(_place, (n_block,), (chosen.experts, sums.ends, before_SBE, sums.rows, sizes, form), _warps(form))
    return *chosen, sums.counts, sums.ends, sums.rows, sums.slopes, sums.tally


def _add_up(parts: Tensor, sums: _Sums, other_loss: Tensor | None, sizes: _Sizes, form: _Form) -> None:
    warps = _warps(form)
    # With more experts `_sum_up` spills registers unless it adds up one block at a time.
    if parts.numel() > _MOST_FOR_ONE or form.experts > 512:
        blocks, parts = parts, parts.new_empty(sizes.n_sequence, 5, form.experts, dtype=torch.float64)
        grid = (ceil_div(form.experts, _COLUMNS.value), (5 if form.load else 4) if form.trains else 1)
        launch(_sum_blocks, grid, (blocks, parts, sums.before, sizes, form), warps=4)
        sums, sizes, form, warps = sums._replace(before=None), sizes._replace(n_block=1), form._replace(blocks=1), 4
    launch(_sum_up, (1,), (parts, sums, other_loss, sizes, form), warps)


def route_backward(given: Given, rule: Rule, *upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the logits, and of the logits of the noise (without noise something empty).

    Args:
        given: What the decision was made of.
        rule: By what rule.
        *upstream: The chosen experts, where the rows of each expert end, gradients of the losses, all as `route`
            returned them; the gradient of the gate values, contiguous; and by what the losses are scaled, a scalar.
    """
    n_token, n_expert = given.logits_TE.shape
    dlogits_TE = torch.empty_like(given.logits_TE)
    dspread_TE = dlogits_TE.new_empty(0) if given.spread_TE is None else torch.empty_like(dlogits_TE)
    form = _form(rule, n_expert, True)
    sizes = _sizes(n_token, n_expert, rule.sequences, form)
    arguments = (given, upstream, (dlogits_TE, dspread_TE), sizes, form)
    launch(_route_backward, (rule.sequences * sizes.n_block,), arguments, warps=_warps(form))
    return dlogits_TE, dspread_TE


def _form(rule: Rule, n_expert: int, trains: bool) -> _Form:
    rows, width = block_shape(n_expert)
    # How many blocks are added up at a time: as many as registers hold.
    return _Form(*rule[:-1], rows, width, min(32, 16384 // width), trains)


def _warps(form: _Form, most: int = 8) -> int:
    # So many that no kernel spills registers. More where there are few experts would be another order of additions.
    return 4 if form.experts <= 256 else min(most, form.experts // 32)


def _sizes(n_token: int, n_expert: int, n_sequence: int, form: _Form) -> _Sizes:
    n_token //= n_sequence
    return _Sizes(n_token, n_expert, ceil_div(n_token, form.rows), n_sequence)


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
def _store_rows(rows, rank_TE, picked_TE, before_E, count_E, where, FORM: constexpr):
    # Of a block, given how many rows of each expert precede it and how many there are.
    token_T, _, live_T, _, _, _ = where
    first_E = tl.cumsum(count_E, 0) - count_E
    row_TE = (first_E + before_E)[None, :] + tl.cumsum(picked_TE.to(tl.int32), 0) - picked_TE.to(tl.int32)
    tl.store(rows + row_TE, token_T[:, None] * FORM.top_k + rank_TE, mask=picked_TE)
    # Padding, of which there are as many choices before this block as are of no expert.
    choice_T = token_T * FORM.top_k
    padding_T = (live_T & (tl.sum(picked_TE.to(tl.int32), 1) == 0)).to(tl.int32)
    row_T = tl.sum(count_E, 0) + tl.min(choice_T, 0) - tl.sum(before_E, 0)
    row_T += (tl.cumsum(padding_T, 0) - padding_T) * FORM.top_k
    for k in range(FORM.top_k):
        tl.store(rows + row_T + k, choice_T + k, mask=padding_T > 0)


@triton.jit
def _store_counts(rank_TE, where, whole, part_E, FORM: constexpr):
    # Into the block's part; or, of a block that is alone, all that `_sum_up` and `_place` make of it.
    _, e_E, _, _, real_E, inside_TE = where
    count_E = _sum_tokens((rank_TE < FORM.top_k).to(tl.float32), inside_TE)
    if whole is None:
        tl.store(part_E, count_E)
    else:
        count_E = count_E.to(tl.int32)
        tl.store(whole.counts + e_E, count_E.to(tl.int64), mask=real_E)
        tl.store(whole.ends + e_E, tl.cumsum(count_E, 0), mask=real_E)
        picked_TE = (rank_TE < FORM.top_k) & inside_TE
        _store_rows(whole.rows, rank_TE, picked_TE, count_E * 0, count_E, where, FORM)


@triton.jit
def _route_evenly(given, chosen, whole, parts, sizes, FORM: constexpr):
    # For routers that do not learn: no scores, and so no statistics of them. float64 tells hashes apart.
    token_T, e_E, live_T, real_E, at_TE, inside_TE = block(sizes, FORM)
    text_T = text(given, token_T, live_T)
    key_TE = tl.load(given.logits_TE + at_TE, mask=inside_TE, other=0).to(tl.float64)
    inside_TE = text_T[:, None] & real_E[None, :]
    rank_TE = rank(key_TE, e_E, sizes, FORM)
    w_TE = tl.full((FORM.rows, FORM.experts), 1.0 / FORM.top_k, tl.float32)
    where = (token_T, e_E, live_T, text_T, real_E, inside_TE)
    _store_choice(chosen, w_TE, rank_TE, where, sizes, FORM)

    part_E = parts + tl.program_id(0).to(tl.int64) * (_ROWS * FORM.experts) + e_E
    _store_counts(rank_TE, where, whole, part_E, FORM)
    if FORM.trains:
        gate = tl.sum(text_T.to(tl.float32), 0) * FORM.scale
        tl.store(part_E + FORM.experts, tl.full((FORM.experts,), 0.0, tl.float32))
        tl.store(part_E + 2 * FORM.experts, tl.full((FORM.experts,), 0.0, tl.float32))
        tl.store(part_E + 4 * FORM.experts, tl.where(e_E == 0, gate, 0.0))


@triton.jit
def _route(given, chosen, whole, parts, sizes, FORM: constexpr):
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

    part_E = parts + tl.program_id(0).to(tl.int64) * (_ROWS * FORM.experts) + e_E
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
def _sum_blocks(blocks, parts, before, sizes, FORM: constexpr):
    e_C = tl.program_id(0) * _COLUMNS + tl.arange(0, _COLUMNS)
    row = tl.program_id(1)
    if FORM.load == 0.0:
        row += row // 3  # nothing has written the fourth
    inside_C = e_C < FORM.experts
    wanted_C = e_C < (FORM.experts if row < 4 else 4)  # four numbers are not by expert
    count_C = tl.full((_COLUMNS,), 0, tl.int32)
    for sequence in range(0, sizes.n_sequence):
        sum_BC = tl.full((_BLOCKS, _COLUMNS), 0.0, tl.float64)
        for start in range(0, sizes.n_block, _BLOCKS):
            block_B = start + tl.arange(0, _BLOCKS)
            wanted_BC = (block_B < sizes.n_block)[:, None] & wanted_C[None, :]
            block_B = sequence * sizes.n_block + block_B.to(tl.int64)
            part_BC = blocks + (block_B * _ROWS + row)[:, None] * FORM.experts + e_C[None, :]
            part_BC = tl.load(part_BC, mask=wanted_BC, other=0.0)
            sum_BC += part_BC.to(tl.float64)
            if row == 0:
                count_BC = part_BC.to(tl.int32)
                before_BC = count_C[None, :] + tl.cumsum(count_BC, 0) - count_BC
                tl.store(before + block_B[:, None] * FORM.experts + e_C[None, :], before_BC, mask=wanted_BC)
                count_C += tl.sum(count_BC, 0)
        tl.store(parts + (sequence * _ROWS + row) * FORM.experts + e_C, tl.sum(sum_BC, 0), mask=inside_C)


@triton.jit
def _sum_up(parts, sums, other_loss, sizes, FORM: constexpr):
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
            part_BE = parts + block_B[:, None] * (_ROWS * FORM.experts) + e_E[None, :]
            count_BE = tl.load(part_BE, mask=live_BE, other=0.0).to(tl.int32)
            some_BE = live_B[:, None] & (e_E < FORM.experts)[None, :]
            if sums.before is not None:
                before_BE = count_E[None, :] + tl.cumsum(count_BE, 0) - count_BE
                tl.store(sums.before + block_B[:, None] * FORM.experts + e_E[None, :], before_BE, mask=some_BE)
            count_E += tl.sum(count_BE, 0)
            if FORM.trains:
                # A few blocks in float32, all of them in float64, in which cards for desktops are slow.
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
        # Losses are recorded times the number of tokens.
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
            # Padding alone has none. Another division would take a stack on some cards.
            n_token *= tl.minimum(tl.sum(count_E, 0), 1).to(tl.float64)
            tl.store(loss, tl.load(other_loss).to(tl.float64) * n_token)


@triton.jit
def _place(experts, ends, before, rows, sizes, FORM: constexpr):
    token_T, e_E, live_T, real_E, _, inside_TE = block(sizes, FORM)
    rank_TE = rank_of(experts, token_T, live_T, e_E, real_E, FORM)
    end_E = tl.load(ends + e_E, mask=real_E, other=0)
    first_E = tl.load(ends + e_E - 1, mask=real_E & (e_E > 0), other=0)
    before_E = tl.load(before + tl.program_id(0).to(tl.int64) * FORM.experts + e_E)
    where = (token_T, e_E, live_T, live_T, real_E, inside_TE)
    _store_rows(rows, rank_TE, rank_TE < FORM.top_k, before_E, end_E - first_E, where, FORM)


@triton.jit
def _sum_up_and_place(parts, experts, sums, other_loss, sizes, FORM: constexpr):
    # The last program is the first of these, the others are the second, which add up the blocks' counts themselves.
    n_block = sizes.n_sequence * sizes.n_block
    if tl.program_id(0) == n_block:
        _sum_up(parts, sums, other_loss, sizes, FORM)
    else:
        token_T, e_E, live_T, real_E, _, inside_TE = block(sizes, FORM)
        rank_TE = rank_of(experts, token_T, live_T, e_E, real_E, FORM)
        count_E = tl.full((FORM.experts,), 0, tl.int32)
        before_E = count_E
        for start in range(0, n_block, FORM.blocks):
            block_B = start + tl.arange(0, FORM.blocks)
            count_BE = parts + block_B[:, None] * (_ROWS * FORM.experts) + e_E[None, :]
            live_BE = (block_B < n_block)[:, None] & real_E[None, :]
            count_BE = tl.load(count_BE, mask=live_BE, other=0.0).to(tl.int32)
            count_E += tl.sum(count_BE, 0)
            before_E += tl.sum(tl.where((block_B < tl.program_id(0))[:, None], count_BE, 0), 0)
        where = (token_T, e_E, live_T, live_T, real_E, inside_TE)
        _store_rows(sums.rows, rank_TE, rank_TE < FORM.top_k, before_E, count_E, where, FORM)


@triton.jit
def _route_backward(given, upstream, results, sizes, FORM: constexpr):
    experts, ends, slopes, dweights, scale = upstream
    dlogits, dspread = results
    token_T, e_E, live_T, real_E, at_TE, inside_TE = block(sizes, FORM)
    z_TE, noise_TE, std_TE, v_TE = values(given, at_TE, inside_TE, real_E)
    p_TE, lse_T = softmax(z_TE)
    s_TE = tl.sigmoid(z_TE) if FORM.score == "sigmoid" else p_TE
    scale = tl.load(scale).to(tl.float32)
    n_token = tl.maximum(tl.load(ends + sizes.n_expert - 1).to(tl.float32) / FORM.top_k, 1.0)
    rank_TE = rank_of(experts, token_T, live_T, e_E, real_E, FORM)
    picked_TE = rank_TE < FORM.top_k
    goal_TE = token_T[:, None] * FORM.top_k + rank_TE
    dw_TE = tl.load(dweights + goal_TE, mask=picked_TE, other=0.0).to(tl.float32) * FORM.scale
    if FORM.importance != 0.0:
        slope_E = tl.load(slopes + sizes.n_expert + e_E, mask=real_E, other=0.0) * scale
        dw_TE += tl.where(picked_TE, slope_E[None, :], 0.0)
    w_TE, total_T = gate_values(s_TE, v_TE, picked_TE, FORM)
    slope_E = tl.full((FORM.experts,), 0.0, tl.float32)
    if FORM.balancing != 0.0:
        slope_E += tl.load(slopes + e_E, mask=real_E, other=0.0)
    if FORM.sequence != 0.0:
        row = 3 + tl.program_id(0) // sizes.n_block
        slope_E += tl.load(slopes + row * sizes.n_expert + e_E, mask=real_E, other=0.0)
    slope_E *= scale / n_token
    if FORM.score == "chosen":
        dv_TE = w_TE * (dw_TE - tl.sum(w_TE * dw_TE, 1)[:, None])
        dz_TE = p_TE * (slope_E[None, :] - tl.sum(p_TE * slope_E[None, :], 1)[:, None])
        if given.noise_TE is not None:
            dstd_TE = tl.full(dz_TE.shape, 0.0, tl.float32)
            if FORM.load != 0.0:
                margin_TE, last_in_T, first_out_T = margins(z_TE, std_TE, v_TE, picked_TE, real_E)
                slope_E = tl.load(slopes + 2 * sizes.n_expert + e_E, mask=real_E, other=0.0) * scale
                q_TE = slope_E[None, :] * 0.3989422804014327 * tl.exp(-0.5 * margin_TE * margin_TE) / std_TE
                dz_TE += q_TE
                dstd_TE -= q_TE * margin_TE
                # The limits are noisy logits of other experts, which have gradients too.
                of_chosen_T = tl.sum(tl.where(picked_TE, q_TE, 0.0), 1)
                of_others_T = tl.sum(tl.where(picked_TE, 0.0, q_TE), 1)
                last_T = tl.argmin(tl.where(picked_TE, v_TE, float("inf")), 1)
                first_T = tl.argmax(tl.where(picked_TE, float("-inf"), v_TE), 1)
                dv_TE -= tl.where(e_E[None, :] == first_T[:, None], of_chosen_T[:, None], 0.0)
                dv_TE -= tl.where(e_E[None, :] == last_T[:, None], of_others_T[:, None], 0.0)
            dstd_TE += dv_TE * noise_TE
            spread_TE = tl.load(given.spread_TE + at_TE, mask=inside_TE, other=0.0)
            slope_TE = tl.where(spread_TE > 20.0, 1.0, tl.sigmoid(spread_TE))
            dspread_TE = tl.where(text(given, token_T, live_T)[:, None], dstd_TE * slope_TE, 0.0)
            tl.store(dspread + at_TE, dspread_TE, mask=inside_TE)
        dz_TE += dv_TE
    else:
        ds_TE = dw_TE
        if FORM.normalize:
            ds_TE = tl.where(picked_TE, (dw_TE - tl.sum(dw_TE * w_TE, 1)[:, None]) / total_T[:, None], 0.0)
        if FORM.score == "sigmoid":
            if FORM.balancing != 0.0 or FORM.sequence != 0.0:
                sum_T1 = (tl.sum(s_TE, 1) + 1e-20)[:, None]
                ds_TE += (slope_E[None, :] - tl.sum(slope_E[None, :] * s_TE, 1)[:, None] / sum_T1) / sum_T1
            dz_TE = ds_TE * s_TE * (1.0 - s_TE)
        else:
            ds_TE += slope_E[None, :]
            dz_TE = s_TE * (ds_TE - tl.sum(s_TE * ds_TE, 1)[:, None])
    if FORM.z != 0.0:
        dz_TE += (2.0 * FORM.z * scale / n_token) * lse_T[:, None] * p_TE
    # Numbers of padding may be anything on the way.
    dz_TE = tl.where(text(given, token_T, live_T)[:, None], dz_TE, 0.0)
    tl.store(dlogits + at_TE, dz_TE, mask=inside_TE)
