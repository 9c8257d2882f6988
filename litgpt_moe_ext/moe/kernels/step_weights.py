"""Shares casts and gradients of the experts' weights among the micro-batches of an optimizer step.

A token visits few experts, but a pass touches the weights of all. In mixed precision they are cast before the forward
and again before the backward pass: 6 bytes of traffic per weight and cast. A gradient is first written by itself; then
autograd reads it and the sum so far, and writes the new sum: 16 bytes in all. Within `StepWeights.shared`, weights are
cast once per optimizer step, and a product adds its gradient to the sum itself: 8 bytes. Results are bit-equal, except
for weights shared by several layers, whose gradients are added in another order.

The caller must know when an optimizer step begins, and that nobody needs the gradient of a single micro-batch. Passes
that run as CUDA graphs meet both conditions.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_sharing: "StepWeights | None" = None


class StepWeights:
    """Keeps weights in the dtype of the products, at the same address from step to step.

    A first pass in the scope of `shared` records which casts are needed; after `keep`, passes use them.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[nn.Parameter, torch.dtype], None] = {}
        self._casts: dict[tuple[nn.Parameter, torch.dtype], Tensor] = {}
        self._fresh = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Share among the passes in this scope, including backward passes, which run in a thread of autograd."""
        global _sharing
        before, _sharing = _sharing, self
        try:
            yield
        finally:
            _sharing = before

    def expire(self) -> None:
        """Mark the casts as stale: a step begins. Tensor versions do not tell, as fused optimizers leave them alone."""
        self._fresh = False

    def refresh(self) -> None:
        """Cast again if the casts are stale; call it before every micro-batch that uses them."""
        weights: list[Tensor] = [weight for weight, _ in self._casts]
        # A weight without a gradient may have changed too, even if another keeps its gradient over the step.
        stale = not self._fresh or any(weight.requires_grad and weight.grad is None for weight in weights)
        if weights and stale:
            with torch.no_grad():
                torch._foreach_copy_(list(self._casts.values()), weights)
        self._fresh = True

    @property
    def size(self) -> int:
        """Bytes that `keep` allocates."""
        return sum(weight.numel() * dtype.itemsize for weight, dtype in self._seen)

    def keep(self) -> None:
        """Allocate memory for the casts that passes have made; `refresh` fills it."""
        self._casts = {(weight, dtype): torch.empty_like(weight, dtype=dtype) for weight, dtype in self._seen}
        self._fresh = False

    def clear(self) -> None:
        """Forget all casts."""
        self._casts.clear()

    def cast(self, weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """Return a weight in `dtype`, from the kept casts if it is among them."""
        if (weight, dtype) in self._casts:
            return self._casts[weight, dtype]
        self._seen[weight, dtype] = None
        return weight.detach().to(dtype)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype`, from the shared casts if there are any."""
    if _sharing is None or weight.dtype == dtype or not isinstance(weight, nn.Parameter):
        return weight.to(dtype)
    return _sharing.cast(weight, dtype)


def gradient_to_extend(weight: Tensor) -> Tensor | None:
    """Return the gradient to which a product may add its own, or None if autograd must add it."""
    if _sharing is None or not isinstance(weight, nn.Parameter) or weight.grad is None:
        return None
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return None
    plain = weight.grad.layout == torch.strided and weight.grad.dtype == weight.dtype and weight.grad.is_contiguous()
    return weight.grad if plain else None
