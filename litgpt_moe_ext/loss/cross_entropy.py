"""The mean cross-entropy of logits, on a GPU in three launches and without a copy of them.

LitGPT computes it in chunks of 128 tokens from float32 logits. On a GPU this takes some five launches per chunk and, in
bfloat16 training, 44 bytes of traffic per logit; in a small model with a large vocabulary, logits outnumber everything
else together. Here each logit is read once forward, in the 16 bits that the output head wrote, and once backward, when
its gradient replaces it: 6 bytes.

Shape legend: T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from litgpt_moe_ext.kernels.launch import operators_are_unwatched

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def has_kernel(logits: Tensor, targets: Tensor) -> bool:
    """Return whether `mean_cross_entropy` can be used: on a GPU, with nothing intercepting operators."""
    return (
        operators_are_unwatched(logits)
        and logits.dtype in _DTYPES
        and type(targets) is Tensor
        and targets.dtype == torch.int64
        and targets.device == logits.device
    )


def mean_cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Return the mean cross-entropy of the counted targets, a scalar, float32; 0 if there are none.

    Sums are float32 and in a fixed order, so two runs give the same bits.

    Args:
        logits_TV: Logits, 16-bit or float32. The backward pass, which can run once, overwrites them with their
            gradient; autograd refuses to read them after that.
        targets_T: Token ids, int64; -100 is not counted. The loss of an id outside the vocabulary is NaN.
    """
    return _CrossEntropy.apply(logits_TV, targets_T)


def loss_and_gradient(logits_TV: Tensor, targets_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses, a scalar, float32, and its gradient by the logits, in `dtype`.

    Args:
        logits_TV: Logits, 16-bit or float32, the elements of a row contiguous.
        targets_T: As above.
        dtype: 16-bit or float32.
    """
    targets_T = targets_T.contiguous()
    losses_T, normalizers_T = _kernels().row_losses(logits_TV, targets_T)
    gradient_TV, one = torch.empty_like(logits_TV, dtype=dtype), losses_T.new_ones(())
    _kernels().gradients(logits_TV, targets_T, normalizers_T, (one, one), gradient_TV)
    return losses_T.sum(), gradient_TV


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor) -> Tensor:
        logits_TV = logits_TV if logits_TV.stride(-1) == 1 else logits_TV.contiguous()
        targets_T = targets_T.contiguous()
        mean, normalizers_T, share = _kernels().mean_loss(logits_TV, targets_T)
        ctx.save_for_backward(logits_TV, targets_T, normalizers_T, share)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        logits_TV, targets_T, normalizers_T, share = ctx.saved_tensors
        _kernels().gradients(logits_TV, targets_T, normalizers_T, (grads[0], share), logits_TV)
        torch.autograd.graph.increment_version(logits_TV)  # autograd does not see the kernel's writes
        return logits_TV.detach(), None


def _kernels() -> Any:
    from litgpt_moe_ext.loss import cross_entropy_kernels

    return cross_entropy_kernels
