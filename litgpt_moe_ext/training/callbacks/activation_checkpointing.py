"""Computing activations again in the backward pass instead of keeping them.

`full` keeps the input of every block only. `selective` leaves the attention as it is and recomputes the MLP, whose
activations are by far the largest part of an MoE block; the router's choice of experts is kept, so that it cannot come
out differently the second time.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from litgpt_moe_ext.training.callback import Callback

Mode = Literal["none", "full", "selective"]


class ActivationCheckpointing(Callback):
    """Apply a mode to every block of a model before it is set up.

    Args:
        mode: `full` or `selective`.
    """

    def __init__(self, mode: Mode) -> None:
        self._mode = mode

    def on_before_setup(self, model: nn.Module) -> None:
        """Wrap the blocks' `forward`, which leaves the names of parameters as they are."""
        layers: Any = model.get_submodule("transformer.h")
        for block in layers:
            if self._mode == "full":
                block.forward = _recomputed(block.forward)
            else:
                block.mlp.forward = _recomputed(block.mlp.forward, context_fn=_keep_choices)


def _recomputed(forward: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    @wraps(forward)
    def forward_recomputed(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return forward_recomputed


def _keep_choices() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.topk.default])
