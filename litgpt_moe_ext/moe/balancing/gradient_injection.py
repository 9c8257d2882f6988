"""Adds the gradient of an auxiliary loss without touching the loss that a training loop computes and prints.

`inject` is the identity on a tensor on the path to the loss; its backward pass starts the gradient of the auxiliary
loss. It works in any loop, and under activation checkpointing whichever forward pass the gradient goes through.

If a loop divides its loss by the number of accumulated batches, or multiplies it by the scale of a gradient scaler, the
auxiliary loss must be scaled as well. The gradient that arrives at the loss is exactly that factor. `remember_scale`
marks the loss (the plugin marks those of LitGPT's own loops) and keeps the factor for `inject`; in an unmarked loop the
factor is 1.
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
    """Return the scale of the training loss in the current backward pass, a scalar; 1 if the loss is not marked.

    Args:
        grad: A gradient that has just arrived.
    """
    # A compiler would take the variable for a constant.
    return torch.ops.litgpt_moe_ext.loss_scale(grad) if torch.compiler.is_compiling() else _read_scale(grad)


def _read_scale(grad: Tensor) -> Tensor:
    return grad.new_ones(()) if _scale is None else _scale.to(grad.device, grad.dtype)


torch.library.define("litgpt_moe_ext::loss_scale", "(Tensor grad) -> Tensor")
torch.library.impl("litgpt_moe_ext::loss_scale", "CompositeExplicitAutograd", lambda grad: _read_scale(grad).clone())
torch.library.register_fake("litgpt_moe_ext::loss_scale", lambda grad: grad.new_empty(()))


def inject(carrier: Tensor, loss: Tensor) -> Tensor:
    """Return `carrier` unchanged; its backward pass adds the gradient of `loss`.

    Args:
        carrier: A tensor on the path from the parameters to the training loss.
        loss: The auxiliary loss with its weight, a scalar.
    """
    return _Inject.apply(carrier, loss)


def remember_scale(loss: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return `loss` unchanged; its backward pass keeps the training loop's scale of it for `inject`.

    Args:
        loss: The training loss of a micro-batch, a scalar.
        weight: Another factor of the micro-batch's auxiliary losses, a scalar; None means 1.
    """
    # A meta loss, used to count FLOPs, has no scale.
    return _RememberScale.apply(loss, weight) if loss.requires_grad and not loss.is_meta else loss


def forget_scale() -> None:
    """Reset the scale to 1. Called after every optimizer step, since the next one may be another loop's."""
    global _scale
    _scale = None
