"""The rotary embedding of queries and keys in Triton, in one launch each way.

Torch's operators take six launches for the queries and six for the keys, and write float32 copies of both. Here each
element is read once and rounded once: arithmetic is float32.

Programs that follow each other rotate different heads of the same tokens, which stand side by side in the projection
that queries and keys are views of, and read the same rows of the tables.

Shape legend: B batch, H heads, T tokens, d head size, N rotated elements of a head, R rows (tokens times heads) of a
block, P pairs of rotated elements, C elements that are not rotated.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.triton_launch import ceil_div, launch, power_of_two

if TYPE_CHECKING:
    # To a type checker a constant of a kernel is whatever it was called with.
    constexpr = Any
else:
    from triton.language import constexpr


class _View(NamedTuple):
    data: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    n_head: Any


class _Tables(NamedTuple):
    cos: Any
    sin: Any
    stride_b: Any
    stride_t: Any
    stride_n: Any


class _Form(NamedTuple):
    # Sizes of a head and of a block; how pairs stand; whether to turn back.
    head_size: int
    rotated: int
    tokens: int
    heads: int
    pairs: int
    rest: int
    interleave: bool
    backward: bool


def rotate(
    sources: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    interleave: bool,
    backward: bool = False,
) -> None:
    """Rotate queries and keys.

    Args:
        sources: Queries, (B, H, T, d), and keys, (B, G, T, d), of one dtype.
        targets: Where to write, same shapes and dtype, the elements of a head contiguous.
        tables: Cosines and sines, (1 or B, T, N), N even and at most d, of the same strides.
        interleave: Whether the pairs that rotate stand next to each other in queries and keys; the results have their
            first elements in the first half and the second ones in the other.
        backward: Whether `sources` are gradients of the results, to write those of queries and keys.
    """
    (q_BHTd, k_BGTd), (cos, sin) = (x if x.stride(-1) == 1 else x.contiguous() for x in sources), tables
    B, H, T, d = q_BHTd.shape
    form = _form(d, cos.size(-1), interleave, backward)
    blocks = ceil_div(H, form.heads) + ceil_div(k_BGTd.size(1), form.heads)
    grid = (B * ceil_div(T, form.tokens) * blocks,)
    strides = (0 if cos.size(0) == 1 else cos.stride(0), *cos.stride()[1:])
    views = (_view(x) for x in (q_BHTd, targets[0], k_BGTd, targets[1]))
    launch(_rotate, grid, (*views, _Tables(cos, sin, *strides), T, form), warps=4)


def _view(x: Tensor) -> _View:
    stride_b, stride_h, stride_t, _ = x.stride()
    return _View(x, stride_b, stride_h, stride_t, x.size(1))


@functools.cache
def _form(head_size: int, rotated: int, interleave: bool, backward: bool) -> _Form:
    pairs = power_of_two(rotated // 2)
    rest = power_of_two(head_size - rotated) if rotated < head_size else 0
    # Eight elements of each half for each thread, which are 16 bytes in 16 bits.
    rows = max(1024 // max(pairs, rest // 2), 4)
    return _Form(head_size, rotated, rows // 4, 4, pairs, rest, interleave, backward)


@triton.jit(do_not_specialize=["T"])
def _rotate(q, q_out, k, k_out, tables, T, FORM: constexpr):
    n_block_q = tl.cdiv(q.n_head, FORM.heads)
    n_block = n_block_q + tl.cdiv(k.n_head, FORM.heads)
    n_tile = tl.cdiv(T, FORM.tokens)
    block, tile = tl.program_id(0) % n_block, tl.program_id(0) // n_block
    batch, first = tile // n_tile, tile % n_tile * FORM.tokens
    if block < n_block_q:
        _rotate_block(q, q_out, tables, (batch, first, T), block, FORM)
    else:
        _rotate_block(k, k_out, tables, (batch, first, T), block - n_block_q, FORM)


@triton.jit
def _rotate_block(x, out, tables, tokens, block, FORM: constexpr):
    batch, first, T = tokens
    batch = batch.to(tl.int64)
    row_R = tl.arange(0, FORM.tokens * FORM.heads)
    token_R, head_R = first + row_R // FORM.heads, block * FORM.heads + row_R % FORM.heads
    live_R1 = ((token_R < T) & (head_R < x.n_head))[:, None]
    x_R1, out_R1 = _rows_of(x, batch, head_R, token_R), _rows_of(out, batch, head_R, token_R)
    pair_1P = tl.arange(0, FORM.pairs)[None, :]
    inside_RP = live_R1 & (pair_1P < FORM.rotated // 2)
    x1_RP, x2_RP = _load_pairs(x_R1, live_R1, FORM.interleave and not FORM.backward, FORM)
    table_R1 = (batch * tables.stride_b + token_R.to(tl.int64) * tables.stride_t)[:, None]
    table_RP = table_R1 + pair_1P * tables.stride_n
    second: constexpr = FORM.rotated // 2
    cos1_RP = tl.load(tables.cos + table_RP, mask=inside_RP, other=0.0).to(tl.float32)
    sin1_RP = tl.load(tables.sin + table_RP, mask=inside_RP, other=0.0).to(tl.float32)
    table_RP += second * tables.stride_n
    cos2_RP = tl.load(tables.cos + table_RP, mask=inside_RP, other=0.0).to(tl.float32)
    sin2_RP = tl.load(tables.sin + table_RP, mask=inside_RP, other=0.0).to(tl.float32)
    if FORM.rest > 0:
        rest_1C = tl.arange(0, FORM.rest)[None, :]
        left_RC = live_R1 & (rest_1C < FORM.head_size - FORM.rotated)
        rest_RC = tl.load(x_R1 + FORM.rotated + rest_1C, mask=left_RC)
        tl.store(out_R1 + FORM.rotated + rest_1C, rest_RC, mask=left_RC)
    if FORM.backward:
        y1_RP = x1_RP * cos1_RP + x2_RP * sin2_RP
        y2_RP = x2_RP * cos2_RP - x1_RP * sin1_RP
    else:
        y1_RP = x1_RP * cos1_RP - x2_RP * sin1_RP
        y2_RP = x2_RP * cos2_RP + x1_RP * sin2_RP
    _store_pairs(out_R1, (y1_RP, y2_RP), live_R1, out.data.dtype.element_ty, FORM)


@triton.jit
def _rows_of(x, batch, head_R, token_R):
    # Past 2^31 elements too.
    start_R = head_R.to(tl.int64) * x.stride_h + token_R.to(tl.int64) * x.stride_t
    return (x.data + batch * x.stride_b + start_R)[:, None]


@triton.jit
def _load_pairs(x_R1, live_R1, INTERLEAVE: constexpr, FORM: constexpr):
    # The first and the second elements of the pairs, float32.
    if INTERLEAVE:
        n_1N = tl.arange(0, 2 * FORM.pairs)[None, :]
        x_RN = tl.load(x_R1 + n_1N, mask=live_R1 & (n_1N < FORM.rotated), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x_RN, (FORM.tokens * FORM.heads, FORM.pairs, 2)))
    else:
        pair_1P = tl.arange(0, FORM.pairs)[None, :]
        inside_RP = live_R1 & (pair_1P < FORM.rotated // 2)
        x1_RP = tl.load(x_R1 + pair_1P, mask=inside_RP, other=0.0)
        x2_RP = tl.load(x_R1 + FORM.rotated // 2 + pair_1P, mask=inside_RP, other=0.0)
        return x1_RP.to(tl.float32), x2_RP.to(tl.float32)


@triton.jit
def _store_pairs(out_R1, y, live_R1, DTYPE: constexpr, FORM: constexpr):
    if FORM.interleave and FORM.backward:
        n_1N = tl.arange(0, 2 * FORM.pairs)[None, :]
        tl.store(out_R1 + n_1N, tl.interleave(y[0], y[1]).to(DTYPE), mask=live_R1 & (n_1N < FORM.rotated))
    else:
        pair_1P = tl.arange(0, FORM.pairs)[None, :]
        inside_RP = live_R1 & (pair_1P < FORM.rotated // 2)
        tl.store(out_R1 + pair_1P, y[0].to(DTYPE), mask=inside_RP)
        tl.store(out_R1 + FORM.rotated // 2 + pair_1P, y[1].to(DTYPE), mask=inside_RP)
