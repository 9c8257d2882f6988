"""The second projections of the experts, from hidden rows to tokens, with the activation before and the sum after.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, G width of
the first projection (2 * F with a gate), R = T * K routed rows in the order of experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.operator import operator
from litgpt_moe_ext.kernels.side_stream import join
from litgpt_moe_ext.moe.kernels import step_weights
from litgpt_moe_ext.moe.kernels.operators.engines import beside, engine_of
from litgpt_moe_ext.moe.kernels.operators.parts import (
    OuterProduct,
    RowProduct,
    RowSum,
    multiply_rows,
    product_flops,
    sum_rows,
    transposed,
    weight_gradient,
)
from litgpt_moe_ext.moe.kernels.plan import Gates, Mask, Product, activation_of, plan_of


class Down(NamedTuple):
    """Arguments of `expert_down`.

    Attributes:
        h_RG: Output of the first projection.
        gates_TK: Gate values.
        weight_EDF: Second projections, any floating dtype.
        bias_ED: Biases, or None.
        keep_RF: Which hidden activations are kept, or None without dropout.
        experts_TK: Chosen experts.
        rows_R: For each row in the order of experts, its index among the T * K choices.
        ends_E: Where the rows of each expert end, int32.
        added_TD: Added to the result: the output of shared experts, or None.
        activation: Name of the activation; `identity` if `h_RG` has been activated already.
        approximate: `gelu_approximate` of the activation.
        scale: Factor of the hidden activations that are kept.
        dtype: Dtype of the result.
        engine: `triton` or `torch`.
    """

    h_RG: Tensor
    gates_TK: Tensor
    weight_EDF: Tensor
    bias_ED: Tensor | None
    keep_RF: Tensor | None
    experts_TK: Tensor
    rows_R: Tensor
    ends_E: Tensor
    added_TD: Tensor | None
    activation: str
    approximate: str
    scale: float
    dtype: torch.dtype
    engine: str


class ActivationBackward(NamedTuple):
    """Arguments of `activate_backward`: as in `Down`, and `da_RF`, the gradient before gate values and dropout."""

    h_RG: Tensor
    da_RF: Tensor
    gates_TK: Tensor
    keep_RF: Tensor | None
    rows_R: Tensor
    activation: str
    approximate: str
    scale: float
    engine: str


@operator(
    "expert_down",
    Down,
    lambda c: c.h_RG.new_empty(c.gates_TK.size(0), c.weight_EDF.size(1), dtype=c.dtype),
    flops=lambda shapes: product_flops(shapes.rows_R[0], shapes.weight_EDF),
)
def expert_down(call: Down) -> Tensor:
    """Return the weighted sum of the experts' outputs plus `added_TD`, (T, D)."""
    around, n_token = beside(call, call.h_RG), call.gates_TK.size(0)
    a_RF = around.activate(call.h_RG, activation_of(call), Mask(call.keep_RF, call.scale))
    weight_EDF, plan = step_weights.cast(call.weight_EDF, a_RF.dtype), plan_of(call.rows_R, call.ends_E, n_token)
    y_RD = engine_of(call).multiply_rows(Product(a_RF, weight_EDF, call.bias_ED, plan, scatter=True))
    if call.added_TD is not None:
        join()
    return around.combine(y_RD, call.gates_TK.contiguous(), n_token, call.dtype, call.added_TD)


def _backward(call: Down, needs: Any, dy_TD: Tensor) -> dict[str, Tensor | None]:
    # The addend has the dtype of the sum.
    gradient_of = {"added_TD": dy_TD if needs.added_TD else None}
    dy_TD, plan = dy_TD.to(call.h_RG.dtype).contiguous(), (call.rows_R, call.ends_E)
    if needs.h_RG or needs.gates_TK or needs.weight_EDF:
        gradient_of["h_RG"], a_RF, dgates_TK = _activation_gradients(call, dy_TD)
        if needs.weight_EDF:
            dtype, engine = call.weight_EDF.dtype, call.engine
            outer = OuterProduct(dy_TD, a_RF, *plan, gather_left=True, dtype=dtype, engine=engine)
            gradient_of["weight_EDF"] = weight_gradient(call.weight_EDF, outer)
        if call.bias_ED is not None:
            dgates_TK = dgates_TK + _bias_share(dy_TD, call.bias_ED, call.experts_TK)
        gradient_of["gates_TK"] = dgates_TK.to(call.gates_TK.dtype)
    if needs.bias_ED and call.bias_ED is not None:
        gradient_of["bias_ED"] = sum_rows(RowSum(dy_TD, call.gates_TK, *plan, call.bias_ED.dtype, call.engine))
    return gradient_of


def _activation_gradients(call: Down, dy_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n_token, plan, engine = call.gates_TK.size(0), (call.rows_R, call.ends_E), call.engine
    da_RF = multiply_rows(
        RowProduct(dy_TD, transposed(call.weight_EDF, dy_TD.dtype), *plan, n_token, gather=True, engine=engine)
    )
    how = call.activation, call.approximate, call.scale, engine
    return activate_backward(ActivationBackward(call.h_RG, da_RF, call.gates_TK, call.keep_RF, call.rows_R, *how))


def _empty_gradients(call: ActivationBackward) -> tuple[Tensor, Tensor, Tensor]:
    gates_TK = call.gates_TK.new_empty(call.gates_TK.shape, dtype=torch.float32)
    return torch.empty_like(call.h_RG), torch.empty_like(call.da_RF), gates_TK


@operator("activate_backward", ActivationBackward, _empty_gradients, n_result=3)
def activate_backward(call: ActivationBackward) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of `h_RG`, the activations times gate values, and the gradient of the gate values."""
    gates, mask = Gates(call.gates_TK.contiguous(), call.rows_R), Mask(call.keep_RF, call.scale)
    return tuple(beside(call, call.h_RG).activate_backward(call.h_RG, call.da_RF, gates, activation_of(call), mask))


def _bias_share(dy_TD: Tensor, bias_ED: Tensor, experts_TK: Tensor) -> Tensor:
    # The contribution of the biases to the gradient of the gate values, (T, K).
    by_expert_TE = dy_TD.float() @ bias_ED.float().t()
    # The expert of padding does not exist.
    return by_expert_TE.gather(1, experts_TK.clamp_max(bias_ED.size(0) - 1))


expert_down.set_gradient(_backward, unread=("added_TD",))
