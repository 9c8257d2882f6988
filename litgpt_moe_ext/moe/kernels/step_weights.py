"""What the micro-batches of an optimizer step share of the experts' weights.

A token visits few experts, but a pass touches the weights of all. In mixed precision they are cast before the forward
and again before the backward pass, 6 bytes of traffic for each number and cast; their gradient is written by itself,
and autograd reads it with the sum of the earlier ones and writes that sum, 16 bytes from the product on. Within
`StepWeights.shared` they are cast once for an optimizer step, and a product adds its gradient to the sum itself, 8
bytes. Every number is the same to the last bit, but for weights that several layers use, whose gradients are added up
in another order.

Whoever shares must know when an optimizer step begins, and that nobody wants to see the gradient of a single
micro-batch. Passes that run as CUDA graphs know both.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_sharing: "StepWeights | None" = None


class StepWeights:
    """Keeps weights in the dtype of the products, at the same address from step to step.

    A first pass in the scope of `shared` shows which there are; from `keep` on passes find them.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[nn.Parameter, torch.dtype], None] = {}
        self._casts: dict[tuple[nn.Parameter, torch.dtype], Tensor] = {}
        self._fresh = False

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Have the passes in this scope share, the backward pass in autograd's own thread too."""
        global _sharing
        before, _sharing = _sharing, self
        try:
            yield
        finally:
            _sharing = before

    def expire(self) -> None:
        """Take note that an optimizer step begins. Versions of tensors do not tell: fused optimizers leave them."""
        self._fresh = False

    def refresh(self) -> None:
        """Cast again, once in a step; call it before every micro-batch that finds its casts here."""
        weights: list[Tensor] = [weight for weight, _ in self._casts]
        # Weights without a gradient may have changed as well: a step does not begin for all where one has kept its own.
        stale = not self._fresh or any(weight.requires_grad and weight.grad is None for weight in weights)
        if weights and stale:
            with torch.no_grad():
                torch._foreach_copy_(list(self._casts.values()), weights)
        self._fresh = True

    @property
    def size(self) -> int:
        """Bytes of what `keep` keeps."""
        return sum(weight.numel() * dtype.itemsize for weight, dtype in self._seen)

    def keep(self) -> None:
        """Make room for the casts that passes have made; `refresh` fills it."""
        self._casts = {(weight, dtype): torch.empty_like(weight, dtype=dtype) for weight, dtype in self._seen}
        self._fresh = False

    def clear(self) -> None:
        """Forget all casts."""
        self._casts.clear()

    def cast(self, weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """Return a weight in `dtype`: the cast that is kept, if there is one."""
        if (weight, dtype) in self._casts:
            return self._casts[weight, dtype]
        self._seen[weight, dtype] = None
        return weight.detach().to(dtype)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights in `dtype`, those that are kept where passes share them."""
    if _sharing is None or weight.dtype == dtype or not isinstance(weight, nn.Parameter):
        return weight.to(dtype)
    return _sharing.cast(weight, dtype)


def gradient_to_extend(weight: Tensor) -> Tensor | None:
    """Return the gradient that a product may add to in autograd's place, or None if autograd must do it."""
    if _sharing is None or not isinstance(weight, nn.Parameter) or weight.grad is None:
        return None
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return None
    plain = weight.grad.layout == torch.strided and weight.grad.dtype == weight.dtype and weight.grad.is_contiguous()
    return weight.grad if plain else None
