"""Losses detached from the model's autograd graph, with a function as backward pass.

LitGPT's loop keeps its last loss. If that kept the autograd graph of an eager pass alive, the graph's gradient
accumulation nodes would run on the stream of that pass, which must stay idle while other passes are captured.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DetachedLosses:
    """Makes losses; only the latest allows a backward pass, and only one."""

    def __init__(self) -> None:
        self._anchor = torch.zeros((), requires_grad=True)
        self._turn = 0

    def __call__(self, loss: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        """Return a copy of a scalar loss whose backward pass calls `backward` with the gradient of the loss."""
        self._turn = turn = self._turn + 1

        def once(grad: Tensor) -> None:
            if turn != self._turn:
                raise RuntimeError("the backward pass of a loss must run before the next loss is computed")
            backward(grad)

        return _Detached.apply(self._anchor, loss, once)


class _Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        ctx.run = backward
        # A copy, because the next micro-batch writes its loss to the same address.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        run, ctx.run = ctx.run, _raise_second
        run(grads[0])
        return None, None, None


def _raise_second(_grad: Tensor) -> None:
    raise RuntimeError("the backward pass of a loss can run once only")
