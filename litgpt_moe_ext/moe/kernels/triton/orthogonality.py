"""The orthogonality loss of a router's directions, and its slopes, from the products of all pairs of rows.

Arithmetic is float32 and sums are in a fixed order, so two runs give the same bits.

Shape legend: E experts, M a block of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch, power_of_two
from litgpt_moe_ext.moe.kernels.triton.common import constexpr

# Cosines of a block: as many as fit into the registers of its warps.
_BLOCK, _WARPS = 4096, 8
# The least length of a row, as in `torch.nn.functional.normalize`.
_SHORTEST = tl.constexpr(1e-12)


class _Form(NamedTuple):
    rows: int
    experts: int


def loss(products_EE: Tensor, coef: float) -> Tensor:
    """Return `coef` times the sum of all squared cosines minus the identity, a scalar, float32.

    Args:
        products_EE: Products of all pairs of rows, float32, contiguous.
        coef: A factor.
    """
    form, n_block = _form(products_EE)
    sums_B = products_EE.new_empty(n_block)
    launch(_sum_squares, (n_block,), (products_EE, coef, sums_B, products_EE.size(0), form), _WARPS)
    return sums_B.view(()) if n_block == 1 else sums_B.sum()


def slopes(products_EE: Tensor, dloss: Tensor, coef: float) -> Tensor:
    """Return the matrix whose product with the rows is the gradient of `loss`, (E, E).

    Args:
        products_EE: As above.
        dloss: Gradient of the loss, a scalar.
        coef: As above.
    """
    form, n_block = _form(products_EE)
    slopes_EE = torch.empty_like(products_EE)
    launch(_store_slopes, (n_block,), (products_EE, coef, dloss, slopes_EE, products_EE.size(0), form), _WARPS)
    return slopes_EE


def _form(products_EE: Tensor) -> tuple[_Form, int]:
    n_expert = products_EE.size(0)
    experts = max(power_of_two(n_expert), 16)
    rows = min(max(_BLOCK // experts, 1), experts)
    return _Form(rows, experts), ceil_div(n_expert, rows)


@triton.jit
def _cosines(products, n_expert, FORM: constexpr):
    # Cosines of a block of rows with all rows, which of them are on the diagonal, and the divisors of the products.
    i_M = tl.program_id(0) * FORM.rows + tl.arange(0, FORM.rows)
    j_E = tl.arange(0, FORM.experts)
    live_M, real_E = i_M < n_expert, j_E < n_expert
    inside_ME = live_M[:, None] & real_E[None, :]
    at_ME = i_M[:, None] * n_expert + j_E[None, :]
    length_M = tl.sqrt(tl.load(products + i_M * (n_expert + 1), mask=live_M, other=1.0))
    length_E = tl.sqrt(tl.load(products + j_E * (n_expert + 1), mask=real_E, other=1.0))
    lengths_ME = tl.maximum(length_M, _SHORTEST)[:, None] * tl.maximum(length_E, _SHORTEST)[None, :]
    cosine_ME = tl.load(products + at_ME, mask=inside_ME, other=0.0) / lengths_ME
    same_ME = inside_ME & (i_M[:, None] == j_E[None, :])
    return cosine_ME, same_ME, lengths_ME, length_M, at_ME, inside_ME


@triton.jit
def _sum_squares(products, coef, sums, n_expert, FORM: constexpr):
    cosine_ME, same_ME, _, _, _, _ = _cosines(products, n_expert, FORM)
    apart_ME = cosine_ME - same_ME.to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(apart_ME * apart_ME, 1), 0) * coef)


@triton.jit
def _store_slopes(products, coef, dloss, slopes, n_expert, FORM: constexpr):
    cosine_ME, same_ME, lengths_ME, length_M, at_ME, inside_ME = _cosines(products, n_expert, FORM)
    apart_ME = cosine_ME - same_ME.to(tl.float32)
    # The gradient's part along the row itself is removed, as scaling a row changes nothing unless it is too short.
    along_M = tl.where(length_M > _SHORTEST, tl.sum(apart_ME * cosine_ME, 1), 0.0)
    apart_ME -= tl.where(same_ME, along_M[:, None], 0.0)
    slope_ME = apart_ME * (4.0 * coef * tl.load(dloss).to(tl.float32)) / lengths_ME
    tl.store(slopes + at_ME, slope_ME, mask=inside_ME)
