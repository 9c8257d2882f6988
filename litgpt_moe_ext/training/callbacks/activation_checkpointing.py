"""Recomputing activations in the backward pass instead of keeping them.

`full` keeps only the input of every block. `selective` recomputes only the experts and dense MLPs, whose activations
are the largest part of a block if experts are wide. The routers' choices are kept, so that they cannot change in the
recomputation.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from litgpt_moe_ext.kernels.side_stream import one_after_the_other
from litgpt_moe_ext.moe.layer import MoE
from litgpt_moe_ext.training.callback import Callback

Mode = Literal["none", "full", "selective"]
Forward = Callable[..., Tensor]


class ActivationCheckpointing(Callback):
    """Apply a mode to every block of a model before it is set up.

    Args:
        mode: `full` or `selective`.
        recomputed: Takes a method of a layer and returns one that recomputes its activations.
    """

    def __init__(self, mode: Mode, recomputed: Callable[[Forward], Forward] | None = None) -> None:
        self._mode = mode
        self._recomputed = recomputed or recomputed_in_backward

    def on_before_setup(self, model: nn.Module) -> None:
        """Wrap methods of the blocks, which keeps the names of parameters."""
        layers: Any = model.get_submodule("transformer.h")
        for block in layers:
            part = block if self._mode == "full" else block.mlp
            name = "all_experts" if isinstance(part, MoE) else "forward"
            setattr(part, name, self._recomputed(getattr(part, name)))


def recomputed_in_backward(forward: Forward) -> Forward:
    """Return a method of a layer that recomputes its activations in the backward pass, also in CUDA graphs.

    The recomputation must draw the same random numbers, from saved generator states. These exist only on the host, out
    of reach of a graph, so a captured method that drew random numbers raises RuntimeError.
    """
    draws = False

    @wraps(forward)
    def forward_recomputed(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal draws
        if not torch.is_grad_enabled():
            return forward(x, *args, **kwargs)
        if torch.compiler.is_compiling() or not x.is_cuda:
            return checkpoint(forward, x, *args, use_reentrant=False, **kwargs)
        if not torch.cuda.is_current_stream_capturing():
            generator = torch.cuda.default_generators[x.get_device()]
            before = generator.get_offset()
            y = checkpoint(forward, x, *args, use_reentrant=False, **kwargs)
            draws |= generator.get_offset() != before
            return y
        if draws:
            raise RuntimeError("activation_checkpointing would draw other random numbers in the backward pass")
        return checkpoint(on_one_stream, x, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def on_one_stream(*args: Any, **kwargs: Any) -> Tensor:
        # The recomputation may begin on any stream, and ends with the last tensor that it needs, which may be before a
        # layer joins its streams.
        with one_after_the_other():
            return forward(*args, **kwargs)

    return forward_recomputed
