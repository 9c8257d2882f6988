"""The grouped products as torch operators: what a compiler, meta tensors, checkpointing and a FLOP counter see.

Two operators have gradients, `expert_up` (tokens to hidden rows) and `expert_down` (hidden rows to tokens); the others
are their backward pass. Between forward and backward they keep their own inputs: the tokens, the output of the first
projection, the routing. Parameters are kept as they are stored, and cast again.

Kernels are imported when the first operator runs, so that a fake tensor needs no Triton.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, G width of
the first projection (2 * F with a gate), R = T * K routed rows in the order of experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from litgpt_moe_ext.moe.activations import Activation

_NAMESPACE = "litgpt_moe_ext"


class Up(NamedTuple):
    """Arguments of `expert_up`.

    Attributes:
        x_TD: Tokens.
        weight_EGD: First projections, any floating dtype.
        bias_EG: Biases, or None.
        rows_R: For each row in the order of experts, which of the T * K choices it is.
        ends_E: Where the rows of each expert end, int32.
        dtype: In which matrices are multiplied.
    """

    x_TD: Tensor
    weight_EGD: Tensor
    bias_EG: Tensor | None
    rows_R: Tensor
    ends_E: Tensor
    dtype: torch.dtype


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
        activation: Name of the activation.
        approximate: `gelu_approximate` of the activation.
        scale: Factor of the hidden activations that are kept.
        dtype: Of the result.
    """

    h_RG: Tensor
    gates_TK: Tensor
    weight_EDF: Tensor
    bias_ED: Tensor | None
    keep_RF: Tensor | None
    experts_TK: Tensor
    rows_R: Tensor
    ends_E: Tensor
    activation: str
    approximate: str
    scale: float
    dtype: torch.dtype


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


class RowProduct(NamedTuple):
    """Arguments of `multiply_rows`: rows times weights; tokens if `gather`, to the order of tokens if `scatter`."""

    x: Tensor
    weight_EOI: Tensor
    rows_R: Tensor
    ends_E: Tensor
    n_token: int
    gather: bool
    scatter: bool


class OuterProduct(NamedTuple):
    """Arguments of `sum_outer_products`, of which one operand is of tokens (`gather_left`), the other of rows."""

    left: Tensor
    right: Tensor
    rows_R: Tensor
    ends_E: Tensor
    gather_left: bool
    dtype: torch.dtype


class RowSum(NamedTuple):
    """Arguments of `sum_rows`: of tokens with their gate values, or of rows without."""

    x: Tensor
    gates_TK: Tensor | None
    rows_R: Tensor
    ends_E: Tensor
    dtype: torch.dtype


class Combination(NamedTuple):
    """Arguments of `combine`."""

    y_RD: Tensor
    n_token: int
    dtype: torch.dtype


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


_SCHEMA_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", bool: "bool", float: "float", str: "str",
    torch.dtype: "ScalarType",
}  # fmt: skip


def _operator(name: str, call: type, fake: Callable[[Any], Any], n_result: int = 1) -> Callable[[Callable], Any]:
    """Make the decorated function an operator: it takes a named tuple, the operator takes the fields.

    Args:
        name: Name of the operator.
        call: Class of the named tuple.
        fake: Returns empty results of the right shape.
        n_result: Number of tensors returned.
    """

    def register(function: Callable[[Any], Any]) -> Any:
        arguments = ", ".join(f"{_SCHEMA_TYPES[kind]} {field}" for field, kind in call.__annotations__.items())
        results = "Tensor" if n_result == 1 else "(" + ", ".join(["Tensor"] * n_result) + ")"
        qualified = f"{_NAMESPACE}::{name}"
        torch.library.define(qualified, f"({arguments}) -> {results}")
        torch.library.impl(qualified, ("cpu", "cuda"), lambda *args: function(call(*args)))
        torch.library.register_fake(qualified, lambda *args: fake(call(*args)))
        return getattr(getattr(torch.ops, _NAMESPACE), name).default

    return register


def _activation(call: Any) -> Activation:
    return Activation(call.activation, call.approximate)


def _plan(call: Any, n_token: int) -> Any:
    from litgpt_moe_ext.moe.kernels.triton.common import plan_of

    return plan_of(call.rows_R, call.ends_E, n_token)


@_operator("expert_up", Up, lambda c: c.x_TD.new_empty(c.rows_R.size(0), c.weight_EGD.size(1), dtype=c.dtype))
def expert_up(call: Up) -> Tensor:
    from litgpt_moe_ext.moe.kernels.triton.rows import Product, multiply_rows

    x_TD, weight = call.x_TD.to(call.dtype), call.weight_EGD.to(call.dtype)
    return multiply_rows(Product(x_TD, weight, call.bias_EG, _plan(call, len(x_TD)), gather=True))


@_operator("expert_down", Down, lambda c: c.h_RG.new_empty(c.gates_TK.size(0), c.weight_EDF.size(1), dtype=c.dtype))
def expert_down(call: Down) -> Tensor:
    from litgpt_moe_ext.moe.kernels.triton.activation import Mask, activate
    from litgpt_moe_ext.moe.kernels.triton.combine import combine
    from litgpt_moe_ext.moe.kernels.triton.rows import Product, multiply_rows

    n_token = call.gates_TK.size(0)
    a_RF = activate(call.h_RG, _activation(call), Mask(call.keep_RF, call.scale))
    weight = call.weight_EDF.to(a_RF.dtype)
    y_RD = multiply_rows(Product(a_RF, weight, call.bias_ED, _plan(call, n_token), scatter=True))
    return combine(y_RD, call.gates_TK.contiguous(), n_token, call.dtype)


@_operator("multiply_rows", RowProduct, lambda c: c.x.new_empty(c.rows_R.size(0), c.weight_EOI.size(1)))
def multiply_rows(call: RowProduct) -> Tensor:
    from litgpt_moe_ext.moe.kernels.triton.rows import Product, multiply_rows

    weight = call.weight_EOI.to(call.x.dtype)
    return multiply_rows(Product(call.x, weight, None, _plan(call, call.n_token), call.gather, call.scatter))


@_operator(
    "sum_outer_products",
    OuterProduct,
    lambda c: c.left.new_empty(c.ends_E.size(0), c.left.size(1), c.right.size(1), dtype=c.dtype),
)
def sum_outer_products(call: OuterProduct) -> Tensor:
    from litgpt_moe_ext.moe.kernels.triton.weights import Outer, sum_outer_products

    plan = _plan(call, len(call.left if call.gather_left else call.right))
    outer = Outer(call.left, call.right, plan, call.gather_left, not call.gather_left)
    return sum_outer_products(outer, call.dtype)


@_operator("sum_rows", RowSum, lambda c: c.x.new_empty(c.ends_E.size(0), c.x.size(1), dtype=c.dtype))
def sum_rows(call: RowSum) -> Tensor:
    from litgpt_moe_ext.moe.kernels.triton.weights import sum_rows

    gather = call.gates_TK is not None
    return sum_rows(call.x, call.gates_TK, _plan(call, len(call.x)), gather, call.dtype)


def _empty_middle(call: Middle) -> tuple[Tensor, Tensor, Tensor]:
    gates_TK = call.gates_TK.new_empty(call.gates_TK.shape, dtype=torch.float32)
    return torch.empty_like(call.h_RG), torch.empty_like(call.da_RF), gates_TK


@_operator("activate_backward", Middle, _empty_middle, n_result=3)
def activate_backward(call: Middle) -> tuple[Tensor, Tensor, Tensor]:
    from litgpt_moe_ext.moe.kernels.triton.activation import Gates, Mask, activate_backward

    gates = Gates(call.gates_TK.contiguous(), call.rows_R)
    mask = Mask(call.keep_RF, call.scale)
    return tuple(activate_backward(call.h_RG, call.da_RF, gates, _activation(call), mask))


@_operator("combine", Combination, lambda c: c.y_RD.new_empty(c.n_token, c.y_RD.size(1), dtype=c.dtype))
def combine(call: Combination) -> Tensor:
    from litgpt_moe_ext.moe.kernels.triton.combine import combine

    return combine(call.y_RD, None, call.n_token, call.dtype)


@_operator("decode_experts", FewTokens, lambda c: c.x_TD.new_empty(c.x_TD.shape))
def decode_experts(call: FewTokens) -> Tensor:
    from litgpt_moe_ext.moe.kernels.backends import ExpertWeights
    from litgpt_moe_ext.moe.kernels.triton.decode import decode

    weights = ExpertWeights(call.up_EGD, call.up_bias_EG, call.down_EDF, call.down_bias_ED)
    return decode(call.x_TD, call.gates_TK, call.experts_TK, weights, _activation(call))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.call = tuple(None if isinstance(value, Tensor) else value for value in inputs)
    ctx.is_tensor = tuple(isinstance(value, Tensor) for value in inputs)


def _kept(ctx: Any) -> list[Any]:
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if is_tensor else value for is_tensor, value in zip(ctx.is_tensor, ctx.call, strict=True)]


def _up_backward(ctx: Any, dh_RG: Tensor) -> tuple[Tensor | None, ...]:
    call = Up(*_kept(ctx))
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    dx_TD = dweight_EGD = dbias_EG = None
    n_token = call.x_TD.size(0)
    dh_RG = dh_RG.contiguous()
    if need_x:
        dx_RD = multiply_rows(
            dh_RG, call.weight_EGD.transpose(1, 2), call.rows_R, call.ends_E, n_token, gather=False, scatter=True
        )
        dx_TD = combine(dx_RD, n_token, call.x_TD.dtype)
    if need_weight:
        x_TD = call.x_TD.to(call.dtype)
        dweight_EGD = sum_outer_products(dh_RG, x_TD, call.rows_R, call.ends_E, False, call.weight_EGD.dtype)
    if need_bias:
        dbias_EG = sum_rows(dh_RG, None, call.rows_R, call.ends_E, call.bias_EG.dtype)
    return dx_TD, dweight_EGD, dbias_EG, None, None, None


def _down_backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    call = Down(*_kept(ctx))
    need_h, need_gates, need_weight, need_bias = ctx.needs_input_grad[:4]
    dh_RG = dgates_TK = dweight_EDF = dbias_ED = None
    n_token = call.gates_TK.size(0)
    dy_TD = dy_TD.to(call.h_RG.dtype).contiguous()
    rows_R, ends_E = call.rows_R, call.ends_E
    if need_h or need_gates or need_weight:
        weight_EFD = call.weight_EDF.transpose(1, 2)
        da_RF = multiply_rows(dy_TD, weight_EFD, rows_R, ends_E, n_token, gather=True, scatter=False)
        middle = (call.h_RG, da_RF, call.gates_TK, call.keep_RF, rows_R, *call[8:11])
        dh_RG, a_RF, dgates_TK = activate_backward(*middle)
        if need_weight:
            dweight_EDF = sum_outer_products(dy_TD, a_RF, rows_R, ends_E, True, call.weight_EDF.dtype)
    if need_gates:
        if call.bias_ED is not None:
            dgates_TK = dgates_TK + _bias_share(dy_TD, call)
        dgates_TK = dgates_TK.to(call.gates_TK.dtype)
    if need_bias:
        dbias_ED = sum_rows(dy_TD, call.gates_TK, rows_R, ends_E, call.bias_ED.dtype)
    return (
        dh_RG if need_h else None, dgates_TK if need_gates else None, dweight_EDF, dbias_ED,
        None, None, None, None, None, None, None, None,
    )  # fmt: skip


def _bias_share(dy_TD: Tensor, call: Down) -> Tensor:
    # What the biases contribute to the gradient of the gate values, (T, K).
    by_expert_TE = dy_TD.float() @ call.bias_ED.float().t()
    return by_expert_TE.gather(1, call.experts_TK)


torch.library.register_autograd(f"{_NAMESPACE}::expert_up", _up_backward, setup_context=_keep)
torch.library.register_autograd(f"{_NAMESPACE}::expert_down", _down_backward, setup_context=_keep)


def _product_flops(rows: int, weight_shape: torch.Size) -> int:
    # Every row meets the weights of one expert; two operations per multiply-add.
    return 2 * rows * weight_shape[1] * weight_shape[2]


@register_flop_formula(torch.ops.litgpt_moe_ext.expert_up)
def _expert_up_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return _product_flops(shapes[3][0], shapes[1])


@register_flop_formula(torch.ops.litgpt_moe_ext.expert_down)
def _expert_down_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return _product_flops(shapes[0][0], shapes[2])


@register_flop_formula(torch.ops.litgpt_moe_ext.multiply_rows)
def _multiply_rows_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return _product_flops(shapes[2][0], shapes[1])


@register_flop_formula(torch.ops.litgpt_moe_ext.sum_outer_products)
def _sum_outer_products_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * shapes[2][0] * shapes[0][1] * shapes[1][1]


@register_flop_formula(torch.ops.litgpt_moe_ext.decode_experts)
def _decode_experts_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    n_row = shapes[2][0] * shapes[2][1]
    return _product_flops(n_row, shapes[3]) + _product_flops(n_row, shapes[5])
