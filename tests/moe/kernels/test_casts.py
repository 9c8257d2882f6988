"""Weights of shared experts and dense layers cast in one launch, held against autocast."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

from litgpt_moe_ext.moe.kernels import plan
from litgpt_moe_ext.moe.kernels.casts import can_cast, cast_together
from litgpt_moe_ext.moe.kernels.routing import fused_router
from litgpt_moe_ext.moe.layer import FeedForward
from tests.models import moe_config, randomize
from tests.moe.test_launches import Launches


def passes(layer, together):
    """Return the output and all gradients under autocast, and what each pass started."""
    layer.zero_grad()
    x = torch.linspace(-2, 2, 5 * 16).view(5, 16).requires_grad_()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(fused_router, "works_on", lambda x: together)
        with Launches() as launches:
            y = layer(x)
    with Launches() as backward:
        y.backward(torch.linspace(-1, 1, 5 * 16).view(5, 16).bfloat16())
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"y": y, "x": x.grad, **gradients}, launches.names, backward.names


def make_layer(**changes):
    torch.manual_seed(0)
    return randomize(FeedForward(moe_config(**{"mlp_activation": "relu2", **changes}), 24))


def make_gated(**changes):
    """Return a layer whose activation no kernel knows, as this test has no card."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "KINDS", {})
        return make_layer(mlp_activation="swiglu", **changes)


@pytest.mark.parametrize("bias", [False, True])
def test_every_bit_is_autocasts_and_casts_are_one(bias):
    layer = make_layer(bias=bias)
    (ours, names, _), (expected, before, _) = (passes(layer, together) for together in (True, False))
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name
    assert names.count("_foreach_copy_") == 1
    assert len(before) - len(names) == (3 if bias else 1)


@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_projection_are_one_product(bias):
    """Each way, and nothing adds up what two would give for their input; that is rounded once less."""
    layer = make_gated(bias=bias)
    (ours, *names), (expected, *before) = (passes(layer, together) for together in (True, False))
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        torch.testing.assert_close(ours[name], value, rtol=0.02, atol=0.02 * value.abs().max().item())
    products = [[sum("mm" in name for name in started) for started in found] for found in (names, before)]
    assert products == [[2, 4], [3, 6]]
    assert [found[1].count("add_") + found[1].count("add") for found in (names, before)] == [0, 1]
    assert names[1].count("_foreach_copy_") == 1


def test_a_layer_of_which_some_have_biases_is_called():
    layer = make_gated(bias=True)
    layer.fc_2.bias = None
    (ours, names, _), (expected, before, _) = (passes(layer, together) for together in (True, False))
    assert names == before
    assert torch.equal(ours["y"], expected["y"])


def test_frozen_weights_have_no_gradient():
    layer = make_layer(bias=True)
    layer.fc.requires_grad_(False)
    layer.proj.bias.requires_grad_(False)
    (ours, *_), (expected, *_) = (passes(layer, together) for together in (True, False))
    assert [name for name, value in ours.items() if value is None] == ["fc.weight", "fc.bias", "proj.bias"]
    assert torch.equal(ours["proj.weight"], expected["proj.weight"])
    assert torch.equal(ours["x"], expected["x"])


def test_one_projection_of_two_may_be_frozen():
    layer = make_gated()
    layer.fc_1.requires_grad_(False)
    (ours, *_), (expected, *_) = (passes(layer, together) for together in (True, False))
    assert [name for name, value in ours.items() if value is None] == ["fc_1.weight"]
    torch.testing.assert_close(ours["fc_2.weight"], expected["fc_2.weight"], rtol=0.02, atol=0.02)


def test_can_be_differentiated_twice():
    """As ordinary operators can, for penalties on gradients."""
    linears, x = [nn.Linear(4, 3).double() for _ in range(2)], torch.randn(5, 4)
    weights = [linear.weight for linear in linears]

    def penalty(project):
        slopes = torch.autograd.grad(project(x).pow(3).sum(), weights, create_graph=True)
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), weights)

    def apart(x):
        return torch.cat([nn.functional.linear(x, one.weight.float(), one.bias.float()) for one in linears], 1)

    for ours, expected in zip(penalty(cast_together([linears], torch.float32)[0]), penalty(apart), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_casts_are_kept_where_nothing_is_learned():
    """As autocast keeps them over all passes in its scope: a generated token is a pass."""
    layer, x = make_layer(), torch.randn(1, 16, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        patch.setattr(fused_router, "works_on", lambda x: True)
        layer(x)
        with Launches() as launches:
            layer(x)
    assert not any("copy" in name for name in launches.names)


def test_who_asks_for_ordinary_operators_gets_them():
    assert "_foreach_copy_" not in passes(make_layer(expert_backend="loop"), together=True)[1]


def test_weights_of_another_class_are_their_own_to_cast():
    """As those of tensor parallelism and of quantisation."""
    layer = make_layer()
    layer.fc.weight = nn.Parameter(TwoTensor(layer.fc.weight.detach(), layer.fc.weight.detach()))
    assert not can_cast([layer.fc, layer.proj], torch.bfloat16)


class Other(nn.Linear):
    """A layer with a `forward` of its own, as LoRA and quantised ones have."""


def _replaced(layer):
    layer.fc = Other(16, 24)


def _patched(layer):
    layer.fc.forward = lambda x: nn.functional.linear(x, layer.fc.weight)


def _parametrized(layer):
    parametrize.register_parametrization(layer.fc, "weight", nn.Identity())


@pytest.mark.parametrize("change", [
    _replaced,
    _patched,
    _parametrized,
    lambda layer: prune.l1_unstructured(layer.fc, "weight", 0.5),
    lambda layer: layer.proj.register_forward_hook(lambda *_: None),
    lambda layer: layer.proj.register_full_backward_hook(lambda *_: None),
    lambda layer: layer.to(torch.bfloat16),
])  # fmt: skip
def test_layers_that_somebody_changed_or_watches_are_called(change):
    layer = make_layer()
    assert can_cast([layer.fc, layer.proj], torch.bfloat16)
    change(layer)
    assert not can_cast([layer.fc, layer.proj], torch.bfloat16)
    passes(layer, together=True)
