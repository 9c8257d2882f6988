"""Routers that do not learn: baselines that show what learned routing is worth.

Shape legend: T tokens, E experts, K chosen experts per token.
"""

from typing import Any, cast

import torch
from torch import Tensor

from litgpt_moe_ext.moe.kernels.fused_router import Given, Rule
from litgpt_moe_ext.moe.router import Choice, Router

# Odd 64-bit constants of the finaliser of MurmurHash3, as signed integers.
_MIX = (-49064778989728563, -4265267296055464877)


class Hashes:
    """Hashes of the token ids of a batch, which all layers of a model share.

    Args:
        ids_T: The ids, int64.

    Attributes:
        ids_T: The same.
    """

    def __init__(self, ids_T: Tensor) -> None:
        self.ids_T = ids_T
        self._hashes: dict[int, Tensor] = {}

    def of(self, n_expert: int) -> Tensor:
        """Return a pseudo-random number for each token and expert, int64 (T, E); computed by the first who asks."""
        if n_expert not in self._hashes:
            experts_E = torch.arange(n_expert, device=self.ids_T.device)
            self._hashes[n_expert] = _mixed(self.ids_T.unsqueeze(1) * n_expert + experts_E)
        return self._hashes[n_expert]


class FixedRouter(Router):
    """A router whose gate values are 1 / K whatever expert is chosen.

    Attributes:
        hashes: Those of the present batch, where layers share them.
    """

    hashes: Hashes | None = None

    def rule(self) -> Rule | None:
        """Return the rule of `choose`, None for subclasses with another one."""
        return Rule("even", self.top_k) if type(self).choose is FixedRouter.choose else None

    def given(self, x_TD: Tensor) -> Given:
        """Return what `rank` returns."""
        return Given(self.rank(x_TD).contiguous())

    def choose(self, x_TD: Tensor) -> Choice:
        """Choose the experts that `rank` puts first."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        experts_TK = self.rank(x_TD).topk(self.top_k, dim=-1, sorted=False).indices
        return Choice(torch.full(experts_TK.shape, 1 / self.top_k, dtype=dtype, device=x_TD.device), experts_TK)

    def rank(self, x_TD: Tensor) -> Tensor:
        """Return a number for each token and expert, (T, E); the K highest of a token are chosen."""
        raise NotImplementedError(f"{type(self).__name__} must say how it ranks experts")

    def by_token_id(self, x_TD: Tensor) -> Tensor:
        """Return pseudo-random numbers, (T, E), that depend on the token id and the expert only."""
        if x_TD.is_meta:
            return x_TD.new_empty(len(x_TD), self.n_expert)
        if self.token_ids_T is None or len(self.token_ids_T) != len(x_TD):
            raise ValueError(
                f"router_type: {type(self).__name__} needs the ids of the {len(x_TD)} tokens; call the whole "
                "model, not one of its layers"
            )
        if self.hashes is None or self.hashes.ids_T is not self.token_ids_T:
            self.hashes = Hashes(self.token_ids_T)
        return self.hashes.of(self.n_expert)


class HashRouter(FixedRouter):
    """A random hash of the token's id chooses the experts (Hash Layers, arXiv:2106.04426, "random hash")."""

    def rank(self, x_TD: Tensor) -> Tensor:
        """Return the hash."""
        return self.by_token_id(x_TD)


class UniformRouter(FixedRouter):
    """Every set of K experts is equally likely, anew for each token; in evaluation, the choice of `HashRouter`.

    Stochastic experts as in THOR (arXiv:2110.04260), but evaluation is deterministic.
    """

    def rank(self, x_TD: Tensor) -> Tensor:
        """Return random numbers."""
        if not self.training:
            return self.by_token_id(x_TD)
        return torch.rand(len(x_TD), self.n_expert, device=x_TD.device)


def share_token_ids(model: torch.nn.Module) -> None:
    """Set `Router.token_ids_T` of all routers of a `litgpt.GPT`, and `FixedRouter.hashes`, in every forward pass."""
    # With the model, so that a copy of it has its own.
    routers = [module for module in model.modules() if isinstance(module, Router)]
    cast("Any", model).routers = routers
    if routers:
        model.register_forward_pre_hook(_remember, with_kwargs=True)


def _remember(model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    ids_T = (args[0] if args else kwargs["idx"]).flatten()
    hashes = Hashes(ids_T)
    for router in cast("list[Router]", model.routers):
        router.token_ids_T = ids_T
        if isinstance(router, FixedRouter):
            router.hashes = hashes


def _mixed(x: Tensor) -> Tensor:
    # The finaliser of MurmurHash3 spreads neighbouring integers evenly over all 64 bits; int64 wraps around.
    for factor in _MIX:
        x = (x ^ ((x >> 33) & 0x7FFFFFFF)) * factor
    return x ^ ((x >> 33) & 0x7FFFFFFF)
