"""The first projections of the experts, from tokens to hidden rows.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, G width of the first projection (2 * F
with a gate), R = T * K routed rows in the order of experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.operator import operator
from litgpt_moe_ext.kernels.side_stream import goes_aside, gradients, join
from litgpt_moe_ext.moe.kernels import step_weights
from litgpt_moe_ext.moe.kernels.operators.engines import engine_of
from litgpt_moe_ext.moe.kernels.operators.parts import (
    Combination,
    OuterProduct,
    RowProduct,
    RowSum,
    combine,
    multiply_rows,
    product_flops,
    sum_rows,
    transposed,
    weight_gradient,
)
from litgpt_moe_ext.moe.kernels.plan import Product, plan_of


class Up(NamedTuple):
    """Arguments of `expert_up`.

    Attributes:
        x_TD: Tokens.
        weight_EGD: First projections, any floating dtype.
        bias_EG: Biases, or None.
        rows_R: For each row in the order of experts, its index among the T * K choices.
        ends_E: Where the rows of each expert end, int32.
        dtype: Dtype of the matrix products.
        engine: `triton` or `torch`.
    """

    x_TD: Tensor
    weight_EGD: Tensor
    bias_EG: Tensor | None
    rows_R: Tensor
    ends_E: Tensor
    dtype: torch.dtype
    engine: str


@operator(
    "expert_up",
    Up,
    lambda c: c.x_TD.new_empty(c.rows_R.size(0), c.weight_EGD.size(1), dtype=c.dtype),
    flops=lambda shapes: product_flops(shapes.rows_R[0], shapes.weight_EGD),
)
def expert_up(call: Up) -> Tensor:
    """Return the output of the first projections, (R, G)."""
    x_TD, weight_EGD = call.x_TD.to(call.dtype), step_weights.cast(call.weight_EGD, call.dtype)
    plan = plan_of(call.rows_R, call.ends_E, len(x_TD))
    return engine_of(call).multiply_rows(Product(x_TD, weight_EGD, call.bias_EG, plan, gather=True))


def _backward(call: Up, needs: Any, dh_RG: Tensor) -> dict[str, Tensor | None]:
    dh_RG = dh_RG.contiguous()
    if needs.x_TD and goes_aside(call.x_TD):
        with gradients(call.x_TD):
            gradient_of = _parameter_gradients(call, needs, dh_RG)
        gradient_of["x_TD"] = _token_gradient(call, dh_RG)
        join()
        return gradient_of
    dx_TD = _token_gradient(call, dh_RG) if needs.x_TD else None
    return {"x_TD": dx_TD, **_parameter_gradients(call, needs, dh_RG)}


def _token_gradient(call: Up, dh_RG: Tensor) -> Tensor:
    n_token, plan, engine = call.x_TD.size(0), (call.rows_R, call.ends_E), call.engine
    dx_RD = multiply_rows(
        RowProduct(dh_RG, transposed(call.weight_EGD, dh_RG.dtype), *plan, n_token, gather=False, engine=engine)
    )
    return combine(Combination(dx_RD, n_token, call.x_TD.dtype, engine))


def _parameter_gradients(call: Up, needs: Any, dh_RG: Tensor) -> dict[str, Tensor | None]:
    gradient_of, plan = {}, (call.rows_R, call.ends_E)
    if needs.weight_EGD:
        x_TD, dtype = call.x_TD.to(call.dtype), call.weight_EGD.dtype
        outer = OuterProduct(dh_RG, x_TD, *plan, gather_left=False, dtype=dtype, engine=call.engine)
        gradient_of["weight_EGD"] = weight_gradient(call.weight_EGD, outer)
    if needs.bias_EG and call.bias_EG is not None:
        gradient_of["bias_EG"] = sum_rows(RowSum(dh_RG, None, *plan, call.bias_EG.dtype, call.engine))
    return gradient_of


expert_up.set_gradient(_backward)
