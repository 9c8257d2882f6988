"""The loss without the logits (`litgpt_moe_ext.loss.linear`) in LitGPT's loop.

Shape legend: B batch, T tokens, D model width.

LitGPT's loop calls the model for logits, then another function for the loss. So during training the head returns its
input, and the loss function computes the head.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.loss.linear import linear_loss
from litgpt_moe_ext.moe.balancing.gradient_injection import remember_scale
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

    On a CPU the product is computed in float32, even under autocast. On a GPU it is computed as in the head, in
    autocast's dtype or that of its input, with sums and softmax in float32.
    """

    def __init__(self) -> None:
        self._head: nn.Linear | None = None
        # The dtype in which the head would have multiplied; None unless the loss has yet to do that.
        self._product_dtype: torch.dtype | None = None

    def on_before_setup(self, model: nn.Module) -> None:
        """Have the model's head return its input during training."""
        head: Any = model.get_submodule("lm_head")
        self._head = head
        project = head.forward

        def forward(x_BTD: Tensor) -> Tensor:
            if not (model.training and torch.is_grad_enabled()):
                return project(x_BTD)
            self._product_dtype = matmul_dtype(x_BTD)
            return x_BTD

        head.forward = forward

    def wrap(self, cross_entropy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss function that also computes the output head if the head returned its input.

        Args:
            cross_entropy: LitGPT's function, for everything else.
        """

        def loss(logits: Tensor | list[Tensor], targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            dtype, self._product_dtype = self._product_dtype, None
            if dtype is None or self._head is None or isinstance(logits, list):
                return cross_entropy(logits, targets, *args, **kwargs)
            return remember_scale(linear_loss(logits, targets, self._head, dtype))

        return loss
