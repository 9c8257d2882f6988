"""A router's product on a GPU at nearly the accuracy of float32, reading tokens in their own dtype.

Torch's product, the reference, needs a float32 copy of 16-bit tokens, and for so few outputs takes about ten times as
long as reading them. It is still used under compilers, for float64, and with `expert_backend: loop`.
Compilers, meta tensors, checkpointing and the FLOP counter see an operator, as with the experts' products.

A layer's tokens are read three times: by the router, and in 16 bits by routed and by shared experts. The router comes
first, so it passes them on in that dtype; its backward pass comes last, so it adds up the gradients of all three. Done
separately, this takes four launches with up to three times the memory traffic of the products here.

Shape legend: T tokens, D model width, E experts.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from litgpt_moe_ext.kernels.operator import operator
from litgpt_moe_ext.moe.kernels.routing import fused_router

# This product is used for up to so many experts, by the dtype of the tokens; 0 is never (`benchmarks/gpu.py`, table
# `router_product`). Without bfloat16 Tensor Cores, up to as many as cost no more than 16.
MOST_EXPERTS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 64}
MOST_WITHOUT_TENSOR_CORES = 16
# Least tokens times width. Below it the time to launch dominates, and torch launches sooner. With 2,048 tokens on an
# H200, forward and backward take 12 us (torch: 15) at width 128, and 26 (torch: 26) at width 768, which a block of
# tokens walks in six steps.
FEWEST_NUMBERS, FEWEST_WIDE_NUMBERS, WIDE = 2**18, 2**21, 256


class Projected(NamedTuple):
    """Logits, and the tokens for the experts.

    Attributes:
        logits_TE: `x_TD @ weight_ED.T`, float32.
        routed_TD: Tokens for the routed experts.
        shared_TD: The same tokens for the shared experts, a tensor with a gradient of its own.
    """

    logits_TE: Tensor
    routed_TD: Tensor
    shared_TD: Tensor


class Projection(NamedTuple):
    """Arguments of `project_tokens`.

    Attributes:
        x_TD: Tokens, float32 or 16-bit.
        weight_ED: Weights, float32 or 16-bit.
        dtype: Dtype in which tokens are passed on.
    """

    x_TD: Tensor
    weight_ED: Tensor
    dtype: torch.dtype


class ProjectionBackward(NamedTuple):
    """Arguments of `project_backward`.

    Attributes:
        dlogits_TE: Gradient of the logits, float32.
        x_TD: Tokens.
        weight_ED: Weights.
        routed_TD: Gradient of the tokens for routed experts, or None.
        shared_TD: Gradient of the tokens for shared experts, or None.
        need_x: Whether the gradient of tokens is needed.
        need_weight: Whether the gradient of weights is needed.
    """

    dlogits_TE: Tensor
    x_TD: Tensor
    weight_ED: Tensor
    routed_TD: Tensor | None
    shared_TD: Tensor | None
    need_x: bool
    need_weight: bool


def works_on(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Return whether the product of `x_TD` and `weight_ED` should be computed here."""
    # Checked first, because compilers must not look at sizes.
    if not fused_router.works_on(x_TD) or weight_ED.dtype not in MOST_EXPERTS:
        return False
    n_expert = weight_ED.size(0)
    fewest = FEWEST_NUMBERS if x_TD.size(1) <= WIDE else FEWEST_WIDE_NUMBERS
    if x_TD.numel() < fewest or n_expert > MOST_EXPERTS.get(x_TD.dtype, 0):
        return False
    return n_expert <= MOST_WITHOUT_TENSOR_CORES or _has_tensor_cores(x_TD.device)


def _has_tensor_cores(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def project(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Return `x_TD @ weight_ED.T`, (T, E), float32.

    Args:
        x_TD: Tokens, float32 or 16-bit.
        weight_ED: Weights, float32 or 16-bit.
    """
    return project_and_pass(x_TD, weight_ED, x_TD.dtype).logits_TE


def project_and_pass(x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Projected:
    """Return the result of `project`, and the tokens in `dtype` for the experts."""
    return Projected(*_Project.apply(x_TD, weight_ED, dtype))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        logits_TE, narrow_TD = project_tokens(Projection(x_TD, weight_ED, dtype))
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.set_materialize_grads(False)
        tokens_TD = x_TD if dtype == x_TD.dtype else narrow_TD
        passed = tokens_TD.detach(), tokens_TD.detach()
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(*passed)
        return logits_TE, *passed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x_TD, weight_ED = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        dlogits_TE, routed_TD, shared_TD = grads
        if dlogits_TE is None:
            parts = [grad.to(x_TD.dtype) for grad in (routed_TD, shared_TD) if grad is not None] if need_x else []
            return functools.reduce(torch.add, parts) if parts else None, None, None
        backward = ProjectionBackward(dlogits_TE, x_TD, weight_ED, routed_TD, shared_TD, need_x, need_weight)
        dx_TD, dweight_ED = project_backward(backward)
        return dx_TD if need_x else None, dweight_ED if need_weight else None, None


def _kernels() -> Any:
    from litgpt_moe_ext.moe.kernels.triton import projecting

    return projecting


def _empty_results(call: Projection) -> tuple[Tensor, Tensor]:
    logits_TE = call.x_TD.new_empty(call.x_TD.size(0), call.weight_ED.size(0), dtype=torch.float32)
    return logits_TE, call.x_TD.new_empty(0 if call.dtype == call.x_TD.dtype else call.x_TD.shape, dtype=call.dtype)


def _empty_gradients(call: ProjectionBackward) -> tuple[Tensor, Tensor]:
    dx_TD = call.x_TD.new_empty(call.x_TD.shape if call.need_x else 0)
    return dx_TD, call.weight_ED.new_empty(call.weight_ED.shape if call.need_weight else 0)


def _flops(x_shape: Any, weight_shape: Any) -> int:
    return 2 * x_shape[0] * weight_shape[0] * weight_shape[1]


@operator(
    "project_tokens",
    Projection,
    _empty_results,
    n_result=2,
    flops=lambda shapes: _flops(shapes.x_TD, shapes.weight_ED),
)
def project_tokens(call: Projection) -> tuple[Tensor, Tensor]:
    """Return logits, (T, E), float32, and the tokens in `dtype`, (T, D); the latter empty if they have it already."""
    return _kernels().project(*call)


@operator(
    "project_backward",
    ProjectionBackward,
    _empty_gradients,
    n_result=2,
    flops=lambda shapes: (shapes.need_x + shapes.need_weight) * _flops(shapes.x_TD, shapes.weight_ED),
)
def project_backward(call: ProjectionBackward) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and weights in their dtypes, empty where they are not needed."""
    return _kernels().project_backward(call)
