"""The feed-forward layers: `FeedForward`, `MoE`, and names of the latter that default to another router.

Shape legend: B batch, T tokens (of one sequence, or all of a batch once flattened), D model width.
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from litgpt.model import LLaMAMLP
from torch import Tensor

from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.kernels.side_stream import GradientOfBoth, goes_aside, join, part
from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.batch_metadata import TokenIds
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.kernels.casts import can_cast, cast_together
from litgpt_moe_ext.moe.kernels.operators.shared import GatedSum, Glu, add_gated, glu
from litgpt_moe_ext.moe.kernels.plan import kind_of
from litgpt_moe_ext.moe.kernels.routing import fused_router
from litgpt_moe_ext.moe.registry import ROUTERS, load
from litgpt_moe_ext.moe.routing.router import Router, Routing

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


class FeedForward(LLaMAMLP):
    """Two projections with an activation between them: dense layers, and the shared experts of an MoE layer.

    Parameters are named as in LitGPT: as in `LLaMAMLP` (`fc_1`, `fc_2`, `proj`) with a gated activation, as in
    `GptNeoxMLP` (`fc`, `proj`) otherwise. It is a subclass of `LLaMAMLP` because LitGPT's initialisation scales the
    output projections of that class by the depth of the model.

    Args:
        config: A `litgpt.Config`; uses `n_embd`, `bias`, `mlp_activation`, `gelu_approximate` and `expert_backend`.
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
        self._names = (*names, "proj")
        # `expert_backend: loop` asks for torch's operators only.
        self._fusible = config.expert_backend != "loop"
        self._has_kernel = self._fusible and self.activation.gated and kind_of(self.activation) is not None
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        """Return the output, shaped like `x`, in the dtype of `x` or of autocast."""
        x = narrowed(x)
        *into, out = self._projections(x)
        hidden = [project(x) for project in into]
        # With a gated activation, both projections may come side by side in one tensor.
        gate, up = hidden if len(hidden) == 2 else (hidden[0], None)
        if self._has_kernel and fused_router.works_on(gate):
            flat = _flat(gate), None if up is None else _flat(up)
            a = glu(Glu(*flat, self.activation.name, self.activation.gelu_approximate))
            return out(a.view(*x.shape[:-1], a.size(-1)))
        return out(self.activation(gate) if up is None else self.activation.gate(gate, up))

    def _projections(self, x: Tensor) -> list[Callable[[Tensor], Tensor]]:
        linears: list[Any] = [getattr(self, name) for name in self._names]
        # Without gradients, autocast's own cache serves all passes in its scope.
        learns = torch.is_grad_enabled()
        if self._fusible and learns and fused_router.works_on(x) and can_cast(linears, x.dtype):
            return cast_together([linears[:-1], linears[-1:]], x.dtype)
        return linears


class MoE(nn.Module):
    """Routed experts plus, if configured, shared experts that every token visits.

    `y = sum over chosen experts of gate * expert(x) + shared(x)` (DeepSeekMoE, arXiv:2401.06066, equation 9; the
    residual connection is LitGPT's). With `shared_expert_gate` the shared part is multiplied by `sigmoid(x w)`, as in
    Qwen2-MoE. Parameters are named as in LitGPT's `LLaMAMoE`, except that the experts are stacked; the shared experts
    are one network as wide as all of them together.

    Args:
        config: A configuration that names this class or a subclass.
    """

    def __init__(self, config: "Config") -> None:
        super().__init__()
        self.gate: Router = load(ROUTERS[config.router_type].router)(config)
        self.experts = Experts(config)
        self.shared_experts = self.shared_expert_gate = None
        # `expert_backend: loop` asks for torch's operators only.
        self._own_sum = config.expert_backend != "loop"
        if config.n_shared_expert:
            width = config.shared_expert_intermediate_size or config.moe_intermediate_size * config.n_shared_expert
            self.shared_experts = FeedForward(config, width)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.n_embd, 1, bias=False)
        # Initialised here and not by the classes themselves, whose subclasses may add parameters after `__init__`.
        self.gate.reset_parameters()
        self.experts.reset_parameters()

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None, ids: TokenIds | None = None) -> Tensor:
        """Return the layer's output, (B, T, D) in the dtype of `x_BTD` or that of autocast.

        Args:
            x_BTD: Tokens.
            real_BT: Which of them are not padding, bool; None if all. Padding is ignored, and its output is 0.
            ids: The token ids, for routers that need them.
        """
        x_TD = x_BTD.reshape(-1, x_BTD.size(-1))
        n_sequence = x_BTD.size(0) if x_BTD.dim() == 3 else 1
        real_T = None if real_BT is None else real_BT.reshape(-1).contiguous()
        routing = self.gate(x_TD, n_sequence, real_T, ids)
        if routing.passed is None:
            routed_TD = narrowed(x_TD)
            shared_BTD = x_BTD if routed_TD is x_TD else routed_TD.view(x_BTD.shape)
        else:
            routed_TD, shared_TD = routing.passed
            shared_BTD = shared_TD.view(x_BTD.shape)
        return self.all_experts(routed_TD, shared_BTD, routing).view(x_BTD.shape)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        of_an_expert = state_dict.get(f"{prefix}experts.0.proj.weight")
        if of_an_expert is not None:
            # From `LLaMAMoE`, whose router has neither a bias nor noise to learn: both are zeros, as at the start.
            own = self.gate.state_dict()
            for name in ("e_score_correction_bias", "noise_weight"):
                if name in own:
                    state_dict.setdefault(
                        f"{prefix}gate.{name}", torch.zeros_like(own[name], device=of_an_expert.device)
                    )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def all_experts(self, routed_TD: Tensor, shared_BTD: Tensor, routing: Routing) -> Tensor:
        """Return the sum of the outputs of routed and shared experts, (T, D).

        Selective activation checkpointing repeats this, but keeps the router's decision.

        Args:
            routed_TD: Tokens for the routed experts.
            shared_BTD: The same tokens for the shared experts.
            routing: The router's decision for them.
        """
        if self.shared_experts is None:
            return _ending_at_padding(self.experts(routed_TD, routing), routing.real_T)
        return self._with_shared_experts(self.shared_experts, routed_TD, shared_BTD, routing)

    def _with_shared_experts(
        self, shared_experts: FeedForward, routed_TD: Tensor, x_BTD: Tensor, routing: Routing
    ) -> Tensor:
        special = self.shared_expert_gate is not None or routing.real_T is not None
        fused = special and self._own_sum and fused_router.works_on(routed_TD)
        with part(x_BTD) if goes_aside(x_BTD) else contextlib.nullcontext():
            shared_TD = _flat(shared_experts(x_BTD))
            logits_T1 = None if self.shared_expert_gate is None else _flat(self.shared_expert_gate(x_BTD))
            if logits_T1 is not None and not fused:
                shared_TD = shared_TD * logits_T1.sigmoid()
        if fused:
            y_TD = self.experts(routed_TD, routing).contiguous()
            join()
            return add_gated(GatedSum(y_TD, shared_TD, logits_T1, routing.real_T))
        return _ending_at_padding(self._sum(routed_TD, routing, shared_TD), routing.real_T)

    def _sum(self, routed_TD: Tensor, routing: Routing, shared_TD: Tensor) -> Tensor:
        if not goes_aside(routed_TD):
            return self.experts(routed_TD, routing, shared_TD)
        # The backward pass of the shared experts need not wait for that of the routed ones.
        return GradientOfBoth.apply(self.experts(routed_TD, routing, shared_TD.detach()), shared_TD)


def _ending_at_padding(y_TD: Tensor, real_T: Tensor | None) -> Tensor:
    return y_TD if real_T is None else torch.where(real_T.unsqueeze(-1), y_TD, 0.0)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.size(-1)).contiguous()


def narrowed(x: Tensor) -> Tensor:
    """Return `x` in the dtype of the matrix products.

    Left to autocast, it and its gradient would be cast once for every projection.
    """
    return x.to(matmul_dtype(x))


class SharedExpertMoE(MoE):
    """`MoE` with DeepSeek-V3's router, unless `router_type` names another."""


class NoisyTopKMoE(MoE):
    """`MoE` with noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538)."""
