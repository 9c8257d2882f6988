"""Weights of several linear layers cast in one launch, where autocast takes one for each weight and bias."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(casts, list(weights))
        return tuple(casts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # to be differentiated again
            return None, *(None if grad is None else grad.to(d) for grad, d in zip(grads, ctx.dtypes, strict=True))
        results: list[Tensor | None] = [None] * len(grads)
        narrow, wide = [], []
        for i, (grad, dtype, needed) in enumerate(zip(grads, ctx.dtypes, ctx.needs_input_grad[1:], strict=True)):
            if grad is not None and needed:
                results[i] = result = torch.empty_like(grad, dtype=dtype)
                narrow.append(grad)
                wide.append(result)
        if wide:
            torch._foreach_copy_(wide, narrow)
        return None, *results


def cast_together(linears: Sequence[Any], dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    """Return what linear layers compute, with their weights and biases in `dtype`; gradients are the layers'.

    Args:
        linears: Layers for which `can_cast` is true.
        dtype: That of their inputs.
    """
    given = [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]
    casts = iter(_CastTogether.apply(dtype, *given))
    made: list[Callable[[Tensor], Tensor]] = []
    for linear in linears:
        weight, bias = next(casts), None if linear.bias is None else next(casts)
        made.append(partial(F.linear, weight=weight, bias=bias))
    return made


def can_cast(linears: Sequence[Any], dtype: torch.dtype) -> bool:
    """Return whether these are plain linear layers with weights in another dtype, which nobody wants to see called."""
    return all(
        type(linear) is nn.Linear
        and linear.weight.dtype != dtype
        and not is_traceable_wrapper_subclass(linear.weight)
        and "forward" not in vars(linear)
        and not any(getattr(linear, hooks) for hooks in _HOOKS)
        for linear in linears
    )
