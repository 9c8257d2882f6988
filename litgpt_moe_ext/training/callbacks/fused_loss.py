"""The loss without the logits.

LitGPT 0.5.13 computes all logits, then the loss in chunks. With a vocabulary of 49,152 the logits of 2048 tokens take
400 MB, their gradient as much again, and the softmax in between a third time. torch's `linear_cross_entropy` takes the
output head and the loss together, a few rows at a time, and keeps only the gradients of its inputs.

Shape legend: B batch, T tokens (of all sequences where there is no B), D model width, V vocabulary.

LitGPT's loop calls the model for logits and then another function for the loss. In training the head therefore returns
its input, and the loss function computes the head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.moe.gradient_injection import remember_scale
from litgpt_moe_ext.padding import PADDING
from litgpt_moe_ext.training.callback import Callback


def require_torch() -> None:
    """Raise SettingsError unless the installed torch has the loss that `linear_loss` uses."""
    if not hasattr(F, "linear_cross_entropy"):
        raise SettingsError(
            f"fused_cross_entropy: true needs a torch that has torch.nn.functional.linear_cross_entropy; "
            f"{torch.__version__} has none. Upgrade torch, or leave the setting out."
        )


class FusedLoss(Callback):
    """Replace the output head's `forward` and the loss function; evaluation and generation still get logits.

    On a CPU the product is done in float32, also under autocast. On a GPU it is done as the head would do it, in
    autocast's type or that of its input, with sums and softmax in float32.
    """

    def __init__(self) -> None:
        self._head: nn.Linear | None = None
        self._waiting = False

    def on_before_setup(self, model: nn.Module) -> None:
        """Have the head of the model return its input while it trains."""
        head: Any = model.get_submodule("lm_head")
        self._head = head
        project = head.forward

        def forward(x_BTD: Tensor) -> Tensor:
            if not (model.training and torch.is_grad_enabled()):
                return project(x_BTD)
            self._waiting = True
            return x_BTD

        head.forward = forward

    def wrap(self, cross_entropy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss function that computes the output head if the head has left that to it.

        Args:
            cross_entropy: LitGPT's function, for everything else.
        """

        def loss(logits: Tensor | list[Tensor], targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not self._waiting or self._head is None or isinstance(logits, list):
                return cross_entropy(logits, targets, *args, **kwargs)
            self._waiting = False
            return remember_scale(linear_loss(logits, targets, self._head))

        return loss


def linear_loss(x_BTD: Tensor, targets_BT: Tensor, head: nn.Linear) -> Tensor:
    """Return the mean cross-entropy of `head(x_BTD)`, without making all of it; 0 where no target counts.

    Args:
        x_BTD: Input of the output head.
        targets_BT: Token ids, int64; -100 is left out.
        head: The output head.
    """
    x_TD, targets_T = x_BTD.reshape(-1, x_BTD.size(-1)), targets_BT.reshape(-1)
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
    if device != "cpu" and dtype in (torch.bfloat16, torch.float16):
        return _HalfProducts.apply(x_TD, head.weight, head.bias, targets_T, dtype)
    some = (targets_T != PADDING).any()
    # The mean over no token, and its gradients, would be NaN. 0 times the loss of one token is not.
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


# Logits that exist at once, in float32: 128 MiB.
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
                counts_T1 = (targets_T[part] != PADDING).unsqueeze(1)
                index_T1 = targets_T[part].clamp_min(0).unsqueeze(1)
                logits_TV = _product(half_x_TD[part], half_weight_VD.t())
                if bias_V is not None:
                    logits_TV += bias_V
                normalizer_T1 = logits_TV.logsumexp(dim=1, keepdim=True)
                total += ((normalizer_T1 - logits_TV.gather(1, index_T1)) * counts_T1).sum()
                # The gradient of the logits before it is divided by the number of targets: in float16, what has been
                # divided by thousands would vanish.
                grad_TV = logits_TV.sub_(normalizer_T1).exp_().scatter_add_(1, index_T1, -counts_T1.float())
                grad_TV *= counts_T1
                half_grad_TV = grad_TV.to(dtype)
                grad_x_TD[part] = half_grad_TV @ half_weight_VD
                grad_weight_VD += _product(half_grad_TV.t(), half_x_TD[part])
                if grad_bias_V is not None:
                    grad_bias_V += grad_TV.sum(dim=0)
            count = (targets_T != PADDING).sum().clamp(min=1)
        ctx.save_for_backward(grad_x_TD, grad_weight_VD, grad_bias_V, count)
        ctx.dtypes = x_TD.dtype, weight_VD.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x_TD, grad_weight_VD, grad_bias_V, count = ctx.saved_tensors
        scale = grads[0].float() / count
        x_dtype, weight_dtype = ctx.dtypes
        # A GPU would round the scale to the 16 bits of what it is multiplied with, which is off by up to 0.2 %.
        grad_x_TD = (grad_x_TD.float() * scale).to(x_dtype)
        grad_bias = None if grad_bias_V is None else (grad_bias_V * scale).to(weight_dtype)
        return grad_x_TD, (grad_weight_VD * scale).to(weight_dtype), grad_bias, None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    # Of 16-bit matrices, in float32.
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
