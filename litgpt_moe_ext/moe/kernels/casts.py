"""Casts the weights of several linear layers in one launch, where autocast takes one for each weight and bias.

The weights of layers with the same input are cast into one matrix, so that each pass has one product for all of them.
"""

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
    def forward(ctx: Any, dtype: torch.dtype, n_each: Sequence[int], *weights: Tensor) -> tuple[Tensor, ...]:
        # Each result is `n_each` of the weights, in order, one above the other.
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.n_rows, stacks, casts = [], [], []
        for n in n_each:
            stacked = weights[len(casts) : len(casts) + n]
            n_rows = [len(weight) for weight in stacked]
            stack = stacked[0].new_empty(sum(n_rows), *stacked[0].shape[1:], dtype=dtype)
            casts += stack.split(n_rows)
            stacks.append(stack)
            ctx.n_rows.append(n_rows)
        torch._foreach_copy_(casts, list(weights))
        return tuple(stacks)

    @staticmethod
    def backward(ctx: Any, *stacks: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor] = []
        for stack, n_rows in zip(stacks, ctx.n_rows, strict=True):
            grads += stack.split(n_rows)
        if torch.is_grad_enabled():  # to be differentiated again
            return None, None, *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        results: list[Tensor | None] = [None] * len(grads)
        narrow, wide = [], []
        for i, (grad, dtype, needed) in enumerate(zip(grads, ctx.dtypes, ctx.needs_input_grad[2:], strict=True)):
            if needed:
                results[i] = result = torch.empty_like(grad, dtype=dtype)
                narrow.append(grad)
                wide.append(result)
        if wide:
            torch._foreach_copy_(wide, narrow)
        return None, None, *results


def cast_together(groups: Sequence[Sequence[Any]], dtype: torch.dtype) -> list[Callable[[Tensor], Tensor]]:
    """Return, for each group of linear layers, a function to their outputs side by side, (..., sum of their widths).

    Weights and biases are cast to `dtype`; gradients reach the layers' parameters.

    Args:
        groups: Layers for which, taken together, `can_cast` is true; the layers of a group have the same input.
        dtype: Dtype of their inputs.
    """
    given: list[Tensor] = []
    n_each: list[int] = []
    for group in groups:
        for name in _names(group[0]):
            given += [getattr(linear, name) for linear in group]
            n_each.append(len(group))
    stacks = iter(_CastTogether.apply(dtype, n_each, *given))
    return [partial(F.linear, **{name: next(stacks) for name in _names(group[0])}) for group in groups]


def _names(linear: Any) -> tuple[str, ...]:
    return ("weight",) if linear.bias is None else ("weight", "bias")


def can_cast(linears: Sequence[Any], dtype: torch.dtype) -> bool:
    """Return whether layers can be cast together.

    They must be plain linear layers without hooks, with weights in another dtype, and all or none of them with a bias.
    """
    return len({linear.bias is None for linear in linears}) == 1 and all(
        type(linear) is nn.Linear
        and linear.weight.dtype != dtype
        and not is_traceable_wrapper_subclass(linear.weight)
        and "forward" not in vars(linear)
        and not any(getattr(linear, hooks) for hooks in _HOOKS)
        for linear in linears
    )
