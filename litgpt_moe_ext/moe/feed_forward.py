"""The dense feed-forward network: `mlp_class_name: FeedForward`, shared experts, dense layers between MoE layers."""

from typing import TYPE_CHECKING

import torch.nn as nn
from litgpt.model import LLaMAMLP
from torch import Tensor

from litgpt_moe_ext.moe.activations import Activation

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


class FeedForward(LLaMAMLP):
    """Two projections with an activation between them.

    Parameters have the names that LitGPT gives them: as in `LLaMAMLP` (`fc_1`, `fc_2`, `proj`) with a gated activation,
    as in `GptNeoxMLP` (`fc`, `proj`) otherwise. It is a subclass of `LLaMAMLP` because LitGPT's initialisation scales
    the output projections of that class by the depth of the model.

    Args:
        config: A `litgpt.Config`; uses `n_embd`, `bias`, `mlp_activation` and `gelu_approximate`.
        intermediate_size: Hidden width; `config.intermediate_size` by default.
    """

    intermediate_size: int  # pyrefly: ignore[bad-override-mutable-attribute]: never None here
    fc: nn.Linear

    def __init__(self, config: "Config", intermediate_size: int | None = None) -> None:
        nn.Module.__init__(self)
        self.intermediate_size = intermediate_size or config.intermediate_size
        self.activation = Activation(config.mlp_activation, config.gelu_approximate)
        names = ("fc_1", "fc_2") if self.activation.gated else ("fc",)
        for name in names:
            self.add_module(name, nn.Linear(config.n_embd, self.intermediate_size, bias=config.bias))
        self.proj = nn.Linear(self.intermediate_size, config.n_embd, bias=config.bias)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, of the shape and dtype of `x`."""
        if self.activation.gated:
            return self.proj(self.activation.gate(self.fc_1(x), self.fc_2(x)))
        return self.proj(self.activation(self.fc(x)))
