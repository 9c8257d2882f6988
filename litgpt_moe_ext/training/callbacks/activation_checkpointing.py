"""Computing activations again in the backward pass instead of keeping them.

`full` keeps the input of every block only. `selective` leaves the attention as it is and recomputes the MLP, whose
activations are by far the largest part of an MoE block; the router's choice of experts is kept, so that it cannot come
out differently the second time.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from litgpt_moe_ext.moe.kernels.fused_router import route_operator
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
        """Wrap the blocks' `forward`, which leaves the names of parameters as they are."""
        layers: Any = model.get_submodule("transformer.h")
        for block in layers:
            if self._mode == "full":
                block.forward = _recomputed(self._recompute, block.forward)
            else:
                block.mlp.forward = _recomputed(partial(self._recompute, context_fn=_keep_choices), block.mlp.forward)


def _recomputed(recompute: Callable[..., Any], forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(forward)
    def forward_recomputed(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return recompute(forward, *args, **kwargs)

    return forward_recomputed


def _keep_choices() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.topk.default, route_operator])
