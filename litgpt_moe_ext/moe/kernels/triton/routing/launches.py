"""A router's decision, its losses and its statistics in two to four launches, and their backward pass in one.

With torch's operators (`litgpt_moe_ext.moe.routing.router`, the reference) this takes twenty to forty launches per
layer, each of a few microseconds, longer than the arithmetic. Everything between loading and storing is float32, sums
over all tokens are float64; blocks are added in a fixed order, so two runs give the same bits.

1. `route_block` chooses for a block of tokens and sums up the block. Without training, a single block needs nothing
   else.
2. `sum_up`, a single program, adds up the blocks: tokens per expert, losses, their slopes, and how many rows of an
   expert precede a block. If it would have much to read (many experts and tokens), `sum_blocks` first adds up a few
   experts and one kind of numbers in each program, and leaves one block per sequence.
3. `place_rows` sorts the rows by expert, by counting. If there are few blocks, each counts the others itself, in the
   same launch as 2.

A block has tokens of one sequence only where a loss is per sequence; elsewhere all tokens count as one sequence.

Shape legend: T tokens (in a kernel: of a block), E experts, K chosen experts per token, R = T * K routed rows,
S sequences, B blocks of a sequence, N numbers of a tally, L rows of slopes.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch
from litgpt_moe_ext.moe.kernels.routing.fused_router import Given, Rule, block_shape
from litgpt_moe_ext.moe.kernels.triton.routing.backward import route_block_backward
from litgpt_moe_ext.moe.kernels.triton.routing.blocks import ROWS
from litgpt_moe_ext.moe.kernels.triton.routing.decision import route_block, route_block_evenly
from litgpt_moe_ext.moe.kernels.triton.routing.rows import place_rows, sum_up_and_place
from litgpt_moe_ext.moe.kernels.triton.routing.sums import COLUMNS, sum_blocks, sum_up

# More numbers than this (2 MiB) are added up by several programs: one would read them for longer than a launch takes.
_MOST_FOR_ONE = 2**19
# With up to so many blocks, of up to so many experts, each block counts the others itself.
_FEW_BLOCKS, _FEW_EXPERTS = 64, 128


class _Sizes(NamedTuple):
    # Numbers of tokens and blocks are per sequence.
    n_token: Any
    n_expert: Any
    n_block: Any
    n_sequence: Any


class _Chosen(NamedTuple):
    weights: Any
    experts: Any


class _Form(NamedTuple):
    # A rule, and what else the kernels need.
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
    # `before`, the rows of each expert before each block, is None if they have been placed already or are not needed.
    counts: Any
    ends: Any
    before: Any
    rows: Any
    slopes: Any
    tally: Any


class _Alone(NamedTuple):
    # The sums of a single block. A type of its own, since Triton before 3.7 cannot test a group for None if it holds a
    # None.
    counts: Any
    ends: Any
    rows: Any


def route(given: Given, rule: Rule, trains: bool) -> tuple[Tensor, ...]:
    """Decide for all tokens; return the fields of `fused_router.Decision`, in order."""
    n_token, n_expert = given.logits_TE.shape
    new = functools.partial(given.logits_TE.new_empty, dtype=torch.float32)
    form = _form(rule, n_expert, trains)
    sizes, S = _sizes(n_token, n_expert, rule.sequences, form), rule.sequences
    chosen = _Chosen(new(n_token, rule.top_k), new(n_token, rule.top_k, dtype=torch.int64))
    parts = new(S * sizes.n_block, ROWS.value, form.experts)
    n_loss = sum(coef != 0 for coef in rule.coefs) + (given.other_loss is not None)
    sums = _Sums(
        counts=new(n_expert, dtype=torch.int64),
        ends=new(n_expert, dtype=torch.int32),
        before=None,
        rows=new(n_token * rule.top_k, dtype=torch.int64),
        slopes=new(3 + (S if rule.sequence else 0), n_expert),
        tally=new(n_expert + 3 + n_loss if trains else 0, dtype=torch.float64),
    )
    kernel = route_block_evenly if rule.score == "even" else route_block
    n_block = S * sizes.n_block
    # A program has at most 1024 threads. AMD's warps have up to 64, each with more registers.
    warps = _warps(form, 32 if torch.version.hip is None else 16)
    # A few tokens without statistics, as in generation, take a single program.
    alone = not trains and n_block == 1
    whole = _Alone(sums.counts, sums.ends, sums.rows) if alone else None
    launch(kernel, (n_block,), (given, chosen, whole, parts, sizes, form), warps)
    if not alone and n_block <= _FEW_BLOCKS and form.experts <= _FEW_EXPERTS:
        arguments = (parts, chosen.experts, sums, given.other_loss, sizes, form)
        launch(sum_up_and_place, (n_block + 1,), arguments, _warps(form))
    elif not alone:
        before_SBE = sums.ends.new_empty(n_block * form.experts)
        _add_up(parts, sums._replace(before=before_SBE), given.other_loss, sizes, form)
        launch(place_rows, (n_block,), (chosen.experts, sums.ends, before_SBE, sums.rows, sizes, form), _warps(form))
    return *chosen, sums.counts, sums.ends, sums.rows, sums.slopes, sums.tally


def _add_up(parts: Tensor, sums: _Sums, other_loss: Tensor | None, sizes: _Sizes, form: _Form) -> None:
    warps = _warps(form)
    # With more experts `sum_up` spills registers unless it adds up one block at a time.
    if parts.numel() > _MOST_FOR_ONE or form.experts > 512:
        blocks, parts = parts, parts.new_empty(sizes.n_sequence, 5, form.experts, dtype=torch.float64)
        grid = (ceil_div(form.experts, COLUMNS.value), (5 if form.load else 4) if form.trains else 1)
        launch(sum_blocks, grid, (blocks, parts, sums.before, sizes, form), warps=4)
        sums, sizes, form, warps = sums._replace(before=None), sizes._replace(n_block=1), form._replace(blocks=1), 4
    launch(sum_up, (1,), (parts, sums, other_loss, sizes, form), warps)


def route_backward(given: Given, rule: Rule, *upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the logits, and of the logits of the noise (empty without noise).

    Args:
        given: Inputs of the decision.
        rule: Its rule.
        *upstream: The chosen experts, where the rows of each expert end, and slopes of the losses, all as `route`
            returned them; the gradient of the gate values, contiguous; and the scale of the losses, a scalar.
    """
    n_token, n_expert = given.logits_TE.shape
    dlogits_TE = torch.empty_like(given.logits_TE)
    dspread_TE = dlogits_TE.new_empty(0) if given.spread_TE is None else torch.empty_like(dlogits_TE)
    form = _form(rule, n_expert, True)
    sizes = _sizes(n_token, n_expert, rule.sequences, form)
    arguments = (given, upstream, (dlogits_TE, dspread_TE), sizes, form)
    launch(route_block_backward, (rule.sequences * sizes.n_block,), arguments, warps=_warps(form))
    return dlogits_TE, dspread_TE


def _form(rule: Rule, n_expert: int, trains: bool) -> _Form:
    rows, width = block_shape(n_expert)
    # As many blocks are added up at a time as fit into registers.
    return _Form(*rule[:-1], rows, width, min(32, 16384 // width), trains)


def _warps(form: _Form, most: int = 8) -> int:
    # So many that no kernel spills registers. More for few experts would change the order of additions.
    return 4 if form.experts <= 256 else min(most, form.experts // 32)


def _sizes(n_token: int, n_expert: int, n_sequence: int, form: _Form) -> _Sizes:
    n_token //= n_sequence
    return _Sizes(n_token, n_expert, ceil_div(n_token, form.rows), n_sequence)
