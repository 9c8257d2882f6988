"""The rotary embedding of queries and keys in Triton, in one launch each way.

Torch's operators take six launches for the queries and six for the keys, and write float32 copies of both. Here each
element is read once and rounded once; arithmetic is float32. The backward pass can write straight into the gradient of
the projection of which queries and keys are views, and copy the gradient of the values there, which saves a launch.

Consecutive programs rotate different heads of the same tokens, which are adjacent in the projection, and read the same
rows of the tables.

Shape legend: B batch, H heads, T tokens, d head size, N rotated elements of a head, R rows (tokens times heads) of a
block, P pairs of rotated elements, C elements that are copied.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch, power_of_two

if TYPE_CHECKING:
    # To a type checker a constant of a kernel is whatever it was called with.
    constexpr = Any
else:
    from triton.language import constexpr


class _Heads(NamedTuple):
    # The source, the target, and the number of heads.
    data: Any
    stride_b: Any
    stride_h: Any
    stride_t: Any
    out: Any
    out_stride_b: Any
    out_stride_h: Any
    out_stride_t: Any
    n_head: Any


class _Tables(NamedTuple):
    cos: Any
    sin: Any
    stride_b: Any
    stride_t: Any
    stride_n: Any


class _Form(NamedTuple):
    # Sizes of a head and of a block; whether pairs are interleaved; whether to rotate back; whether to copy values.
    head_size: int
    rotated: int
    tokens: int
    heads: int
    pairs: int
    interleave: bool
    backward: bool
    with_values: bool


def rotate(
    sources: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    tables: tuple[Tensor, Tensor],
    interleave: bool,
    backward: bool = False,
) -> None:
    """Rotate queries and keys, and copy values.

    Args:
        sources: Queries, (B, H, T, d), keys, (B, G, T, d), and, to copy them, values, of one dtype.
        targets: Where to write, same shapes and dtype; the elements of a head are contiguous.
        tables: Cosines and sines, (1 or B, T, N), N even and at most d, of the same strides.
        interleave: Whether the elements of a pair are adjacent in queries and keys; in the results the first elements
            of all pairs come before the second ones.
        backward: Whether `sources` are gradients of the results, and the gradients of queries and keys are written.
    """
    cos, sin = tables
    B, _, T, d = sources[0].shape
    form = _form(d, cos.size(-1), interleave, backward, len(sources) == 3)
    blocks = sum(ceil_div(x.size(1), form.heads) for x in sources)
    heads = [_heads(x, out) for x, out in zip(sources, targets, strict=True)]
    strides = (0 if cos.size(0) == 1 else cos.stride(0), *cos.stride()[1:])
    q, k, v = heads if form.with_values else (*heads, heads[1])
    arguments = (q, k, v, _Tables(cos, sin, *strides), T, form)
    launch(_rotate, (B * ceil_div(T, form.tokens) * blocks,), arguments, warps=4)


def _heads(x: Tensor, out: Tensor) -> _Heads:
    x = x if x.stride(-1) == 1 else x.contiguous()
    (stride_b, stride_h, stride_t, _), out_strides = x.stride(), out.stride()
    return _Heads(x, stride_b, stride_h, stride_t, out, out_strides[0], out_strides[1], out_strides[2], x.size(1))


@functools.cache
def _form(head_size: int, rotated: int, interleave: bool, backward: bool, with_values: bool) -> _Form:
    pairs = power_of_two(rotated // 2)
    # Sixteen elements per thread, eight of each half: 16 bytes in 16-bit types.
    rows = max(2048 // power_of_two(head_size), 4)
    return _Form(head_size, rotated, rows // 4, 4, pairs, interleave, backward, with_values)


@triton.jit(do_not_specialize=["T"])
def _rotate(q, k, v, tables, T, FORM: constexpr):
    n_block_q, n_block_k = tl.cdiv(q.n_head, FORM.heads), tl.cdiv(k.n_head, FORM.heads)
    n_block = n_block_q + n_block_k
    if FORM.with_values:
        n_block += tl.cdiv(v.n_head, FORM.heads)
    n_tile = tl.cdiv(T, FORM.tokens)
    block, tile = tl.program_id(0) % n_block, tl.program_id(0) // n_block
    tokens = (tile // n_tile, tile % n_tile * FORM.tokens, T)
    if block < n_block_q:
        _rotate_block(q, tables, tokens, block, FORM)
    elif block < n_block_q + n_block_k:
        _rotate_block(k, tables, tokens, block - n_block_q, FORM)
    elif FORM.with_values:
        x_R1, out_R1, live_R1 = _rows(v, tokens, block - n_block_q - n_block_k, FORM)
        _copy(x_R1, out_R1, live_R1, FORM.head_size)


@triton.jit
def _rotate_block(x, tables, tokens, block, FORM: constexpr):
    batch, first, _ = tokens
    token_R = first + tl.arange(0, FORM.tokens * FORM.heads) // FORM.heads
    x_R1, out_R1, live_R1 = _rows(x, tokens, block, FORM)
    pair_1P = tl.arange(0, FORM.pairs)[None, :]
    inside_RP = live_R1 & (pair_1P < FORM.rotated // 2)
    x1_RP, x2_RP = _load_pairs(x_R1, live_R1, FORM.interleave and not FORM.backward, FORM)
    table_R1 = (batch.to(tl.int64) * tables.stride_b + token_R.to(tl.int64) * tables.stride_t)[:, None]
    table_RP = table_R1 + pair_1P * tables.stride_n
    second: constexpr = FORM.rotated // 2
    cos1_RP = tl.load(tables.cos + table_RP, mask=inside_RP, other=0.0).to(tl.float32)
    sin1_RP = tl.load(tables.sin + table_RP, mask=inside_RP, other=0.0).to(tl.float32)
    table_RP += second * tables.stride_n
    cos2_RP = tl.load(tables.cos + table_RP, mask=inside_RP, other=0.0).to(tl.float32)
    sin2_RP = tl.load(tables.sin + table_RP, mask=inside_RP, other=0.0).to(tl.float32)
    if FORM.rotated < FORM.head_size:
        _copy(x_R1 + FORM.rotated, out_R1 + FORM.rotated, live_R1, FORM.head_size - FORM.rotated)
    if FORM.backward:
        y1_RP = x1_RP * cos1_RP + x2_RP * sin2_RP
        y2_RP = x2_RP * cos2_RP - x1_RP * sin1_RP
    else:
        y1_RP = x1_RP * cos1_RP - x2_RP * sin1_RP
        y2_RP = x2_RP * cos2_RP + x1_RP * sin2_RP
    _store_pairs(out_R1, (y1_RP, y2_RP), live_R1, FORM)


@triton.jit
def _rows(x, tokens, block, FORM: constexpr):
    # Addresses (past 2^31 elements too) from which a block's rows are read and to which they are written, and which of
    # the rows exist.
    batch, first, T = tokens
    row_R = tl.arange(0, FORM.tokens * FORM.heads)
    token_R, head_R = first + row_R // FORM.heads, block * FORM.heads + row_R % FORM.heads
    live_R = (token_R < T) & (head_R < x.n_head)
    batch, token_R, head_R = batch.to(tl.int64), token_R.to(tl.int64), head_R.to(tl.int64)
    x_R = x.data + batch * x.stride_b + head_R * x.stride_h + token_R * x.stride_t
    out_R = x.out + batch * x.out_stride_b + head_R * x.out_stride_h + token_R * x.out_stride_t
    return x_R[:, None], out_R[:, None], live_R[:, None]


@triton.jit
def _copy(x_R1, out_R1, live_R1, SIZE: constexpr):
    c_1C = tl.arange(0, triton.next_power_of_2(SIZE))[None, :]
    inside_RC = live_R1 & (c_1C < SIZE)
    tl.store(out_R1 + c_1C, tl.load(x_R1 + c_1C, mask=inside_RC), mask=inside_RC)


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
def _store_pairs(out_R1, y, live_R1, FORM: constexpr):
    DTYPE: constexpr = out_R1.dtype.element_ty
    if FORM.interleave and FORM.backward:
        n_1N = tl.arange(0, 2 * FORM.pairs)[None, :]
        tl.store(out_R1 + n_1N, tl.interleave(y[0], y[1]).to(DTYPE), mask=live_R1 & (n_1N < FORM.rotated))
    else:
        pair_1P = tl.arange(0, FORM.pairs)[None, :]
        inside_RP = live_R1 & (pair_1P < FORM.rotated // 2)
        tl.store(out_R1 + pair_1P, y[0].to(DTYPE), mask=inside_RP)
        tl.store(out_R1 + FORM.rotated // 2 + pair_1P, y[1].to(DTYPE), mask=inside_RP)
