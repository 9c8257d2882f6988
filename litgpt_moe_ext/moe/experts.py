"""The routed experts of a layer: feed-forward networks whose weights are stacked along the first dimension.

Shape legend: T tokens, D model width, F hidden width of one expert, E experts, K chosen experts per token, R = T * K
routed rows (one for each token and chosen expert).
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.moe.backends import BACKENDS, choose_backend, matmul_dtype
from litgpt_moe_ext.moe.grouped_cpu import grouped_cpu_experts
from litgpt_moe_ext.moe.grouped_mm import grouped_mm_experts
from litgpt_moe_ext.moe.routers import Routing

# Names of one expert's weights in LitGPT's `LLaMAMoE`, whose checkpoints keep a module per expert.
_PER_EXPERT = {"gate_up_proj": ("fc_1.weight", "fc_2.weight"), "down_proj": ("proj.weight",)}
_PER_EXPERT_BIAS = {"gate_up_bias": ("fc_1.bias", "fc_2.bias"), "down_bias": ("proj.bias",)}


class Experts(nn.Module):
    """E SwiGLU networks, `down(silu(gate(x)) * up(x))` (arXiv:2002.05202), each applied to the tokens routed to it.

    Loads LitGPT's per-expert layout (`0.fc_1.weight`, ...) as well as its own.

    Args:
        config: A `litgpt.Config`; uses `n_expert`, `n_embd`, `moe_intermediate_size`, `bias` and `n_layer`.

    Attributes:
        gate_up_proj: Gate projections above up projections, (E, 2F, D).
        down_proj: Down projections, (E, D, F).
        gate_up_bias: (E, 2F), or None if `config.bias` is false.
        down_bias: (E, D), or None if `config.bias` is false.
        forced_backend: One of `litgpt_moe_ext.moe.backends.BACKENDS`, or None to choose the fastest that works.
    """

    forced_backend: str | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_expert, self.n_embd = config.n_expert, config.n_embd
        self.intermediate_size = config.moe_intermediate_size
        # LitGPT's scheme: GPT-NeoX's standard deviation for what reads the residual stream, and one that falls with the
        # depth of the model for what writes to it (arXiv:2204.06745, section 2.3).
        self.init_std = math.sqrt(2.0 / 5 / config.n_embd)
        self.init_std_out = 1 / math.sqrt(config.n_embd) / config.n_layer
        E, D, F_ = self.n_expert, self.n_embd, self.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * F_)) if config.bias else None
        self.down_bias = nn.Parameter(torch.empty(E, D)) if config.bias else None

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up_proj, mean=0.0, std=self.init_std)
        nn.init.normal_(self.down_proj, mean=0.0, std=self.init_std_out)
        if self.gate_up_bias is not None:
            nn.init.zeros_(self.gate_up_bias)
            nn.init.zeros_(self.down_bias)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return, for each token, the weighted sum of its experts' outputs, (T, D) in the dtype of `x_TD`.

        Args:
            x_TD: Tokens.
            routing: The router's decision for them.
        """
        backend = self.backend_for(x_TD)
        if backend == "loop" or x_TD.is_meta:
            return self._loop(x_TD, routing)
        grouped_experts = grouped_cpu_experts if backend == "grouped_cpu" else grouped_mm_experts
        weights = (self.gate_up_proj, self.gate_up_bias, self.down_proj, self.down_bias)
        return grouped_experts(x_TD, *routing, *weights)

    def backend_for(self, x_TD: Tensor) -> str:
        """Return the name of the backend that computes `x_TD` under the present autocast and compiler."""
        if self.forced_backend is None:
            return choose_backend(x_TD.device, matmul_dtype(x_TD), self.n_embd, self.intermediate_size)
        if self.forced_backend not in BACKENDS:
            raise ValueError(f"backend: {self.forced_backend!r} is unknown; choose from {', '.join(BACKENDS)}")
        return self.forced_backend

    def _loop(self, x_TD: Tensor, routing: Routing) -> Tensor:
        rows_R = routing.experts_TK.flatten().argsort(stable=True)
        tokens_R = rows_R.div(routing.experts_TK.size(1), rounding_mode="floor")
        x_RD = x_TD.index_select(0, tokens_R)
        y_RD = self._dense_equivalent(x_RD) if x_RD.is_meta else self._one_by_one(x_RD, routing.counts_E)
        weights_R1 = routing.weights_TK.flatten().index_select(0, rows_R).unsqueeze(1)
        # The sum over a token's experts is taken in the gate's precision, as Hugging Face's DeepSeek-V3 takes it.
        y_TD = weights_R1.new_zeros(x_TD.shape).index_add(0, tokens_R, y_RD * weights_R1)
        return y_TD.to(x_TD.dtype)

    def _one_by_one(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        # `unbind` keeps the backward pass linear in E: indexing each expert's weight would create a gradient of the
        # size of the whole stack for every expert.
        inputs = x_RD.split(counts_E.tolist())
        none = (None,) * self.n_expert
        gate_up_biases = none if self.gate_up_bias is None else self.gate_up_bias.unbind()
        down_biases = none if self.down_bias is None else self.down_bias.unbind()
        weights = zip(self.gate_up_proj.unbind(), gate_up_biases, self.down_proj.unbind(), down_biases, strict=True)
        return torch.cat([_swiglu(x, *expert) for x, expert in zip(inputs, weights, strict=True)])

    def _dense_equivalent(self, x_RD: Tensor) -> Tensor:
        # On meta tensors nobody knows which rows go where, but the work is known: every row passes through one expert
        # of the same size. FLOP counters then see the active experts and no others.
        gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias[0]
        down_bias = None if self.down_bias is None else self.down_bias[0]
        return _swiglu(x_RD, self.gate_up_proj[0], gate_up_bias, self.down_proj[0], down_bias)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        stack_experts(state_dict, prefix, self.n_expert)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"n_expert={self.n_expert}, n_embd={self.n_embd}, intermediate_size={self.intermediate_size}, "
            f"bias={self.gate_up_bias is not None}"
        )


def _swiglu(
    x: Tensor, gate_up_weight: Tensor, gate_up_bias: Tensor | None, down_weight: Tensor, down_bias: Tensor | None
) -> Tensor:
    gate, up = F.linear(x, gate_up_weight, gate_up_bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down_weight, down_bias)


def stack_experts(state_dict: dict[str, Tensor], prefix: str, n_expert: int) -> None:
    """Replace LitGPT's per-expert weights under `prefix` by stacked ones, in place; does nothing if there are none.

    Args:
        state_dict: A state dictionary.
        prefix: Name of the experts module in it with a trailing dot (`transformer.h.0.mlp.experts.`).
        n_expert: Number of experts E.
    """
    for stacked, names in {**_PER_EXPERT, **_PER_EXPERT_BIAS}.items():
        keys = [[f"{prefix}{e}.{name}" for name in names] for e in range(n_expert)]
        if all(key in state_dict for expert_keys in keys for key in expert_keys):
            experts = [torch.cat([state_dict.pop(key)[...] for key in expert_keys]) for expert_keys in keys]
            state_dict[prefix + stacked] = torch.stack(experts)


def unstack_experts(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of `state_dict` in which stacked experts are in LitGPT's per-expert layout (views, not copies)."""
    result = {}
    for key, value in state_dict.items():
        prefix, _, name = key.rpartition(".")
        names = {**_PER_EXPERT, **_PER_EXPERT_BIAS}.get(name) if prefix.endswith("experts") else None
        if names is None:
            result[key] = value
            continue
        for e, expert in enumerate(value.unbind()):
            result |= {
                f"{prefix}.{e}.{part}": tensor for part, tensor in zip(names, expert.chunk(len(names)), strict=True)
            }
    return result
