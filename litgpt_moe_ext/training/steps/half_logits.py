"""Logits in the 16 bits of the output head, up to the kernel of the loss.

Fabric returns the outputs of a model in float32. Of logits that is a copy twice as large as they are, for a loss whose
kernel (`litgpt_moe_ext.loss.cross_entropy`) computes in float32 anyway. So the model that trains leaves them as they
are, and the loss function converts what goes to another one: the same operators in the same order.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from lightning.fabric.plugins.precision import Precision
from torch import Tensor

from litgpt_moe_ext.loss.cross_entropy import has_kernel, mean_cross_entropy
from litgpt_moe_ext.moe.gradient_injection import remember_scale


@contextlib.contextmanager
def unconverted(precision: Precision) -> Iterator[None]:
    """Have Fabric return outputs as the model computed them, for the time of the scope.

    Args:
        precision: Fabric's.
    """
    precision.convert_output = _as_it_is
    try:
        yield
    finally:
        del precision.convert_output  # and the method of the class is there again


def loss_of_logits(cross_entropy: Callable[..., Tensor], precision: Precision) -> Callable[..., Tensor]:
    """Return a loss function that takes logits as the output head wrote them.

    Args:
        cross_entropy: LitGPT's function, for all that the kernel cannot take.
        precision: Fabric's, which converts logits for it.
    """

    def loss(logits: Tensor | list[Tensor], targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if isinstance(logits, Tensor) and has_kernel(logits, targets):
            return remember_scale(mean_cross_entropy(logits.reshape(-1, logits.size(-1)), targets.reshape(-1)))
        return cross_entropy(precision.convert_output(logits), targets, *args, **kwargs)

    return loss


def _as_it_is(data: Any) -> Any:
    return data
