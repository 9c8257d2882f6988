"""A router's product at nearly the accuracy of float32, reading tokens once in their own dtype.

A gate has so few outputs that its product should take no longer than reading the tokens. Tensor Cores achieve that: a
float32 number is exactly the sum of three bfloat16 numbers, a float16 number of two, so the products of these parts,
added up in float32, are float32's product (products below its last bit are left out). On the ordinary cores, float32
products of 16k tokens of width 768 would take an H100 5 us at full speed with 8 experts, half as long as reading, but
40 us with 64. Cards without bfloat16, and AMD's, use them.

`_project` also writes the tokens in 16 bits for the experts. `_project_backward` reads a block of tokens once and
computes the block's share of the weights' gradient, and the tokens' gradient, to which it adds those of the experts;
torch adds up the shares. There are no atomics, and blocks depend on shapes alone, so two runs give the same bits.

Shape legend: T tokens, D model width, E experts, B blocks of tokens, M some tokens of a block, N a block of D, K a step
of the sum over D.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch, power_of_two
from litgpt_moe_ext.moe.kernels.routing.router_product import ProjectionBackward
from litgpt_moe_ext.moe.kernels.triton import common
from litgpt_moe_ext.moe.kernels.triton.common import Rows, constexpr, dot, rows_of

# Least and largest number of blocks of tokens: enough to occupy a card, and few enough that adding up their partial
# sums costs little. With 16k tokens of width 768, 64 and 128 blocks take 43 and 47 us on an H200.
_BLOCKS, _MOST_BLOCKS = 64, 128
# Tokens and columns of a block by experts (the power of two): for 16-bit tokens, for float32. None of them spills
# registers worth mentioning; none was chosen on a card.
_Blocks = dict[int, tuple[tuple[int, int], tuple[int, int]]]


class _Tables(NamedTuple):
    # Hopper's Tensor Cores read operands from shared memory, which leaves registers free. Those of Blackwell for data
    # centres are not used: where a loop adds several products to one sum, Triton up to 3.8 computes wrong results
    # (triton-lang/triton#10821), sometimes only by chance (#9871, #10590). Products of fewer than 64 rows, and all
    # products in a program of two warps, use the instructions that every card has.
    usual: _Blocks
    hopper: _Blocks
    blackwell: _Blocks


_FORWARD = _Tables(
    usual={16: ((64, 64), (64, 64)), 32: ((64, 64), (64, 32)), 64: ((64, 32), (64, 32))},
    hopper={16: ((64, 128), (64, 64)), 32: ((64, 64), (64, 64)), 64: ((64, 64), (64, 64))},
    blackwell={16: ((32, 32), (32, 64)), 32: ((32, 64), (32, 32)), 64: ((32, 32), (16, 32))},
)
_BACKWARD = _Tables(
    usual={16: ((32, 128), (32, 128)), 32: ((32, 64), (32, 32)), 64: ((32, 32), (32, 32))},
    hopper={16: ((32, 128), (32, 128)), 32: ((32, 64), (32, 32)), 64: ((64, 64), (64, 32))},
    blackwell={16: ((32, 128), (32, 128)), 32: ((32, 64), (32, 32)), 64: ((16, 32), (16, 32))},
)
# For widths that blocks do not divide, and for products without Tensor Cores.
_ODD, _IEEE = (32, 32), (16, 32)
_PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}


class _Gate(NamedTuple):
    # The weights and the sizes.
    weight: Rows
    n_token: Any
    n_expert: Any
    width: Any


class _Form(NamedTuple):
    # Sizes of blocks, whether they divide D, the number of parts of a number, and how parts are multiplied.
    experts: int
    rows: int
    inner: int
    even: bool
    x_parts: int
    weight_parts: int
    precision: str
    split: bool
    warps: int
    need_x: bool = False
    need_weight: bool = False


class _Gradients(NamedTuple):
    # Gradients of the logits and of the experts' tokens (or None), and the results.
    logits: Any
    routed: Any
    shared: Any
    x: Any
    weight_sums: Any


def project(x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `x_TD @ weight_ED.T`, (T, E), float32, and `x_TD` in `dtype`; the latter empty if it has that dtype.

    Args:
        x_TD: Tokens, float32 or 16-bit.
        weight_ED: Weights, float32 or 16-bit.
        dtype: Dtype of the second result.
    """
    logits_TE = x_TD.new_empty(x_TD.size(0), weight_ED.size(0), dtype=torch.float32)
    narrows = dtype != x_TD.dtype
    narrow_TD = x_TD.new_empty(x_TD.shape if narrows else 0, dtype=dtype)
    form = _form(x_TD, weight_ED, _FORWARD)
    grid = (ceil_div(x_TD.size(0), form.rows),)
    arguments = (rows_of(x_TD), _gate(x_TD, weight_ED), logits_TE, narrow_TD if narrows else None, form)
    launch(_project, grid, arguments, form.warps, stages=3)
    return logits_TE, narrow_TD


def project_backward(call: ProjectionBackward) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and weights in their dtypes; empty where they are not needed."""
    x_TD, weight_ED, need_x, need_weight = call.x_TD, call.weight_ED, call.need_x, call.need_weight
    (n_token, width), n_expert = x_TD.shape, weight_ED.size(0)
    form = _form(x_TD, weight_ED, _BACKWARD)._replace(need_x=need_x, need_weight=need_weight)
    longest = 256 if form.experts <= 32 else 512
    per_block = max(min(longest, ceil_div(n_token, _BLOCKS)), ceil_div(n_token, _MOST_BLOCKS))
    per_block = form.rows * max(ceil_div(per_block, form.rows), 1)
    n_block = ceil_div(n_token, per_block)
    dx_TD = x_TD.new_empty(x_TD.shape if need_x else 0)
    sums_BED = call.dlogits_TE.new_empty((n_block, n_expert, width) if need_weight else 0)
    routed_TD, shared_TD = (None if grad is None else grad.contiguous() for grad in (call.routed_TD, call.shared_TD))
    gradients = _Gradients(call.dlogits_TE.contiguous(), routed_TD, shared_TD, dx_TD, sums_BED)
    arguments = (rows_of(x_TD), _gate(x_TD, weight_ED), gradients, per_block, form)
    launch(_project_backward, (ceil_div(width, form.inner), n_block), arguments, form.warps, stages=3)
    return dx_TD, (sums_BED.sum(0) if need_weight else sums_BED).to(weight_ED.dtype)


def _gate(x_TD: Tensor, weight_ED: Tensor) -> _Gate:
    return _Gate(rows_of(weight_ED), x_TD.size(0), *weight_ED.shape)


def _form(x_TD: Tensor, weight_ED: Tensor, tables: _Tables) -> _Form:
    capability, width = common.capability_of(x_TD.device), x_TD.size(1)
    # Tensor Cores multiply at least 16.
    experts = max(power_of_two(weight_ED.size(0)), 16)
    split = capability is None or (capability >= (8, 0) and torch.version.hip is None)
    block, warps = _IEEE, 4
    if split:
        major = 0 if capability is None else capability[0]
        table = {9: tables.hopper, 10: tables.blackwell}.get(major, tables.usual)
        block = table[min(experts, 64)][x_TD.dtype.itemsize > 2]
        if width % block[1]:
            block = min(block[0], _ODD[0]), _ODD[1]
        # The gradient of the weights has one row per expert.
        warps = 2 if tables is _BACKWARD and major == 10 and experts >= 64 else 4
    parts = (_PARTS[x_TD.dtype], _PARTS[weight_ED.dtype])
    precision = "widened" if capability is None else "ieee"
    return _Form(experts, *block, width % block[1] == 0, *parts, precision, split, warps)


@triton.jit
def _parts(x, FORM: constexpr):
    # Parts that add up to `x`, each with the leading bits of the remainder; parts that are always 0 are not used.
    if FORM.split:
        first = x.to(tl.bfloat16)
        rest = x.to(tl.float32) - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)
    else:
        whole = x.to(tl.float32)
        return whole, whole, whole


@triton.jit
def _add_product(a, b, total, A: constexpr, B: constexpr, BITS: constexpr, FORM: constexpr):
    # `total + a @ b` for operands in A and B parts, accurate to 16 bits or to float32's 24. Small products come first.
    if FORM.split:
        if BITS == 24:
            if B == 3:
                total = dot(a[0], b[2], total, FORM)
            if A == 3:
                total = dot(a[2], b[0], total, FORM)
            if A >= 2 and B >= 2:
                total = dot(a[1], b[1], total, FORM)
        if B >= 2:
            total = dot(a[0], b[1], total, FORM)
        if A >= 2:
            total = dot(a[1], b[0], total, FORM)
    return dot(a[0], b[0], total, FORM)


@triton.jit
def _project(x, gate, out, narrow, FORM: constexpr):
    first = tl.program_id(0) * FORM.rows
    token_M, e_E, d_K = tl.arange(0, FORM.rows), tl.arange(0, FORM.experts), tl.arange(0, FORM.inner)
    # Tokens past the last are computed from the last and not stored.
    near_M = tl.minimum(token_M, gate.n_token - 1 - first)
    real_E = e_E < gate.n_expert
    live_M = token_M < gate.n_token - first
    x_start = x.data + first.to(tl.int64) * x.stride
    weight_start = gate.weight.data
    x_MK = near_M[:, None] * x.stride + d_K[None, :]
    weight_KE = e_E[None, :] * gate.weight.stride + d_K[:, None]
    sum_ME = tl.full((FORM.rows, FORM.experts), 0.0, tl.float32)
    for d in range(0, gate.width, FORM.inner):
        if FORM.even:
            a = tl.load(x_start + x_MK)
            b = tl.load(weight_start + weight_KE, mask=real_E[None, :], other=0.0)
            inside_MK = live_M[:, None]
        else:
            rest_K = d_K < gate.width - d
            inside_MK = live_M[:, None] & rest_K[None, :]
            a = tl.load(x_start + x_MK, mask=rest_K[None, :], other=0.0)
            b = tl.load(weight_start + weight_KE, mask=rest_K[:, None] & real_E[None, :], other=0.0)
        if narrow is not None:
            narrow_MK = narrow + first.to(tl.int64) * gate.width + token_M[:, None] * gate.width + (d + d_K)[None, :]
            tl.store(narrow_MK, a.to(narrow.dtype.element_ty), mask=inside_MK)
        # A sum for each step: Tensor Cores truncate what they add to, 20 times the error of float32 after 768 terms.
        product_ME = tl.full((FORM.rows, FORM.experts), 0.0, tl.float32)
        a_parts, b_parts = _parts(a, FORM), _parts(b, FORM)
        sum_ME += _add_product(a_parts, b_parts, product_ME, FORM.x_parts, FORM.weight_parts, 24, FORM)
        x_start += FORM.inner
        weight_start += FORM.inner
    out_start = out + first.to(tl.int64) * gate.n_expert
    inside_ME = live_M[:, None] & real_E[None, :]
    tl.store(out_start + token_M[:, None] * gate.n_expert + e_E[None, :], sum_ME, mask=inside_ME)


@triton.jit
def _added(total_MN, grad, first, at_MN, inside_MN):
    if grad is None:
        return total_MN
    else:
        return total_MN + tl.load(grad + first + at_MN, mask=inside_MN, other=0.0).to(tl.float32)


@triton.jit
def _project_backward(x, gate, gradients, per_block, FORM: constexpr):
    block = tl.program_id(1)
    first = block * per_block
    n_token = tl.minimum(per_block, gate.n_token - first)
    e_E, d_N = tl.arange(0, FORM.experts), tl.program_id(0) * FORM.inner + tl.arange(0, FORM.inner)
    real_E, real_N = e_E < gate.n_expert, d_N < gate.width
    first = first.to(tl.int64)
    x_start = x.data + first * x.stride
    dlogits_start = gradients.logits + first * gate.n_expert
    inside_EN = real_E[:, None] & real_N[None, :]
    weight_EN = gate.weight.data + e_E[:, None] * gate.weight.stride + d_N[None, :]
    weight = _parts(tl.load(weight_EN, mask=inside_EN, other=0.0), FORM)
    sum_EN = tl.full((FORM.experts, FORM.inner), 0.0, tl.float32)
    for start in range(0, n_token, FORM.rows):
        token_M = start + tl.arange(0, FORM.rows)
        live_M = token_M < n_token
        dlogits_ME = dlogits_start + token_M[:, None] * gate.n_expert + e_E[None, :]
        dy_ME = tl.load(dlogits_ME, mask=live_M[:, None] & real_E[None, :], other=0.0)
        dy = _parts(dy_ME, FORM)
        if FORM.need_weight:
            # Tokens past the last have no gradient, but must not be NaN.
            near_M = tl.minimum(token_M, n_token - 1)
            x_MN = x_start + near_M[:, None] * x.stride + d_N[None, :]
            b_MN = tl.load(x_MN) if FORM.even else tl.load(x_MN, mask=real_N[None, :], other=0.0)
            dy_t = (tl.trans(dy[0]), tl.trans(dy[1]), tl.trans(dy[2]))
            sum_EN = _add_product(dy_t, _parts(b_MN, FORM), sum_EN, 3, FORM.x_parts, 24, FORM)
        if FORM.need_x:
            # A gradient that is rounded to 16 bits needs no more.
            BITS: tl.constexpr = 24 if FORM.x_parts == 3 else 16  # pyrefly: ignore[bad-assignment]  # kernels have no types
            dx_MN = tl.full((FORM.rows, FORM.inner), 0.0, tl.float32)
            at_MN, inside_MN = token_M[:, None] * gate.width + d_N[None, :], live_M[:, None] & real_N[None, :]
            # Before the product, which needs registers. What Tensor Cores truncate is below the last of 16 bits.
            dx_MN = _added(dx_MN, gradients.routed, first * gate.width, at_MN, inside_MN)
            dx_MN = _added(dx_MN, gradients.shared, first * gate.width, at_MN, inside_MN)
            dx_MN = _add_product(dy, weight, dx_MN, 3, FORM.weight_parts, BITS, FORM)
            goal_MN = gradients.x + first * gate.width + at_MN
            tl.store(goal_MN, dx_MN.to(gradients.x.dtype.element_ty), mask=inside_MN)
    if FORM.need_weight:
        sums_EN = (
            gradients.weight_sums
            + block.to(tl.int64) * gate.n_expert * gate.width
            + e_E[:, None] * gate.width
            + d_N[None, :]
        )
        tl.store(sums_EN, sum_EN, mask=inside_EN)
