"""The MoE layers that configurations name: `mlp_class_name: SharedExpertMoE` and `mlp_class_name: NoisyTopKMoE`.

Shape legend: B batch, T tokens (of one sequence, or all of a batch once flattened), D model width.
"""

from typing import Any

import torch.nn as nn
from litgpt.model import LLaMAMLP
from torch import Tensor

from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.routers import GroupedTopKRouter, NoisyTopKRouter, Router


class MoE(nn.Module):
    """Routed experts plus, if the configuration asks for them, shared experts that every token visits.

    `y = sum over chosen experts of gate * expert(x) + shared(x)` (DeepSeekMoE, arXiv:2401.06066, equation 9; the
    residual connection is LitGPT's). Parameters have the names of LitGPT's `LLaMAMoE`, except that the experts are
    stacked; the shared experts are one `LLaMAMLP` of `n_shared_expert` times the width of an expert.

    Args:
        config: A `litgpt.Config` that names one of the subclasses.
    """

    router_class: type[Router]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = self.router_class(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_expert:
            self.shared_experts = LLaMAMLP(config, config.moe_intermediate_size * config.n_shared_expert)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the layer's output, (B, T, D) in the dtype of `x_BTD`."""
        x_TD = x_BTD.reshape(-1, x_BTD.size(-1))
        y_BTD = self.experts(x_TD, self.gate(x_TD)).view(x_BTD.shape)
        return y_BTD if self.shared_experts is None else y_BTD + self.shared_experts(x_BTD)


class SharedExpertMoE(MoE):
    """MoE with DeepSeek-V3's router: optional groups, shared experts, a balancing bias instead of an auxiliary loss."""

    router_class = GroupedTopKRouter


class NoisyTopKMoE(MoE):
    """MoE with noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538)."""

    router_class = NoisyTopKRouter
