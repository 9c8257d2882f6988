"""What all routers share: the routing they return, auxiliary losses, and the statistics of a training step.

Shape legend: T tokens, D model width, E experts, K chosen experts per token.
"""

from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from litgpt_moe_ext.moe import losses
from litgpt_moe_ext.moe.balancing import Tally, tally_dtype, watch
from litgpt_moe_ext.moe.gradient_injection import inject

# Auxiliary losses by name, and the configuration field that holds the weight of each.
LOSS_FIELDS = {
    "load_balancing_loss": "router_load_balancing_loss_coef",
    "sequence_balancing_loss": "router_sequence_balancing_loss_coef",
    "z_loss": "router_z_loss_coef",
    "importance_loss": "router_importance_loss_coef",
    "load_loss": "router_load_loss_coef",
}

# Sums that a router keeps of every training step besides the tokens per expert; the losses follow, with their weights.
SUMS = ("tokens", "batches", "gate", "squared_logit", "entropy")


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


class Choice(NamedTuple):
    """What a kind of router decides, and what it decided by.

    Attributes:
        weights_TK: Gate values before `routed_scaling_factor`.
        experts_TK: Chosen experts, int64.
        logits_TE: Router logits without noise, or None for a router that has none.
        noisy_TE: Logits with noise, where there is noise.
        std_TE: Standard deviation of the noise, where there is noise.
    """

    weights_TK: Tensor
    experts_TK: Tensor
    logits_TE: Tensor | None = None
    noisy_TE: Tensor | None = None
    std_TE: Tensor | None = None


class Router(nn.Module):
    """Chooses experts, by a rule that subclasses give as `choose`.

    Args:
        config: A `litgpt.Config` that passed `litgpt_moe_ext.host.config.resolve_and_validate`.

    Attributes:
        weight: The gate, (E, D), or None for a router that does not learn.
        tally: Tokens per expert and sums since the last optimizer step.
        record: The same of the last finished optimizer step, over all processes, or None before the first.
        loss_coefs: Weights of the auxiliary losses by name.
        loss_names: Their names in the order of the record.
        bias_update_rate: Step size of the balancing bias; 0 for routers that have none.
    """

    weight: Tensor | None
    bias_update_rate: float = 0.0

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.register_parameter("weight", None)
        self.n_expert = config.n_expert
        self.top_k = config.n_expert_per_token
        self.scaling_factor = config.routed_scaling_factor
        self.loss_coefs = {name: coef for name, field in LOSS_FIELDS.items() if (coef := getattr(config, field))}
        self.loss_names = tuple(self.loss_coefs)
        self.tally = Tally(self.n_expert + len(SUMS) + len(self.loss_names))
        self.record: Tensor | None = None
        watch(self)

    def forward(self, x_TD: Tensor, n_sequence: int = 1) -> Routing:
        """Choose K experts for each token.

        Args:
            x_TD: Tokens, any floating dtype.
            n_sequence: Of how many sequences of equal length they are.
        """
        choice = self.choose(x_TD)
        weights_TK, experts_TK = choice.weights_TK, choice.experts_TK
        trains = self.training and torch.is_grad_enabled() and not x_TD.is_meta
        auxiliary = {}
        if trains and self.loss_coefs:
            auxiliary = {
                name: coef * self.auxiliary_loss(name, choice, n_sequence) for name, coef in self.loss_coefs.items()
            }
            weights_TK = inject(weights_TK, sum(auxiliary.values()))
        if self.scaling_factor != 1.0:
            weights_TK = weights_TK * self.scaling_factor
        flat_R = experts_TK.reshape(-1)
        counts_E = flat_R.new_zeros(self.n_expert).scatter_add_(0, flat_R, torch.ones_like(flat_R))
        if trains:
            weights_TK = self.tally.attach(weights_TK, self._statistics(counts_E, choice, auxiliary))
        return Routing(weights_TK, experts_TK, counts_E)

    def choose(self, x_TD: Tensor) -> Choice:
        """Decide for each token."""
        raise NotImplementedError(f"{type(self).__name__} must say how it chooses experts")

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        """Return the scores of all experts, (T, E), with rows that sum to 1, as the balancing losses use them."""
        return logits_TE.softmax(dim=-1)

    def auxiliary_loss(self, name: str, choice: Choice, n_sequence: int) -> Tensor:
        """Return the auxiliary loss `name` without its weight, a scalar."""
        match name:
            case "load_balancing_loss":
                return losses.load_balancing_loss(self.probabilities(choice.logits_TE), choice.experts_TK)
            case "sequence_balancing_loss":
                probabilities_TE = self.probabilities(choice.logits_TE)
                return losses.sequence_balancing_loss(probabilities_TE, choice.experts_TK, n_sequence)
            case "z_loss":
                return losses.router_z_loss(choice.logits_TE)
            case "importance_loss":
                return losses.importance_loss(choice.weights_TK, choice.experts_TK, self.n_expert)
            case _:
                raise ValueError(f"{type(self).__name__} has no auxiliary loss {name!r}")

    @property
    def load_E(self) -> Tensor | None:
        """Tokens per expert of the last finished optimizer step over all processes, or None before the first."""
        return None if self.record is None else self.record[: self.n_expert]

    @torch.no_grad()
    def _statistics(self, counts_E: Tensor, choice: Choice, auxiliary: dict[str, Tensor]) -> Tensor:
        # Tokens per expert, SUMS and losses in one vector: one tally, and one all-reduce, for everything.
        weights_TK, logits_TE = choice.weights_TK, choice.logits_TE
        one = weights_TK.new_ones(())
        squared_logit = entropy = 0 * one
        if logits_TE is not None:
            squared_logit = logits_TE.square().mean(dim=-1).sum()
            entropy = torch.special.entr(self.probabilities(logits_TE)).sum()
        losses = (auxiliary.get(name, 0 * one) for name in self.loss_names)
        sums = (one * len(weights_TK), one, weights_TK.sum(), squared_logit, entropy)
        return torch.cat([counts_E.to(tally_dtype(counts_E.device)), torch.stack([*sums, *losses])])

    def __setstate__(self, state: dict) -> None:
        # Copies and unpickled routers do not pass through `__init__`; their balance must be looked after as well.
        super().__setstate__(state)
        watch(self)
