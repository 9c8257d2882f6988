"""Losses on which no model's autograd graph hangs: their backward pass is a function.

LitGPT's loop keeps its last loss. If the autograd graph of an eager pass lived on with it, its nodes that add up
gradients would run on the stream of that pass, where nothing may happen while other passes are captured.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DetachedLosses:
    """Makes losses, of which the last one can go backward, once."""

    def __init__(self) -> None:
        self._anchor = torch.zeros((), requires_grad=True)
        self._turn = 0

    def __call__(self, loss: Tensor, backward: Callable[[Tensor], None]) -> Tensor:
        """Return a copy of a loss, a scalar, whose backward pass is `backward`, which takes its gradient."""
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
        # The next micro-batch writes its loss where this one did.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        run, ctx.run = ctx.run, _raise_second
        run(grads[0])
        return None, None, None


def _raise_second(_grad: Tensor) -> None:
    raise RuntimeError("the backward pass of a loss can run once only")
