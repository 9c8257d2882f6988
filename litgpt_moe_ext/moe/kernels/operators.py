"""The grouped products as torch operators: what a compiler, meta tensors, checkpointing and a FLOP counter see.

Two operators have gradients, `expert_up` (tokens to hidden rows) and `expert_down` (hidden rows to tokens); the others
are their backward pass. Between forward and backward they keep their own inputs: the tokens, the output of the first
projection, the routing. Parameters are kept as they are stored, and cast again unless passes share their casts
(`litgpt_moe_ext.moe.kernels.step_weights`).

Two engines compute them: the kernels of `litgpt_moe_ext.moe.kernels.triton`, and torch's own grouped product
(`litgpt_moe_ext.moe.kernels.native`). Triton is imported when the first operator runs; a fake tensor needs none.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, G width of
the first projection (2 * F with a gate), R = T * K routed rows in the order of experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.launch import triton_installed
from litgpt_moe_ext.kernels.operator import arguments_of, operator
from litgpt_moe_ext.kernels.side_stream import goes_aside, gradients, join
from litgpt_moe_ext.moe.kernels import native, step_weights
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights
from litgpt_moe_ext.moe.kernels.plan import Gates, Mask, Outer, Plan, Product, activation_of, plan_of


class Up(NamedTuple):
    """Arguments of `expert_up`.

    Attributes:
        x_TD: Tokens.
        weight_EGD: First projections, any floating dtype.
        bias_EG: Biases, or None.
        rows_R: For each row in the order of experts, which of the T * K choices it is.
        ends_E: Where the rows of each expert end, int32.
        dtype: In which matrices are multiplied.
        engine: `triton` or `torch`.
    """

    x_TD: Tensor
    weight_EGD: Tensor
    bias_EG: Tensor | None
    rows_R: Tensor
    ends_E: Tensor
    dtype: torch.dtype
    engine: str


class Down(NamedTuple):
    """Arguments of `expert_down`.

    Attributes:
        h_RG: Output of the first projection.
        gates_TK: Gate values.
        weight_EDF: Second projections, any floating dtype.
        bias_ED: Biases, or None.
        keep_RF: Which hidden activations are kept, or None without dropout.
        experts_TK: Chosen experts.
        rows_R: As in `Up`.
        ends_E: As in `Up`.
        added_TD: Outputs that are added, those of shared experts, or None.
        activation: Name of the activation; `identity` if `h_RG` has been activated already.
        approximate: `gelu_approximate` of the activation.
        scale: Factor of the hidden activations that are kept.
        dtype: Of the result.
        engine: As in `Up`.
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


class Middle(NamedTuple):
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


class RowProduct(NamedTuple):
    """Arguments of `multiply_rows`: rows times weights; tokens if `gather`, to the order of tokens if `scatter`."""

    x: Tensor
    weight_EOI: Tensor
    rows_R: Tensor
    ends_E: Tensor
    n_token: int
    gather: bool
    scatter: bool
    engine: str


class OuterProduct(NamedTuple):
    """Arguments of `sum_outer_products`, of which one operand is of tokens (`gather_left`), the other of rows."""

    left: Tensor
    right: Tensor
    rows_R: Tensor
    ends_E: Tensor
    gather_left: bool
    dtype: torch.dtype
    engine: str


class RowSum(NamedTuple):
    """Arguments of `sum_rows`: of tokens with their gate values, or of rows without."""

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


class FewTokens(NamedTuple):
    """Arguments of `decode_experts`."""

    x_TD: Tensor
    gates_TK: Tensor
    experts_TK: Tensor
    up_EGD: Tensor
    up_bias_EG: Tensor | None
    down_EDF: Tensor
    down_bias_ED: Tensor | None
    activation: str
    approximate: str


# FLOPs of calls, given shapes in place of tensors.


def _product_flops(n_row: int, weight_shape: torch.Size) -> int:
    # Every row meets the weights of one expert; two operations per multiply-add.
    return 2 * n_row * weight_shape[1] * weight_shape[2]


def _outer_flops(shapes: Any) -> int:
    return 2 * shapes.rows_R[0] * shapes.left[1] * shapes.right[1]


def _decode_flops(shapes: Any) -> int:
    n_row = shapes.experts_TK[0] * shapes.experts_TK[1]
    return _product_flops(n_row, shapes.up_EGD) + _product_flops(n_row, shapes.down_EDF)


def _plan(call: Any, n_token: int) -> Plan:
    return plan_of(call.rows_R, call.ends_E, n_token)


def _engine(call: Any) -> Any:
    if call.engine == "torch":
        return native
    from litgpt_moe_ext.moe.kernels import triton

    return triton


def _beside(call: Any, x: Tensor) -> Any:
    # Everything but the products. Triton's kernels take one launch for each, so they also go with torch's products.
    if call.engine == "torch" and not (x.is_cuda and triton_installed()):
        return native
    from litgpt_moe_ext.moe.kernels import triton

    return triton


@operator(
    "expert_up",
    Up,
    lambda c: c.x_TD.new_empty(c.rows_R.size(0), c.weight_EGD.size(1), dtype=c.dtype),
    flops=lambda shapes: _product_flops(shapes.rows_R[0], shapes.weight_EGD),
)
def expert_up(call: Up) -> Tensor:
    """Return the output of the first projections, (R, G)."""
    x_TD, weight = call.x_TD.to(call.dtype), step_weights.cast(call.weight_EGD, call.dtype)
    return _engine(call).multiply_rows(Product(x_TD, weight, call.bias_EG, _plan(call, len(x_TD)), gather=True))


@operator(
    "expert_down",
    Down,
    lambda c: c.h_RG.new_empty(c.gates_TK.size(0), c.weight_EDF.size(1), dtype=c.dtype),
    flops=lambda shapes: _product_flops(shapes.rows_R[0], shapes.weight_EDF),
)
def expert_down(call: Down) -> Tensor:
    """Return the weighted sum of the experts' outputs and of what is added, (T, D)."""
    n_token, beside = call.gates_TK.size(0), _beside(call, call.h_RG)
    a_RF = beside.activate(call.h_RG, activation_of(call), Mask(call.keep_RF, call.scale))
    weight = step_weights.cast(call.weight_EDF, a_RF.dtype)
    y_RD = _engine(call).multiply_rows(Product(a_RF, weight, call.bias_ED, _plan(call, n_token), scatter=True))
    if call.added_TD is not None:
        join()
    return beside.combine(y_RD, call.gates_TK.contiguous(), n_token, call.dtype, call.added_TD)


@operator(
    "multiply_rows",
    RowProduct,
    lambda c: c.x.new_empty(c.rows_R.size(0), c.weight_EOI.size(1)),
    flops=lambda shapes: _product_flops(shapes.rows_R[0], shapes.weight_EOI),
)
def multiply_rows(call: RowProduct) -> Tensor:
    """Return rows times weights, (R, O)."""
    plan = _plan(call, call.n_token)
    return _engine(call).multiply_rows(Product(call.x, call.weight_EOI, None, plan, call.gather, call.scatter))


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
    plan = _plan(call, len(call.left if call.gather_left else call.right))
    outer = Outer(call.left, call.right, plan, call.gather_left, not call.gather_left)
    engine = native if native.sums_fast(outer) else _engine(call)
    return engine.sum_outer_products(outer, call.dtype, total_EOI)


@operator("sum_rows", RowSum, lambda c: c.x.new_empty(c.ends_E.size(0), c.x.size(1), dtype=c.dtype))
def sum_rows(call: RowSum) -> Tensor:
    """Return the gradient of biases, (E, O)."""
    plan = _plan(call, len(call.x))
    return _beside(call, call.x).sum_rows(call.x, call.gates_TK, plan, call.gates_TK is not None, call.dtype)


def _empty_middle(call: Middle) -> tuple[Tensor, Tensor, Tensor]:
    gates_TK = call.gates_TK.new_empty(call.gates_TK.shape, dtype=torch.float32)
    return torch.empty_like(call.h_RG), torch.empty_like(call.da_RF), gates_TK


@operator("activate_backward", Middle, _empty_middle, n_result=3)
def activate_backward(call: Middle) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of `h_RG`, the activations times gate values, and the gradient of the gate values."""
    gates, mask = Gates(call.gates_TK.contiguous(), call.rows_R), Mask(call.keep_RF, call.scale)
    return tuple(_beside(call, call.h_RG).activate_backward(call.h_RG, call.da_RF, gates, activation_of(call), mask))


@operator("combine", Combination, lambda c: c.y_RD.new_empty(c.n_token, c.y_RD.size(1), dtype=c.dtype))
def combine(call: Combination) -> Tensor:
    """Return the sum of each token's rows, (T, D)."""
    return _beside(call, call.y_RD).combine(call.y_RD, None, call.n_token, call.dtype)


@operator("decode_experts", FewTokens, lambda c: c.x_TD.new_empty(c.x_TD.shape), flops=_decode_flops)
def decode_experts(call: FewTokens) -> Tensor:
    """Return the weighted sum of the experts' outputs for a few tokens, (T, D), by Triton."""
    from litgpt_moe_ext.moe.kernels.triton import decode

    weights = ExpertWeights(call.up_EGD, call.up_bias_EG, call.down_EDF, call.down_bias_ED)
    return decode(call.x_TD, call.gates_TK, call.experts_TK, weights, activation_of(call))


def _transposed(weight_EOI: Tensor, dtype: torch.dtype) -> Tensor:
    # Callers must not hold on to it: a temporary cast should be freed before the weights' gradient is allocated.
    return step_weights.cast(weight_EOI, dtype).transpose(1, 2)


def _weight_gradient(weight: Tensor, call: OuterProduct) -> Tensor | None:
    # None if it has been added to the gradient that the weights already have.
    total = step_weights.gradient_to_extend(weight)
    if total is None:
        return sum_outer_products(*call)
    _sum_outer_products(call, total)
    return None


def _up_backward(ctx: Any, dh_RG: Tensor) -> tuple[Tensor | None, ...]:
    call, dh_RG = Up(*arguments_of(ctx)), dh_RG.contiguous()
    need_x, *need_parameters = ctx.needs_input_grad[:3]
    if need_x and goes_aside(call.x_TD):
        with gradients(call.x_TD):
            of_parameters = _up_parameters_backward(call, dh_RG, *need_parameters)
        dx_TD = _up_tokens_backward(call, dh_RG)
        join()
    else:
        dx_TD = _up_tokens_backward(call, dh_RG) if need_x else None
        of_parameters = _up_parameters_backward(call, dh_RG, *need_parameters)
    return dx_TD, *of_parameters, None, None, None, None


def _up_tokens_backward(call: Up, dh_RG: Tensor) -> Tensor:
    n_token, plan = call.x_TD.size(0), (call.rows_R, call.ends_E)
    weight_EDG = _transposed(call.weight_EGD, dh_RG.dtype)
    dx_RD = multiply_rows(dh_RG, weight_EDG, *plan, n_token, False, True, call.engine)
    del weight_EDG
    return combine(dx_RD, n_token, call.x_TD.dtype, call.engine)


def _up_parameters_backward(
    call: Up, dh_RG: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    dweight_EGD = dbias_EG = None
    plan = call.rows_R, call.ends_E
    if need_weight:
        outer = OuterProduct(dh_RG, call.x_TD.to(call.dtype), *plan, False, call.weight_EGD.dtype, call.engine)
        dweight_EGD = _weight_gradient(call.weight_EGD, outer)
    if need_bias and call.bias_EG is not None:
        dbias_EG = sum_rows(dh_RG, None, *plan, call.bias_EG.dtype, call.engine)
    return dweight_EGD, dbias_EG


def _down_backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    call = Down(*arguments_of(ctx))
    need_h, need_gates, need_weight, need_bias = ctx.needs_input_grad[:4]
    dh_RG = dgates_TK = dweight_EDF = dbias_ED = None
    n_token, plan, engine = call.gates_TK.size(0), (call.rows_R, call.ends_E), call.engine
    # The addend has the dtype of the sum.
    dadded_TD = dy_TD if ctx.needs_input_grad[_ADDED] else None
    dy_TD = dy_TD.to(call.h_RG.dtype).contiguous()
    if need_h or need_gates or need_weight:
        da_RF = multiply_rows(dy_TD, _transposed(call.weight_EDF, dy_TD.dtype), *plan, n_token, True, False, engine)
        middle = Middle(
            call.h_RG, da_RF, call.gates_TK, call.keep_RF, call.rows_R, call.activation, call.approximate, call.scale,
            engine,
        )  # fmt: skip
        dh_RG, a_RF, dgates_TK = activate_backward(*middle)
        if need_weight:
            outer = OuterProduct(dy_TD, a_RF, *plan, True, call.weight_EDF.dtype, engine)
            dweight_EDF = _weight_gradient(call.weight_EDF, outer)
        if call.bias_ED is not None:
            dgates_TK = dgates_TK + _bias_share(dy_TD, call.bias_ED, call.experts_TK)
        dgates_TK = dgates_TK.to(call.gates_TK.dtype)
    if need_bias and call.bias_ED is not None:
        dbias_ED = sum_rows(dy_TD, call.gates_TK, *plan, call.bias_ED.dtype, engine)
    gradients = [dh_RG if need_h else None, dgates_TK if need_gates else None, dweight_EDF, dbias_ED]
    gradients += [None] * (len(Down._fields) - len(gradients))
    gradients[_ADDED] = dadded_TD
    return tuple(gradients)


_ADDED = Down._fields.index("added_TD")


def _bias_share(dy_TD: Tensor, bias_ED: Tensor, experts_TK: Tensor) -> Tensor:
    # The biases' part of the gradient of the gate values, (T, K).
    by_expert_TE = dy_TD.float() @ bias_ED.float().t()
    # Padding has an expert that does not exist.
    return by_expert_TE.gather(1, experts_TK.clamp_max(bias_ED.size(0) - 1))


expert_up.set_gradient(_up_backward)
expert_down.set_gradient(_down_backward, unread=("added_TD",))
