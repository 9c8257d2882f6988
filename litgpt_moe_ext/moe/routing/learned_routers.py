"""Routers that learn.

Router arithmetic is float32 (float64 for a float64 model) whatever the precision of the model or of autocast: a
bfloat16 logit has 8 bits, too few to order experts whose scores are close.

Shape legend: T tokens, D model width, E experts, K chosen experts per token, G expert groups.
"""

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.moe.kernels.routing import router_product
from litgpt_moe_ext.moe.kernels.routing.fused_router import Given, Rule
from litgpt_moe_ext.moe.routing.router import Choice, Passed, Router

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config


class LearnedRouter(Router):
    """A router with a linear gate.

    Args:
        config: As `Router`; uses `router_jitter_noise` and `router_bias`.

    Attributes:
        weight: The gate, (E, D).
        bias: Its bias, (E,), or None; it learns, unlike a balancing bias, and is part of the scores.
    """

    bias: nn.Parameter | None
    weight: nn.Parameter  # pyrefly: ignore[bad-override-mutable-attribute]: never None here

    def __init__(self, config: "Config") -> None:
        super().__init__(config)
        self.init_std = math.sqrt(2.0 / 5 / config.n_embd)
        self.jitter = config.router_jitter_noise or 0.0
        self.weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))
        self.register_parameter("bias", nn.Parameter(torch.empty(config.n_expert)) if config.router_bias else None)

    def reset_parameters(self) -> None:
        """Initialise as LitGPT initialises its linear layers when pretraining (GPT-NeoX, arXiv:2204.06745)."""
        nn.init.normal_(self.weight, mean=0.0, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, x_TD: Tensor) -> Tensor:
        """Return the gate's logits, (T, E); in training, inputs are jittered (arXiv:2101.03961, section 2.2)."""
        if self.jitter and self.training:
            x_TD = x_TD.to(_router_dtype(x_TD))
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return self._biased(self.project(x_TD, self.weight))

    def read(self, x_TD: Tensor) -> tuple[Tensor, Passed | None]:
        """Return the logits, and the experts' input if it is a by-product."""
        # A subclass may compute its logits in another way.
        others = type(self).logits is not LearnedRouter.logits or type(self).project is not LearnedRouter.project
        if others or (self.jitter and self.training) or not self._has_own_product(x_TD, self.weight):
            return self.logits(x_TD), None
        logits_TE, *passed = router_product.project_and_pass(x_TD, self.weight, matmul_dtype(x_TD))
        return self._biased(logits_TE), Passed(*passed)

    def _biased(self, logits_TE: Tensor) -> Tensor:
        return logits_TE if self.bias is None else logits_TE + self.bias.to(logits_TE.dtype)

    def _has_own_product(self, x_TD: Tensor, weight_ED: Tensor) -> bool:
        return self.own_kernels and router_product.works_on(x_TD, weight_ED)

    def project(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        """Return `x_TD @ weight_ED.T`, (T, E), in at least float32 even under autocast."""
        if self._has_own_product(x_TD, weight_ED):
            return router_product.project(x_TD, weight_ED)
        dtype = _router_dtype(x_TD)
        with _without_autocast(x_TD.device.type):
            if x_TD.dtype == dtype:
                return F.linear(x_TD, weight_ED.to(dtype))
            return _WideLinear.apply(x_TD, weight_ED, dtype)

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        return f"n_embd={self.weight.size(1)}, n_expert={self.n_expert}, top_k={self.top_k}"


class _WideLinear(torch.autograd.Function):
    """A linear map computed in a wider dtype than its inputs; keeps the narrow inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.to(dtype), weight_ED.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy_TE,) = grads
        x_TD, weight_ED = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        dx_TD = (dy_TE @ weight_ED.to(dy_TE.dtype)).to(x_TD.dtype) if need_x else None
        dweight_ED = (dy_TE.t() @ x_TD.to(dy_TE.dtype)).to(weight_ED.dtype) if need_weight else None
        return dx_TD, dweight_ED, None


class TopKRouter(LearnedRouter):
    """DeepSeek-V3's router: scores, an optional limit to the best groups of experts, and a balancing bias.

    The k experts with the highest biased score are chosen; the gate values are their scores *without* the bias
    (arXiv:2412.19437, equations 12 to 16), divided by their sum if `norm_topk_prob`. With softmax scores that division
    is the same as a softmax over the chosen logits alone: `norm_topk_prob: true` is the order of Mixtral and GPT-OSS
    (top-k, then softmax), `false` the order of Switch and DeepSeek-V2 (softmax, then top-k).

    With `n_expert_groups`, a group is worth the sum of its `n_topk_scores_per_group` best biased scores and only the
    best `n_topk_groups` groups take part. Experts of the other groups are masked with minus infinity; a mask of 0 would
    let them win against negative biased scores.

    Args:
        config: As `LearnedRouter`; uses `router_score_function`, `norm_topk_prob`, `routed_scaling_factor`,
            `router_bias_update_rate`, `router_bias_update_schedule` and the group fields.

    Attributes:
        e_score_correction_bias: Balancing bias, (E,), always float32; part of the checkpoint.
        bias_updates: How often the bias has moved, int64; only with a schedule, and then part of the checkpoint.
    """

    def __init__(self, config: "Config") -> None:
        super().__init__(config)
        self.score_function = config.router_score_function
        self.normalize = config.norm_topk_prob
        self.n_group = config.n_expert_groups
        self.n_topk_group = config.n_topk_groups
        self.n_score_per_group = config.n_topk_scores_per_group
        self.bias_update_rate = config.router_bias_update_rate
        self.bias_update_schedule = config.router_bias_update_schedule
        self.e_score_correction_bias: Tensor
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_expert, dtype=torch.float32))
        if self.bias_update_schedule is not None:
            self.bias_updates: Tensor
            self.register_buffer("bias_updates", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Initialise the gate; the bias starts at 0."""
        super().reset_parameters()
        nn.init.zeros_(self.e_score_correction_bias)
        if self.bias_update_schedule is not None:
            nn.init.zeros_(self.bias_updates)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A schedule is not part of a model: it begins with the training that sets it.
        name = f"{prefix}bias_updates"
        if self.bias_update_schedule is None:
            state_dict.pop(name, None)
        else:
            state_dict.setdefault(name, torch.zeros_like(self.bias_updates, device="cpu"))  # a model's own may be meta
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def rule(self) -> Rule | None:
        """Return the rule of `choose`, None for subclasses with another one."""
        if type(self).choose is not TopKRouter.choose or self.weight.dtype == torch.float64:
            return None
        groups = (self.n_group, self.n_topk_group, self.n_score_per_group) if self.n_group is not None else (1, 1, 1)
        return Rule(self.score_function, self.top_k, bool(self.normalize), 1.0, *groups)

    def given(self, x_TD: Tensor) -> tuple[Given, Passed | None]:
        """Return logits and the balancing bias."""
        logits_TE, passed = self.read(x_TD)
        return Given(logits_TE.contiguous(), self.e_score_correction_bias), passed

    def choose(self, x_TD: Tensor) -> Choice:
        """Choose the K highest biased scores, within the best groups if there are groups."""
        logits_TE = self.logits(x_TD)
        scores_TE = logits_TE.sigmoid() if self.score_function == "sigmoid" else logits_TE.softmax(dim=-1)
        with torch.no_grad():
            biased_TE = scores_TE + self.e_score_correction_bias
            if self.n_group is not None:
                biased_TE = self._within_best_groups(biased_TE)
            experts_TK = biased_TE.topk(self.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.normalize:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Choice(weights_TK, experts_TK, logits_TE, None if self.score_function == "softmax" else scores_TE)

    def _within_best_groups(self, biased_TE: Tensor) -> Tensor:
        grouped_TGe = biased_TE.unflatten(-1, (self.n_group, -1))
        worth_TG = grouped_TGe.topk(self.n_score_per_group, dim=-1).values.sum(dim=-1)
        best_Tg = worth_TG.topk(self.n_topk_group, dim=-1, sorted=False).indices
        masked_TG = torch.full_like(worth_TG, float("-inf")).scatter_(1, best_Tg, 0.0)
        return (grouped_TGe + masked_TG.unsqueeze(-1)).flatten(1)

    def _apply(self, fn: Any, recurse: bool = True) -> "TopKRouter":
        # A bfloat16 bias would stop moving once its rate is less than its last bit. So the bias keeps its dtype when
        # the model is converted, and only follows it to another device.
        before_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after_E = self.e_score_correction_bias
        if after_E.dtype != torch.float32:
            kept_E = torch.empty_like(after_E, dtype=torch.float32) if before_E.is_meta else before_E.to(after_E.device)
            self.e_score_correction_bias = kept_E
        return self


class NoisyTopKRouter(LearnedRouter):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv:1701.06538, equations 3 to 5).

    The logits are `x W_g + eps * softplus(x W_noise)` with standard normal `eps` in training and `x W_g` otherwise;
    the gate values are the softmax of the k highest.

    Args:
        config: As `LearnedRouter`; uses `routed_scaling_factor`.

    Attributes:
        noise_weight: W_noise, (E, D). Starts at zero, which means noise of standard deviation ln 2 for every expert.
    """

    def __init__(self, config: "Config") -> None:
        super().__init__(config)
        self.noise_weight = nn.Parameter(torch.empty(config.n_expert, config.n_embd))

    def reset_parameters(self) -> None:
        """Initialise the gate; the weights of the noise start at 0."""
        super().reset_parameters()
        nn.init.zeros_(self.noise_weight)

    def rule(self) -> Rule | None:
        """Return the rule of `choose`, None for subclasses with another one."""
        if type(self).choose is not NoisyTopKRouter.choose or self.weight.dtype == torch.float64:
            return None
        return Rule("chosen", self.top_k)

    def given(self, x_TD: Tensor) -> tuple[Given, Passed | None]:
        """Return the logits, and in training the noise and its standard deviation before the softplus."""
        logits_TE, passed = self.read(x_TD)
        logits_TE = logits_TE.contiguous()
        if not self.training:
            return Given(logits_TE), passed
        spread_TE = self.project(x_TD, self.noise_weight).contiguous()
        return Given(logits_TE, None, torch.randn_like(logits_TE), spread_TE), passed

    def choose(self, x_TD: Tensor) -> Choice:
        """Choose the K highest logits, with noise in training."""
        clean_TE = self.logits(x_TD)
        if not self.training:
            best = clean_TE.topk(self.top_k, dim=-1)
            return Choice(best.values.softmax(dim=-1), best.indices, clean_TE)
        std_TE = F.softplus(self.project(x_TD, self.noise_weight))
        noisy_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        best = noisy_TE.topk(self.top_k, dim=-1)
        return Choice(best.values.softmax(dim=-1), best.indices, clean_TE, noisy_TE=noisy_TE, std_TE=std_TE)


def _router_dtype(x_TD: Tensor) -> torch.dtype:
    return torch.promote_types(x_TD.dtype, torch.float32)


def _without_autocast(device_type: str) -> Any:
    # torch has no autocast for meta tensors, and refuses to switch it off.
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
