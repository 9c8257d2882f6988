"""The operators that the backward passes of both projections are made of.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, O and I widths of output and input, R =
T * K routed rows in the order of experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.operator import operator
from litgpt_moe_ext.moe.kernels import native, step_weights
from litgpt_moe_ext.moe.kernels.operators.engines import beside, engine_of
from litgpt_moe_ext.moe.kernels.plan import Outer, Product, plan_of


class RowProduct(NamedTuple):
    """Arguments of `multiply_rows`.

    Attributes:
        x: Tokens, (T, I), if `gather`; otherwise rows in the order of experts, (R, I).
        weight_EOI: Weights, any strides, in the dtype of `x`.
        rows_R: For each row in the order of experts, its index among the T * K choices.
        ends_E: Where the rows of each expert end, int32.
        n_token: T.
        gather: Whether rows are gathered from tokens into the order of experts; otherwise the result is in the order of
            tokens and their K choices.
        engine: `triton` or `torch`.
    """

    x: Tensor
    weight_EOI: Tensor
    rows_R: Tensor
    ends_E: Tensor
    n_token: int
    gather: bool
    engine: str


class OuterProduct(NamedTuple):
    """Arguments of `sum_outer_products`: one operand is of tokens (`left` if `gather_left`), the other of rows."""

    left: Tensor
    right: Tensor
    rows_R: Tensor
    ends_E: Tensor
    gather_left: bool
    dtype: torch.dtype
    engine: str


class RowSum(NamedTuple):
    """Arguments of `sum_rows`: tokens with gate values, or rows without."""

    x: Tensor
    gates_TK: Tensor | None
    rows_R: Tensor
    ends_E: Tensor
    dtype: torch.dtype
    engine: str


class Combination(NamedTuple):
    """Arguments of `combine`."""

    y_RD: Tensor
    n_token: int
    dtype: torch.dtype
    engine: str


def product_flops(n_row: int, weight_shape: torch.Size) -> int:
    """Return the FLOPs of rows that are each multiplied by one expert's weights, two per multiply-add."""
    return 2 * n_row * weight_shape[1] * weight_shape[2]


def _outer_flops(shapes: Any) -> int:
    return 2 * shapes.rows_R[0] * shapes.left[1] * shapes.right[1]


@operator(
    "multiply_rows",
    RowProduct,
    lambda c: c.x.new_empty(c.rows_R.size(0), c.weight_EOI.size(1)),
    flops=lambda shapes: product_flops(shapes.rows_R[0], shapes.weight_EOI),
)
def multiply_rows(call: RowProduct) -> Tensor:
    """Return rows times weights, (R, O)."""
    plan = plan_of(call.rows_R, call.ends_E, call.n_token)
    return engine_of(call).multiply_rows(Product(call.x, call.weight_EOI, None, plan, call.gather, not call.gather))


@operator(
    "sum_outer_products",
    OuterProduct,
    lambda c: c.left.new_empty(c.ends_E.size(0), c.left.size(1), c.right.size(1), dtype=c.dtype),
    flops=_outer_flops,
)
def sum_outer_products(call: OuterProduct) -> Tensor:
    """Return the gradient of weights, (E, O, I)."""
    return _sum_outer_products(call, None)


def _sum_outer_products(call: OuterProduct, total_EOI: Tensor | None) -> Tensor:
    plan = plan_of(call.rows_R, call.ends_E, len(call.left if call.gather_left else call.right))
    outer = Outer(call.left, call.right, plan, call.gather_left, not call.gather_left)
    engine = native if native.sums_fast(outer) else engine_of(call)
    return engine.sum_outer_products(outer, call.dtype, total_EOI)


def transposed(weight_EOI: Tensor, dtype: torch.dtype) -> Tensor:
    """Return transposed weights for the backward pass, (E, I, O), in `dtype`.

    Callers must not hold on to them: a temporary cast should be freed before the weights' gradient is allocated.
    """
    return step_weights.cast(weight_EOI, dtype).transpose(1, 2)


def weight_gradient(weight_EOI: Tensor, call: OuterProduct) -> Tensor | None:
    """Return the gradient of weights, or None if it has been added to their existing gradient."""
    total_EOI = step_weights.gradient_to_extend(weight_EOI)
    if total_EOI is None:
        return sum_outer_products(call)
    _sum_outer_products(call, total_EOI)
    return None


@operator("sum_rows", RowSum, lambda c: c.x.new_empty(c.ends_E.size(0), c.x.size(1), dtype=c.dtype))
def sum_rows(call: RowSum) -> Tensor:
    """Return the gradient of biases, (E, O)."""
    plan, gather = plan_of(call.rows_R, call.ends_E, len(call.x)), call.gates_TK is not None
    return beside(call, call.x).sum_rows(call.x, call.gates_TK, plan, gather, call.dtype)


@operator("combine", Combination, lambda c: c.y_RD.new_empty(c.n_token, c.y_RD.size(1), dtype=c.dtype))
def combine(call: Combination) -> Tensor:
    """Return the sum of each token's rows, (T, D)."""
    return beside(call, call.y_RD).combine(call.y_RD, None, call.n_token, call.dtype)
