"""Routers that do not learn: baselines that show what learned routing is worth.

Shape legend: T tokens, E experts, K chosen experts per token.
"""

import torch
from torch import Tensor

from litgpt_moe_ext.moe.batch_metadata import TokenIds
from litgpt_moe_ext.moe.kernels.routing.fused_router import Given, Rule
from litgpt_moe_ext.moe.routing.router import Choice, Router


class FixedRouter(Router):
    """A router whose gate values are all 1 / K."""

    def rule(self) -> Rule | None:
        """Return the rule of `choose`, None for subclasses with another one."""
        return Rule("even", self.top_k) if type(self).choose is FixedRouter.choose else None

    def given(self, x_TD: Tensor, ids: TokenIds | None = None) -> tuple[Given, None]:
        """Return the result of `rank` as the fused kernels' input."""
        return Given(self.rank(x_TD, ids).contiguous()), None

    def choose(self, x_TD: Tensor, ids: TokenIds | None = None) -> Choice:
        """Choose the experts that `rank` puts first."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        experts_TK = self.rank(x_TD, ids).topk(self.top_k, dim=-1, sorted=False).indices
        return Choice(torch.full(experts_TK.shape, 1 / self.top_k, dtype=dtype, device=x_TD.device), experts_TK)

    def scores(self, x_TD: Tensor, ids: TokenIds | None = None) -> None:
        """Return None: the router has no scores."""

    def rank(self, x_TD: Tensor, ids: TokenIds | None) -> Tensor:
        """Return a number for each token and expert, (T, E); the K highest of a token are chosen."""
        raise NotImplementedError(f"{type(self).__name__} must say how it ranks experts")

    def by_token_id(self, x_TD: Tensor, ids: TokenIds | None) -> Tensor:
        """Return pseudo-random numbers, (T, E), that depend on the token id and the expert only."""
        if x_TD.is_meta:
            return x_TD.new_empty(len(x_TD), self.n_expert)
        if ids is None or len(ids) != len(x_TD):
            raise ValueError(
                f"router_type: {type(self).__name__} needs the ids of the {len(x_TD)} tokens; call the whole "
                "model, not one of its layers"
            )
        return ids.hashes(self.n_expert)


class HashRouter(FixedRouter):
    """A random hash of the token's id chooses the experts (Hash Layers, arXiv:2106.04426, "random hash")."""

    def rank(self, x_TD: Tensor, ids: TokenIds | None) -> Tensor:
        """Return the hash."""
        return self.by_token_id(x_TD, ids)


class UniformRouter(FixedRouter):
    """Draws K experts for each token, every set equally likely; in evaluation chooses as `HashRouter` does.

    Stochastic experts as in THOR (arXiv:2110.04260), but evaluation is deterministic.
    """

    def rank(self, x_TD: Tensor, ids: TokenIds | None) -> Tensor:
        """Return random numbers."""
        if not self.training:
            return self.by_token_id(x_TD, ids)
        # Not torch's default dtype: with `bf16-true` that is bfloat16 in the forward pass, where many numbers would be
        # equal, but not when activation checkpointing repeats the pass, which would then choose other experts.
        return torch.rand(len(x_TD), self.n_expert, dtype=torch.float32, device=x_TD.device)
