"""What a backend is called with, and what it must return.

Shape legend: T tokens, E experts, D model width, F hidden width of one expert, G width of the first projection (2 * F
with a gate), N rows of one expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.moe.activations import Activation


class ExpertWeights(NamedTuple):
    """Stacked weights of the experts; biases may be None."""

    up_EGD: Tensor
    up_bias_EG: Tensor | None
    down_EDF: Tensor
    down_bias_ED: Tensor | None


class Hidden(NamedTuple):
    """What happens between the two projections of an expert.

    Attributes:
        activation: The activation function.
        dropout: Probability that a hidden activation is dropped; 0 in evaluation.
    """

    activation: Activation
    dropout: float = 0.0

    def dropout_mask(self, n_row: int, like_NF: Tensor) -> Tensor | None:
        """Return factors for `n_row` rows as wide as `like_NF`, 0 or 1 / (1 - dropout); None without dropout."""
        if not self.dropout:
            return None
        return like_NF.new_empty(n_row, like_NF.size(1)).bernoulli_(1 - self.dropout).div_(1 - self.dropout)


def has_gradient(*tensors: Tensor | None) -> bool:
    """Return whether a result of `tensors` would have a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_sums(name: str, y_TD: object, x_TD: Tensor, learns: bool) -> None:
    """Raise if a backend of another package returns something malformed; values are not checked.

    Args:
        name: Name of the backend.
        y_TD: Its result.
        x_TD: The tokens that it was given.
        learns: Whether the tokens or the weights need a gradient.
    """
    if not isinstance(y_TD, Tensor):
        raise TypeError(f"expert backend {name!r} returns a {type(y_TD).__name__}; it must return a tensor")
    if y_TD.shape != x_TD.shape or y_TD.dtype != x_TD.dtype:
        raise ValueError(
            f"expert backend {name!r} returns {tuple(y_TD.shape)} in {y_TD.dtype}; (T, D) is {tuple(x_TD.shape)}, in "
            f"the {x_TD.dtype} of the tokens"
        )
    if learns and not y_TD.requires_grad:
        raise ValueError(
            f"expert backend {name!r} returns sums without a gradient; tokens and experts need one to learn"
        )
