"""Routers, losses and activations of other packages that are none: said where they are registered, or first used."""

import contextlib

import pytest
import torch
from torch import nn

from litgpt_moe_ext import extend
from litgpt_moe_ext.config.fields import FIELDS
from litgpt_moe_ext.extend import ActivationType, Field, Loss, RouterType
from litgpt_moe_ext.field_types import PositiveFloat
from litgpt_moe_ext.moe.kernels.routing import fused_router
from litgpt_moe_ext.moe.registry import ACTIVATIONS, LOSSES, ROUTERS, load
from litgpt_moe_ext.moe.routing.learned_routers import LearnedRouter, TopKRouter
from litgpt_moe_ext.moe.routing.router import Choice
from tests.models import moe_config


class Own(LearnedRouter):
    """Chooses the highest logits, and returns what `returned` makes of the choice."""

    returned = staticmethod(lambda choice: choice)

    def choose(self, x_TD):
        logits_TE = self.logits(x_TD)
        best = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        return type(self).returned(Choice(best.values, best.indices, logits_TE))


OWN = RouterType(Own, doc="highest logits")
HEAT = Field(PositiveFloat, "heat")


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: extend.register_router("own router", OWN), "'own router' must be a name of letters, digits"),
        (lambda: extend.register_router("own", Own), "'own': Own must be an instance of RouterType"),
        (lambda: extend.register_router("own", RouterType(nn.Linear, doc="")), "'own': Linear must be a subclass of"),
        (lambda: extend.register_router("own", OWN, {"heat": 1.0}), "'heat': 1.0 must be an instance of Field"),
        (lambda: extend.register_router("own", OWN, {"my-heat": HEAT}), "'my-heat' must be a name of letters"),
        (lambda: extend.register_loss("own", torch.sum), "'own': <built-in method sum .* must be an instance of Loss"),
        (
            lambda: extend.register_loss("own", Loss(3, ("logits_TE",), "")),
            "'own': function is 3; it must be a function",
        ),
        (lambda: extend.register_loss("own", Loss(torch.sum, "logits_TE", "")), r"tuple of names, \('logits_TE',\)"),
        (lambda: extend.register_activation("own", torch.relu), "'own': <built-in .* must be an instance of Act"),
        (lambda: extend.register_activation("own", ActivationType(torch.relu)), "function is a bare function; it must"),
    ],
)
def test_what_is_none_is_not_registered(register, message):
    registries = (ROUTERS, LOSSES, ACTIVATIONS, FIELDS)
    before = [dict(registry) for registry in registries]
    with pytest.raises(ValueError, match=message):
        register()
    assert [dict(registry) for registry in registries] == before


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda c: tuple(c)[:2], "Own.choose returns a tuple; it must return a Choice"),
        (lambda c: c._replace(experts_TK=c.experts_TK[:1]), r"experts_TK of shape \(1, 2\); \(T, K\) is \(5, 2\)"),
        (lambda c: c._replace(weights_TK=c.weights_TK[:, :1]), r"weights_TK of shape \(5, 1\); \(T, K\) is \(5, 2\)"),
        (lambda c: c._replace(logits_TE=c.logits_TE.T), r"logits_TE of shape \(8, 5\); \(T, E\) is \(5, 8\)"),
        (lambda c: c._replace(experts_TK=c.experts_TK.int()), "experts_TK of torch.int32 and weights_TK of"),
        (lambda c: c._replace(weights_TK=c.weights_TK > 0), "weights_TK of torch.bool; they must be"),
    ],
)
def test_what_is_no_choice(returned, message, monkeypatch):
    router, x_TD = Own(moe_config()), torch.randn(5, 16)
    router.reset_parameters()
    assert router(x_TD).experts_TK.shape == (5, 2)
    monkeypatch.setattr(Own, "returned", staticmethod(returned))
    with pytest.raises((TypeError, ValueError), match=message):
        router(x_TD)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda p_TE: p_TE.mean(0), r"^router_z_loss_coef: its loss returns torch.float32 of shape \(8,\); it must"),
        (lambda p_TE: 1.0, "returns float; it must"),
        (
            lambda p_TE: torch.tensor(1),
            r"returns torch.int64 of shape \(\); it must return a floating tensor of shape \(\)",
        ),
    ],
)
def test_what_is_no_loss(returned, message, monkeypatch):
    for function, expected in ((lambda p_TE: p_TE.square().sum(), None), (returned, message)):
        monkeypatch.setitem(LOSSES, "z_loss", Loss(function, ("probabilities_TE",), "one of somebody else"))
        router, x_TD = TopKRouter(moe_config(router_z_loss_coef=0.1)), torch.randn(5, 16)
        router.reset_parameters()
        with pytest.raises(ValueError, match=expected) if expected else contextlib.nullcontext():
            router(x_TD)


@pytest.mark.parametrize("name", ["topk", "noisy_topk", "hash", "uniform"])
def test_kernels_decide_by_the_rules_of_the_package_only(name):
    """In float32: neither what a subclass chooses, nor by float64 gates."""
    config, kind = moe_config(router_type=name), load(ROUTERS[name].router)
    own = type("Own", (kind,), {"choose": lambda self, *tokens: kind.choose(self, *tokens)})
    assert kind(config).rule().top_k == 2
    assert own(config).rule() is None
    if kind(config).weight is not None:
        assert kind(config).double().rule() is None


def test_kernels_decide_with_the_losses_of_the_package_only(monkeypatch):
    losses = {"router_load_balancing_loss_coef": 0.1, "router_orthogonality_loss_coef": 0.1}
    own = type("Own", (TopKRouter,), {"auxiliary_loss": lambda self, *given: TopKRouter.auxiliary_loss(self, *given)})
    monkeypatch.setattr(fused_router, "works_on", lambda x: True)
    monkeypatch.setattr(TopKRouter, "_decide", lambda *given: "by a kernel")

    def decides(kind=TopKRouter, **changes):
        router = kind(moe_config(**losses | changes))
        router.reset_parameters()
        return router(torch.randn(5, 16)) == "by a kernel"

    assert decides()
    assert decides(n_expert=1024)
    assert not decides(n_expert=1025)
    assert not decides(expert_backend="loop")
    assert not decides(own)
    monkeypatch.setitem(LOSSES, "z_loss", Loss(lambda p_TE: p_TE.square().sum(), ("probabilities_TE",), "another"))
    assert decides()
    assert not decides(router_z_loss_coef=0.1)
