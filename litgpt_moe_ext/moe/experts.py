"""The routed experts of a layer: feed-forward networks whose weights are stacked along the first dimension.

Shape legend: T tokens, D model width, F hidden width of one expert, E experts, K chosen experts per token, G width of
the first projection (2 * F with a gate), R = T * K routed rows (one for each token and chosen expert).
"""

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.kernels.side_stream import added, join
from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.expert_layouts import stack_experts
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights, Hidden, check_sums, has_gradient
from litgpt_moe_ext.moe.kernels.choice import backend_for
from litgpt_moe_ext.moe.kernels.registry import BACKENDS, OWN
from litgpt_moe_ext.moe.routing.router import Routing


class Experts(nn.Module):
    """E feed-forward networks, each applied to the tokens routed to it.

    With a gated activation, `down(f(gate(x)) * up(x))` (arXiv:2002.05202); otherwise `down(f(up(x)))`. Loads LitGPT's
    per-expert layout (`0.fc_1.weight`, ...) as well as its own.

    Args:
        config: A `litgpt.Config`; uses `n_expert`, `n_embd`, `moe_intermediate_size`, `mlp_activation`,
            `gelu_approximate`, `expert_dropout`, `expert_backend`, `expert_gate_on_input`, `bias` and `n_layer`.

    Attributes:
        gate_up_proj: Gate projections above up projections, (E, 2F, D); only with a gated activation.
        up_proj: Up projections, (E, F, D); only without.
        down_proj: Down projections, (E, D, F).
        gate_up_bias: (E, 2F), or `up_bias`, (E, F), or None if `config.bias` is false.
        down_bias: (E, D), or None if `config.bias` is false.
        forced_backend: One of `litgpt_moe_ext.moe.kernels.registry.BACKENDS`, or None to choose the fastest that works.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_expert, self.n_embd = config.n_expert, config.n_embd
        self.intermediate_size = config.moe_intermediate_size
        self.activation = Activation(config.mlp_activation, config.gelu_approximate)
        self.dropout = config.expert_dropout or 0.0
        self.gate_on_input = bool(config.expert_gate_on_input)
        self.forced_backend: str | None = config.expert_backend
        # LitGPT's scheme: GPT-NeoX's standard deviation for weights that read the residual stream, and one that falls
        # with the depth of the model for weights that write to it (arXiv:2204.06745, section 2.3).
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
        """The parameters, by the names that the backends use."""
        return ExpertWeights(
            getattr(self, f"{self._up}_proj"), getattr(self, f"{self._up}_bias"), self.down_proj, self.down_bias
        )

    def reset_parameters(self) -> None:
        """Initialise the weights as LitGPT does for pretraining; biases are zero."""
        weights = self.weights
        nn.init.normal_(weights.up_EGD, mean=0.0, std=self.init_std)
        nn.init.normal_(weights.down_EDF, mean=0.0, std=self.init_std_out)
        for bias in (weights.up_bias_EG, weights.down_bias_ED):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_TD: Tensor, routing: Routing, added_TD: Tensor | None = None) -> Tensor:
        """Return, for each token, the weighted sum of its experts' outputs, (T, D) in the dtype of `x_TD`.

        Args:
            x_TD: Tokens.
            routing: The router's decision for them.
            added_TD: Added to the sum, such as the output of the shared experts; None for nothing.

        Returns:
            The sums; at padding the values are arbitrary, and may be NaN.
        """
        if routing.real_T is not None:
            x_TD = _EndAtPadding.apply(x_TD, routing.real_T)
        if self.gate_on_input:
            # Every choice becomes a row of its own, for one expert at weight 1.
            x_TKD = x_TD.unsqueeze(1) * routing.weights_TK.unsqueeze(2)
            y_RD = self._compute(x_TKD.flatten(0, 1).to(x_TD.dtype), _one_choice_per_row(routing), None)
            y_TD = y_RD if x_TKD.size(1) == 1 else y_RD.view(x_TKD.shape).sum(1)
            return added(y_TD, added_TD)
        return self._compute(x_TD, routing, added_TD)

    def _compute(self, x_TD: Tensor, routing: Routing, added_TD: Tensor | None) -> Tensor:
        hidden = Hidden(self.activation, self.dropout if self.training else 0.0)
        # On the meta device the loop stands for all backends: it does the work of the active experts.
        name = "loop" if x_TD.is_meta else self.backend_for(x_TD, torch.compiler.is_compiling())
        backend, arguments = BACKENDS[name], (x_TD, routing, self.weights, hidden)
        if name not in OWN and added_TD is not None:
            join()
        y_TD = backend.function(*arguments, *([added_TD] if backend.adds else ()))
        if name not in OWN:
            check_sums(name, y_TD, x_TD, has_gradient(x_TD, self.down_proj))
        return y_TD if backend.adds else added(y_TD, added_TD)

    def backend_for(self, x_TD: Tensor, compiling: bool = False) -> str:
        """Return the name of the backend that computes `x_TD` under the present autocast.

        Args:
            x_TD: Tokens.
            compiling: Whether `torch.compile` traces the layer.
        """
        widths = (self.n_embd, self.intermediate_size)
        return backend_for(x_TD.device, matmul_dtype(x_TD), widths, compiling, self.forced_backend)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        stack_experts(state_dict, prefix, self.n_expert)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        return (
            f"n_expert={self.n_expert}, n_embd={self.n_embd}, intermediate_size={self.intermediate_size}, "
            f"activation={self.activation.name}, bias={self.down_bias is not None}"
        )


class _EndAtPadding(torch.autograd.Function):
    """The identity, whose gradient is 0 at padding: no expert writes these rows, so their memory is uninitialised."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, real_T: Tensor) -> Tensor:
        ctx.save_for_backward(real_T)
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_TD,), (real_T,) = grads, ctx.saved_tensors
        return torch.where(real_T.unsqueeze(1), grad_TD, 0.0), None


def _one_choice_per_row(routing: Routing) -> Routing:
    experts_R1 = routing.experts_TK.reshape(-1, 1)
    real_R, top_k = routing.real_T, routing.experts_TK.size(1)
    if real_R is not None and top_k > 1:
        real_R = real_R.repeat_interleave(top_k)
    ones_R1 = torch.ones_like(experts_R1, dtype=routing.weights_TK.dtype)
    # Of the decision only the order of rows is used, which is unchanged.
    return Routing(ones_R1, experts_R1, routing.counts_E, real_R, routing.decision)
