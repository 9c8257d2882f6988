"""The output head and its cross-entropy together, without all logits at once.

LitGPT 0.5.13 computes all logits, then the loss in chunks. With a vocabulary of 49,152 the logits of 2048 tokens take
400 MB, their gradient as much again, and the softmax in between a third time. torch's `linear_cross_entropy` computes
the output head and the loss together, a few rows at a time, and keeps only the gradients of its inputs.

Shape legend: B batch, T tokens (of all sequences without B), D model width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt_moe_ext.loss.cross_entropy import has_kernel, loss_and_gradient
from litgpt_moe_ext.tokens.padding import PADDING


def linear_loss(x_BTD: Tensor, targets_BT: Tensor, head: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return the mean cross-entropy of `head(x_BTD)`, never computed as a whole; 0 without counted targets.

    Args:
        x_BTD: Input of the output head.
        targets_BT: Token ids, int64; -100 is not counted.
        head: The output head.
        dtype: Dtype of the products on a GPU, with sums and softmax in float32. On a CPU they are float32.
    """
    x_TD, targets_T = x_BTD.reshape(-1, x_BTD.size(-1)), targets_BT.reshape(-1)
    device = x_TD.device.type
    if device != "cpu" and dtype in (torch.bfloat16, torch.float16):
        return _HalfProducts.apply(x_TD, head.weight, head.bias, targets_T, dtype)
    some = (targets_T != PADDING).any()
    # The mean over no tokens, and its gradients, would be NaN; 0 times the loss of one token is not.
    targets_T = torch.where(some, targets_T, targets_T.clamp_min(0))
    bias = None if head.bias is None else head.bias.float()
    with torch.autocast(device, enabled=False):
        mean = F.linear_cross_entropy(
            x_TD.float(),
            head.weight.float(),
            targets_T,
            linear_bias=bias,
            ignore_index=PADDING,
            options=nn.LinearCrossEntropyOptions(),
        )
    return mean * some


# Logits in memory at once: 128 MiB in float32.
_LOGITS = 1 << 25


class _HalfProducts(torch.autograd.Function):
    """The mean loss from products of 16-bit operands; torch's own function rounds such a loss to 16 bits."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_T: Tensor, dtype: torch.dtype
    ) -> Tensor:
        with torch.autocast(x_TD.device.type, enabled=False):
            half_x_TD, half_weight_VD = x_TD.to(dtype), weight_VD.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=x_TD.device)
            grad_x_TD = torch.empty_like(half_x_TD)
            grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
            grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
            rows = max(128, _LOGITS // len(weight_VD))
            for start in range(0, len(x_TD), rows):
                part = slice(start, start + rows)
                logits_TV = _product(half_x_TD[part], half_weight_VD.t())
                if bias_V is not None:
                    logits_TV += bias_V
                loss, grad_TV = _loss_and_gradient(logits_TV, targets_T[part], dtype)
                total += loss
                grad_x_TD[part] = grad_TV @ half_weight_VD
                grad_weight_VD += _product(grad_TV.t(), half_x_TD[part])
                if grad_bias_V is not None:
                    grad_bias_V += grad_TV.sum(dim=0, dtype=torch.float32)
            count = (targets_T != PADDING).sum().clamp(min=1)
        ctx.save_for_backward(grad_x_TD, grad_weight_VD, grad_bias_V, count)
        ctx.dtypes = x_TD.dtype, weight_VD.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_TD, grad_weight_VD, grad_bias_V, count = ctx.saved_tensors
        scale = grads[0].float() / count
        x_dtype, weight_dtype = ctx.dtypes
        # A GPU would round the scale to the 16 bits of the other factor, an error of up to 0.2 %.
        grad_x_TD = (grad_x_TD.float() * scale).to(x_dtype)
        grad_bias = None if grad_bias_V is None else (grad_bias_V * scale).to(weight_dtype)
        return grad_x_TD, (grad_weight_VD * scale).to(weight_dtype), grad_bias, None, None


def _loss_and_gradient(logits_TV: Tensor, targets_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses and its gradient in `dtype`; the logits may be overwritten.

    The gradient is not yet divided by the number of targets: in float16, a gradient divided by thousands would vanish.
    """
    if has_kernel(logits_TV, targets_T):
        return loss_and_gradient(logits_TV, targets_T, dtype)
    counts_T1 = (targets_T != PADDING).unsqueeze(1)
    index_T1 = targets_T.clamp_min(0).unsqueeze(1)
    normalizer_T1 = logits_TV.logsumexp(dim=1, keepdim=True)
    loss = ((normalizer_T1 - logits_TV.gather(1, index_T1)) * counts_T1).sum()
    grad_TV = logits_TV.sub_(normalizer_T1).exp_().scatter_add_(1, index_T1, -counts_T1.float())
    return loss, (grad_TV * counts_T1).to(dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    # The product of 16-bit matrices, in float32.
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
