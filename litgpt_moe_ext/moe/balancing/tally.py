"""Counts the tokens of each expert, and sums a router's other statistics, over an optimizer step.

The backward pass does the counting. Each router owns a leaf tensor that takes part in no computation; an autograd
function returns the token counts and other statistics of the batch as the "gradient" of that leaf. Autograd then does
by itself what a counter in the forward pass would need code for: a batch counts once however often activation
checkpointing repeats the forward pass, evaluation does not count, gradient accumulation adds up, and `torch.compile`
sees a pure function. The leaf is neither a parameter nor a buffer, so no optimizer, gradient clipping, precision
conversion or distributed wrapper touches it.

A load-balancing loss over the global batch needs the counts of all ranks before the step ends; see
`litgpt_moe_ext.moe.balancing.step_shares`.

Shape legend: N numbers.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Tally:
    """Sums of numbers, such as the tokens of each expert, over all batches since the last `take`.

    Args:
        size: How many numbers.
    """

    def __init__(self, size: int) -> None:
        # Created where the router's parameters are, so that it need not be moved later.
        self._leaf_N = _new_leaf(size, torch.empty(0).device)

    def leaf_on(self, device: torch.device) -> Tensor:
        """Return the leaf, (N,) on `device`. Whatever a backward pass returns as its gradient is added to the tally."""
        if self._leaf_N.device != device:
            sums_N = self._leaf_N.grad
            self._leaf_N = _new_leaf(self._leaf_N.numel(), device)
            if sums_N is not None:
                self._leaf_N.grad = sums_N.to(device, self._leaf_N.dtype)
        return self._leaf_N

    def follow(self, change: Callable[[Tensor], Tensor]) -> None:
        """Move to the device to which `change`, the function of `nn.Module._apply`, moves a router's tensors.

        Eager code could do this at the next batch, but compilers cannot trace the creation of a leaf.
        """
        # From the meta device nothing can be moved: weights have been put in place of those that were there.
        here = torch.device("cpu") if self._leaf_N.is_meta else self._leaf_N.device
        self.leaf_on(change(torch.empty(0, device=here)).device)

    @property
    def pending(self) -> bool:
        """Whether a backward pass has added something since the last `take`. Does not synchronise."""
        return self._leaf_N.grad is not None

    def take(self) -> Tensor:
        """Return the sums, (N,) in float64 (float32 on devices without it), and start again from zero."""
        sums_N = self._leaf_N.grad
        self._leaf_N.grad = None
        return torch.zeros_like(self._leaf_N.detach()) if sums_N is None else sums_N


def sum_over_ranks(sums_N: Tensor) -> None:
    """Add the sums of the other processes in place; do nothing in a single process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums_N)


def counting_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of counts: float64, or float32 on devices without it."""
    # float64 holds every integer up to 2**53; float32 only up to 2**24, which a large batch can exceed.
    return torch.float32 if device.type == "mps" else torch.float64


def _new_leaf(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=counting_dtype(device), device=device, requires_grad=True)
