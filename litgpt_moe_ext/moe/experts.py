"""The routed experts of a layer: feed-forward networks whose weights are stacked along the first dimension.

Shape legend: T tokens, D model width, F hidden width of one expert, E experts, K chosen experts per token, G width of
the first projection (2 * F with a gate), R = T * K routed rows (one for each token and chosen expert).
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.expert_layouts import stack_experts
from litgpt_moe_ext.moe.kernels.backends import BACKENDS, ExpertWeights, Hidden, choose_backend, matmul_dtype
from litgpt_moe_ext.moe.kernels.cpu import grouped_cpu_experts
from litgpt_moe_ext.moe.kernels.grouped_mm import grouped_mm_experts
from litgpt_moe_ext.moe.router import Routing

_GROUPED = {"grouped_cpu": grouped_cpu_experts, "grouped_mm": grouped_mm_experts}


class Experts(nn.Module):
    """E feed-forward networks, each applied to the tokens routed to it.

    With a gated activation, `down(f(gate(x)) * up(x))` (arXiv:2002.05202); otherwise `down(f(up(x)))`. Loads LitGPT's
    per-expert layout (`0.fc_1.weight`, ...) as well as its own.

    Args:
        config: A `litgpt.Config`; uses `n_expert`, `n_embd`, `moe_intermediate_size`, `mlp_activation`,
            `gelu_approximate`, `expert_dropout`, `bias` and `n_layer`.

    Attributes:
        gate_up_proj: Gate projections above up projections, (E, 2F, D); only with a gated activation.
        up_proj: Up projections, (E, F, D); only without.
        down_proj: Down projections, (E, D, F).
        gate_up_bias: (E, 2F), or `up_bias`, (E, F), or None if `config.bias` is false.
        down_bias: (E, D), or None if `config.bias` is false.
        forced_backend: One of `litgpt_moe_ext.moe.kernels.backends.BACKENDS`, or None to choose the fastest that works.
    """

    forced_backend: str | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_expert, self.n_embd = config.n_expert, config.n_embd
        self.intermediate_size = config.moe_intermediate_size
        self.activation = Activation(config.mlp_activation, config.gelu_approximate)
        self.dropout = config.expert_dropout or 0.0
        # LitGPT's scheme: GPT-NeoX's standard deviation for what reads the residual stream, and one that falls with the
        # depth of the model for what writes to it (arXiv:2204.06745, section 2.3).
        self.init_std = math.sqrt(2.0 / 5 / config.n_embd)
        self.init_std_out = 1 / math.sqrt(config.n_embd) / config.n_layer
        E, D, F_ = self.n_expert, self.n_embd, self.intermediate_size
        self._up, G = ("gate_up", 2 * F_) if self.activation.gated else ("up", F_)
        self.register_parameter(f"{self._up}_proj", nn.Parameter(torch.empty(E, G, D)))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        self.register_parameter(f"{self._up}_bias", nn.Parameter(torch.empty(E, G)) if config.bias else None)
        self.register_parameter("down_bias", nn.Parameter(torch.empty(E, D)) if config.bias else None)

    @property
    def weights(self) -> ExpertWeights:
        """The parameters under the names that the backends use."""
        return ExpertWeights(
            getattr(self, f"{self._up}_proj"), getattr(self, f"{self._up}_bias"), self.down_proj, self.down_bias
        )

    def reset_parameters(self) -> None:
        weights = self.weights
        nn.init.normal_(weights.up_EGD, mean=0.0, std=self.init_std)
        nn.init.normal_(weights.down_EDF, mean=0.0, std=self.init_std_out)
        for bias in (weights.up_bias_EG, weights.down_bias_ED):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return, for each token, the weighted sum of its experts' outputs, (T, D) in the dtype of `x_TD`.

        Args:
            x_TD: Tokens.
            routing: The router's decision for them.
        """
        backend = self.backend_for(x_TD)
        hidden = Hidden(self.activation, self.dropout if self.training else 0.0)
        if backend == "loop" or x_TD.is_meta:
            return _loop(x_TD, routing, self.weights, hidden)
        return _GROUPED[backend](x_TD, routing, self.weights, hidden)

    def backend_for(self, x_TD: Tensor) -> str:
        """Return the name of the backend that computes `x_TD` under the present autocast and compiler."""
        if self.forced_backend is None:
            return choose_backend(x_TD.device, matmul_dtype(x_TD), self.n_embd, self.intermediate_size)
        if self.forced_backend not in BACKENDS:
            raise ValueError(f"backend: {self.forced_backend!r} is unknown; choose from {', '.join(BACKENDS)}")
        return self.forced_backend

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        stack_experts(state_dict, prefix, self.n_expert)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"n_expert={self.n_expert}, n_embd={self.n_embd}, intermediate_size={self.intermediate_size}, "
            f"activation={self.activation.name}, bias={self.down_bias is not None}"
        )


def _loop(x_TD: Tensor, routing: Routing, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    """Compute one expert after the other, the reference for the grouped backends."""
    rows_R = routing.experts_TK.flatten().argsort(stable=True)
    tokens_R = rows_R.div(routing.experts_TK.size(1), rounding_mode="floor")
    x_RD = x_TD.index_select(0, tokens_R)
    if x_RD.is_meta:
        # On meta tensors nobody knows which rows go where, but the work is known: every row passes through one expert
        # of the same size. FLOP counters then see the active experts and no others.
        y_RD = _expert(x_RD, ExpertWeights(*(None if w is None else w[0] for w in weights)), hidden)
    else:
        y_RD = _one_by_one(x_RD, routing.counts_E, weights, hidden)
    weights_R1 = routing.weights_TK.flatten().index_select(0, rows_R).unsqueeze(1)
    # The sum over a token's experts is taken in the gate's precision, as Hugging Face's DeepSeek-V3 takes it.
    y_TD = weights_R1.new_zeros(x_TD.shape).index_add(0, tokens_R, y_RD * weights_R1)
    return y_TD.to(x_TD.dtype)


def _one_by_one(x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    # `unbind` keeps the backward pass linear in E: indexing each expert's weight would create a gradient of the size of
    # the whole stack for every expert.
    inputs = x_RD.split(counts_E.tolist())
    none = (None,) * len(inputs)
    experts = zip(*(none if w is None else w.unbind() for w in weights), strict=True)
    return torch.cat([_expert(x, ExpertWeights(*expert), hidden) for x, expert in zip(inputs, experts, strict=True)])


def _expert(x_ND: Tensor, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    # Here the weights are those of one expert.
    a_NF = hidden.activation(F.linear(x_ND, weights.up_EGD, weights.up_bias_EG))
    if len(x_ND) and not x_ND.is_meta and (keep_NF := hidden.dropout_mask(len(x_ND), a_NF)) is not None:
        a_NF = a_NF * keep_NF
    return F.linear(a_NF, weights.down_EDF, weights.down_bias_ED)
