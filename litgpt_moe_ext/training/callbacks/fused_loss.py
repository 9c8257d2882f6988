"""The loss without the logits.

LitGPT 0.5.13 computes all logits, then the loss in chunks. With a vocabulary of 49,152 the logits of 2048 tokens take
400 MB, their gradient as much again, and the softmax in between a third time. torch's `linear_cross_entropy` takes the
output head and the loss together, a few rows at a time, and keeps only the gradients of its inputs.

LitGPT's loop asks the model for logits and another function for the loss. In training the head therefore hands on its
input, and the loss function does the head's work.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.moe.gradient_injection import remember_scale
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.steps.batches import IGNORE_INDEX


def require_torch() -> None:
    """Raise SettingsError unless the installed torch has the loss that `linear_loss` uses."""
    if not hasattr(F, "linear_cross_entropy"):
        raise SettingsError(
            f"fused_cross_entropy: true needs a torch that has torch.nn.functional.linear_cross_entropy; "
            f"{torch.__version__} has none. Upgrade torch, or leave the setting out."
        )


class FusedLoss(Callback):
    """Replace the output head's `forward` and the loss function; evaluation and generation still see logits.

    The product is done in float32, also under autocast.
    """

    def __init__(self) -> None:
        self._head: nn.Linear | None = None
        self._waiting = False

    def on_before_setup(self, model: nn.Module) -> None:
        """Have the head of the model hand on its input while it trains."""
        config: Any = model.config
        if config.final_logit_softcapping is not None:
            raise SettingsError(
                f"fused_cross_entropy: true cannot be combined with final_logit_softcapping: "
                f"{config.final_logit_softcapping}"
            )
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
        """Return a loss function that does the head's work where the head has left it.

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
    targets_T = targets_BT.reshape(-1)
    some = (targets_T != IGNORE_INDEX).any()
    # The mean of nothing, and its gradients, would be NaN: 0 times the loss of one token is not.
    targets_T = torch.where(some, targets_T, targets_T.clamp_min(0))
    bias = None if head.bias is None else head.bias.float()
    x_TD = x_BTD.reshape(-1, x_BTD.size(-1)).float()
    with torch.autocast(x_TD.device.type, enabled=False):
        mean = F.linear_cross_entropy(
            x_TD,
            head.weight.float(),
            targets_T,
            linear_bias=bias,
            ignore_index=IGNORE_INDEX,
            options=nn.LinearCrossEntropyOptions(),
        )
    return mean * some
