"""The orthogonality loss of a router's weights on a GPU: a product and a kernel forward, two products and one backward.

The reference, `litgpt_moe_ext.moe.balancing.losses.orthogonality_loss`, runs everywhere else; it takes eight launches
forward and more than twenty backward. Compilers, meta tensors, checkpointing and the FLOP counter see an operator, as
with the experts' products.

Both passes start from the products of all rows, W W^T, whose diagonal holds their squared lengths. With s_i one over
the length of row i, and A the cosines minus the identity, the gradient is also a product: H W with
`H_ij = 4 s_i s_j (A_ij - [i = j] sum_k A_ik (A_ik + [i = k]))`.

Shape legend: D model width, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.operator import operator


class Directions(NamedTuple):
    """Arguments of `weighted_orthogonality`.

    Attributes:
        weight_ED: The router's weights, float32 or 16-bit.
        coef: Weight of the loss.
    """

    weight_ED: Tensor
    coef: float


class DirectionsBackward(NamedTuple):
    """Arguments of `weighted_orthogonality_backward`: the gradient of the loss, a scalar, and the loss's arguments."""

    dloss: Tensor
    weight_ED: Tensor
    coef: float


def _kernels() -> Any:
    from litgpt_moe_ext.moe.kernels.triton import orthogonality

    return orthogonality


def _products(weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    # The precision of the product follows torch's settings.
    weight_ED = weight_ED.float()
    return weight_ED, weight_ED @ weight_ED.t()


def _flops(weight_shape: Any) -> int:
    return 2 * weight_shape[0] ** 2 * weight_shape[1]


@operator(
    "weighted_orthogonality",
    Directions,
    lambda call: call.weight_ED.new_empty((), dtype=torch.float32),
    flops=lambda shapes: _flops(shapes.weight_ED),
)
def weighted_orthogonality(call: Directions) -> Tensor:
    """Return `coef * orthogonality_loss(weight_ED)`, a scalar, float32."""
    with torch.autocast(call.weight_ED.device.type, enabled=False):
        _, products_EE = _products(call.weight_ED)
    return _kernels().loss(products_EE, call.coef)


@operator(
    "weighted_orthogonality_backward",
    DirectionsBackward,
    lambda call: torch.empty_like(call.weight_ED),
    flops=lambda shapes: 2 * _flops(shapes.weight_ED),
)
def weighted_orthogonality_backward(call: DirectionsBackward) -> Tensor:
    """Return the gradient of the weights in their dtype."""
    with torch.autocast(call.weight_ED.device.type, enabled=False):
        weight_ED, products_EE = _products(call.weight_ED)
        return (_kernels().slopes(products_EE, call.dloss, call.coef) @ weight_ED).to(call.weight_ED.dtype)


def _backward(call: Directions, _needs: Any, dloss: Tensor) -> dict[str, Tensor]:
    return {"weight_ED": weighted_orthogonality_backward(DirectionsBackward(dloss, *call))}


weighted_orthogonality.set_gradient(_backward)
