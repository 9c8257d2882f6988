"""Routers: which experts a token visits, and with what weight.

Router arithmetic is done in float32 (float64 for a float64 model) whatever the precision of the model and whatever
autocast says: a bfloat16 logit has 8 bits, too few to order experts whose scores are close.

Shape legend: T tokens, D model width, E experts, K chosen experts per token, G expert groups.
"""

import contextlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.moe.auxiliary import inject
from litgpt_moe_ext.moe.balancing import TokenCounter, watch
from litgpt_moe_ext.moe.losses import importance_loss, load_loss


class Routing(NamedTuple):
    """The decision of a router for a batch of tokens.

    Attributes:
        weights_TK: Gate value of every chosen expert, float32 or float64, differentiable.
        experts_TK: Index of every chosen expert, int64; no expert twice for one token, in no particular order.
        counts_E: Tokens per expert, int64.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    counts_E: Tensor


class Router(nn.Module):
    """What all routers share: the gate weight, its arithmetic, and the count of tokens per expert.

    Args:
        config: A `litgpt.Config` that passed `litgpt_moe_ext.config.resolve_and_validate`.

    Attributes:
        weight: Gate, (E, D).
        counter: Tokens per expert since the last optimizer step.
        load_E: Tokens per expert of the last finished optimizer step over all processes, or None before the first.
        auxiliary_losses: Weighted auxiliary losses of the last training batch by name, for logging.
        bias_update_rate: Step size of the balancing bias; 0 for routers that have none.
    """

    bias_update_rate: float = 0.0

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.n_expert = config.n_expert
        self.top_k = config.n_expert_per_token
        self.scaling_factor = config.routed_scaling_factor
        self.init_std = math.sqrt(2.0 / 5 / config.n_embd)
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.counter = TokenCounter(config.n_expert)
        self.load_E: Tensor | None = None
        self.auxiliary_losses: dict[str, Tensor] = {}
        watch(self)

    def reset_parameters(self) -> None:
        """Initialise as LitGPT initialises its linear layers when pretraining (GPT-NeoX, arXiv:2204.06745)."""
        nn.init.normal_(self.weight, mean=0.0, std=self.init_std)

    def forward(self, x_TD: Tensor) -> Routing:
        """Choose K experts for each token.

        Args:
            x_TD: Tokens, any floating dtype.
        """
        weights_TK, experts_TK, auxiliary_loss = self.choose(x_TD)
        if auxiliary_loss is not None:
            weights_TK = inject(weights_TK, auxiliary_loss)
        if self.scaling_factor != 1.0:
            weights_TK = weights_TK * self.scaling_factor
        flat_R = experts_TK.reshape(-1)
        counts_E = flat_R.new_zeros(self.n_expert).scatter_add_(0, flat_R, torch.ones_like(flat_R))
        if self.training and torch.is_grad_enabled() and not x_TD.is_meta:
            weights_TK = self.counter.attach(weights_TK, counts_E)
        return Routing(weights_TK, experts_TK, counts_E)

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gate values (T, K), before scaling, the chosen experts (T, K), and an auxiliary loss or None."""
        raise NotImplementedError(f"{type(self).__name__} must say how it chooses experts")

    def project(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """Return `x_TD @ weight_ED.T`, (T, E), in at least float32 even under autocast."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with _without_autocast(x_TD.device.type):
            return F.linear(x_TD.to(dtype), weight_ED.to(dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        super()._apply(fn, recurse)
        self.counter.to(self.weight.device)
        return self

    def __setstate__(self, state: dict) -> None:
        # Copies and unpickled routers do not pass through `__init__`; their balance must be looked after as well.
        super().__setstate__(state)
        watch(self)

    def extra_repr(self) -> str:
        return f"n_embd={self.weight.size(1)}, n_expert={self.n_expert}, top_k={self.top_k}"


class GroupedTopKRouter(Router):
    """DeepSeek-V3's router: scores, an optional limit to the best groups of experts, and a balancing bias.

    The k experts with the highest biased score are chosen; the gate values are their scores *without* the bias
    (arXiv:2412.19437, equations 12 to 16). With `n_expert_groups`, a group is worth the sum of its
    `n_topk_scores_per_group` best biased scores and only the best `n_topk_groups` groups take part. Experts of the
    other groups are masked with minus infinity; a mask of 0 would let them win against negative biased scores.

    Args:
        config: As `Router`; uses `router_score_function`, `norm_topk_prob`, `routed_scaling_factor`,
            `router_bias_update_rate` and the group fields.

    Attributes:
        e_score_correction_bias: Balancing bias, (E,), always float32; part of the checkpoint.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.score_function = config.router_score_function
        self.normalize = config.norm_topk_prob
        self.n_group = config.n_expert_groups
        self.n_topk_group = config.n_topk_groups
        self.n_score_per_group = config.n_topk_scores_per_group
        self.bias_update_rate = config.router_bias_update_rate
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_expert, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.e_score_correction_bias)

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        logits_TE = self.project(x_TD, self.weight)
        scores_TE = logits_TE.sigmoid() if self.score_function == "sigmoid" else logits_TE.softmax(dim=-1)
        with torch.no_grad():
            biased_TE = scores_TE + self.e_score_correction_bias
            if self.n_group is not None:
                biased_TE = self._within_best_groups(biased_TE)
            experts_TK = biased_TE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalize:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return weights_TK, experts_TK, None

    def _within_best_groups(self, biased_TE: Tensor) -> Tensor:
        grouped_TGe = biased_TE.unflatten(-1, (self.n_group, -1))
        worth_TG = grouped_TGe.topk(self.n_score_per_group, dim=-1).values.sum(dim=-1)
        best_Tg = worth_TG.topk(self.n_topk_group, dim=-1, sorted=False).indices
        masked_TG = torch.full_like(worth_TG, float("-inf")).scatter_(1, best_Tg, 0.0)
        return (grouped_TGe + masked_TG.unsqueeze(-1)).flatten(1)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        # A bias kept in bfloat16 stops moving as soon as its rate is less than its last bit, so conversions to another
        # precision pass it by; moves to another device do not.
        before_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after_E = self.e_score_correction_bias
        if after_E.dtype != torch.float32:
            kept_E = torch.empty_like(after_E, dtype=torch.float32) if before_E.is_meta else before_E.to(after_E.device)
            self.e_score_correction_bias = kept_E
        return self


class NoisyTopKRouter(Router):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538, equations 3 to 5).

    The logits are `x W_g + eps * softplus(x W_noise)` with standard normal `eps` in training and `x W_g` otherwise;
    the gate values are the softmax of the k highest.

    Args:
        config: As `Router`; uses `routed_scaling_factor`.

    Attributes:
        noise_weight: W_noise, (E, D). Starts at zero, which means noise of standard deviation ln 2 for every expert.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.importance_coef = config.router_importance_loss_coef
        self.load_coef = config.router_load_loss_coef
        self.noise_weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)

    def choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        clean_TE = self.project(x_TD, self.weight)
        if not self.training:
            best = clean_TE.topk(self.top_k, dim=-1)
            return best.values.softmax(dim=-1), best.indices, None
        std_TE = F.softplus(self.project(x_TD, self.noise_weight))
        noisy_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        best = noisy_TE.topk(self.top_k, dim=-1)
        weights_TK = best.values.softmax(dim=-1)
        return weights_TK, best.indices, self._auxiliary_loss(clean_TE, noisy_TE, std_TE, weights_TK, best.indices)

    def _auxiliary_loss(
        self, clean_TE: Tensor, noisy_TE: Tensor, std_TE: Tensor, weights_TK: Tensor, experts_TK: Tensor
    ) -> Tensor | None:
        # With every expert chosen by every token there is nothing to balance but the gate values.
        losses = {}
        if self.importance_coef:
            losses["importance_loss"] = self.importance_coef * importance_loss(weights_TK, experts_TK, self.n_expert)
        if self.load_coef and self.top_k < self.n_expert:
            losses["load_loss"] = self.load_coef * load_loss(clean_TE, noisy_TE, std_TE, self.top_k)
        self.auxiliary_losses = {name: loss.detach() for name, loss in losses.items()}
        return sum(losses.values()) if losses and torch.is_grad_enabled() else None


def _without_autocast(device_type: str) -> Any:
    # torch knows no autocast for meta tensors, not even one to switch off.
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
