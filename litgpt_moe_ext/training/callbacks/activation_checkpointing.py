"""Computing activations again in the backward pass instead of keeping them.

`full` keeps the input of every block only. `selective` leaves attention and routers as they are and recomputes the
experts and dense MLPs, whose activations are the largest part of a block where experts are wide. What a router has
chosen is kept, so that it cannot come out differently the second time.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litgpt_moe_ext.moe.layer import MoE
from litgpt_moe_ext.training.callback import Callback

Mode = Literal["none", "full", "selective"]


class ActivationCheckpointing(Callback):
    """Apply a mode to every block of a model before it is set up.

    Args:
        mode: `full` or `selective`.
        recompute: Called like `torch.utils.checkpoint.checkpoint`, which it is in training.
    """

    def __init__(self, mode: Mode, recompute: Callable[..., Any] = checkpoint) -> None:
        self._mode = mode
        self._recompute = partial(recompute, use_reentrant=False)

    def on_before_setup(self, model: nn.Module) -> None:
        """Wrap methods of the blocks, which leaves the names of parameters as they are."""
        layers: Any = model.get_submodule("transformer.h")
        for block in layers:
            part = block if self._mode == "full" else block.mlp
            name = "all_experts" if isinstance(part, MoE) else "forward"
            setattr(part, name, _recomputed(self._recompute, getattr(part, name)))


def _recomputed(recompute: Callable[..., Any], forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def forward_recomputed(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return recompute(forward, *args, **kwargs)

    return forward_recomputed
