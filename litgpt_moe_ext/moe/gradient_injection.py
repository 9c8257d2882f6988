"""Giving an auxiliary loss its gradient without touching the loss that a training loop computes and prints.

`inject` is the identity on a tensor that lies on the way to the loss; in the backward pass it starts the gradient of
the auxiliary loss. It works in any loop, and under activation checkpointing whichever forward pass the gradient
takes.

A loop that divides its loss by the number of accumulated batches, or multiplies it by the scale of a gradient scaler,
means the auxiliary loss to be scaled as well. The loss itself knows: the gradient that arrives at it is exactly that
factor. `remember_scale` marks the loss (LitGPT's own loops are marked by the plugin) and keeps the factor for
`inject`; in an unmarked loop the factor is 1.
"""

from typing import Any

import torch
from torch import Tensor

_scale: Tensor | None = None


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype, ctx.loss_device = loss.dtype, loss.device
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        return grad, present_scale(grad).to(ctx.loss_device, ctx.loss_dtype)


class _RememberScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, weight: Tensor | None) -> Tensor:
        ctx.weight = weight
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        global _scale
        (grad,) = grads
        _scale = grad.detach() if ctx.weight is None else grad.detach() * ctx.weight
        return grad, None


def present_scale(grad: Tensor) -> Tensor:
    """Return the factor of the training loss in the backward pass that runs, a scalar, 1 where nobody told.

    Args:
        grad: A gradient that has just arrived.
    """
    # To a compiler the variable would be a constant.
    return torch.ops.litgpt_moe_ext.loss_scale(grad) if torch.compiler.is_compiling() else _read_scale(grad)


def _read_scale(grad: Tensor) -> Tensor:
    return grad.new_ones(()) if _scale is None else _scale.to(grad.device, grad.dtype)


torch.library.define("litgpt_moe_ext::loss_scale", "(Tensor grad) -> Tensor")
torch.library.impl("litgpt_moe_ext::loss_scale", "CompositeExplicitAutograd", lambda grad: _read_scale(grad).clone())
torch.library.register_fake("litgpt_moe_ext::loss_scale", lambda grad: grad.new_empty(()))


def inject(carrier: Tensor, loss: Tensor) -> Tensor:
    """Return `carrier` unchanged; its backward pass adds the gradient of `loss`.

    Args:
        carrier: A tensor on the way from the parameters to the training loss.
        loss: The auxiliary loss with its weight, a scalar.
    """
    return _Inject.apply(carrier, loss)


def remember_scale(loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return `loss` unchanged; its backward pass tells `inject` by what the training loop scales it.

    Args:
        loss: The training loss of a micro-batch, a scalar.
        weight: What auxiliary losses of the micro-batch are multiplied by besides, a scalar; None stands for 1.
    """
    # A meta loss (FLOPs are counted with one) has no factor to tell.
    return _RememberScale.apply(loss, weight) if loss.requires_grad and not loss.is_meta else loss


def forget_scale() -> None:
    """Go back to a factor of 1. Called after every optimizer step, since the next loop may be another."""
    global _scale
    _scale = None
