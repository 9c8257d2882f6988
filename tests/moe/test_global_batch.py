"""The load-balancing loss over the global batch: shares of the step, over ranks and accumulated batches."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from litgpt.utils import chunked_cross_entropy
from torch.utils.checkpoint import checkpoint

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.moe.balancing import step_shares
from litgpt_moe_ext.moe.balancing.bias import forget_step, update_routers
from litgpt_moe_ext.moe.balancing.gradient_injection import forget_scale, remember_scale
from litgpt_moe_ext.moe.balancing.metrics import load_metrics, routers_of
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from litgpt_moe_ext.training.callbacks.activation_checkpointing import ActivationCheckpointing
from tests.models import initialized_model, moe_config, randomize
from tests.training.processes import in_ranks

COEF = 2.0


@pytest.fixture(autouse=True)
def _no_scale():
    forget_scale()
    yield
    forget_scale()


def config_of(scope, **changes):
    return moe_config(
        router_load_balancing_loss_coef=COEF, router_load_balancing_loss_scope=scope, router_bias_update_rate=0.0,
        norm_class_name="LayerNorm", expert_backend="loop", **changes,
    )  # fmt: skip


def model_of(scope, **changes):
    torch.manual_seed(0)
    return randomize(initialized_model(config_of(scope, **changes)), 0.3).double()


def step(model, micro_batches, forward=None):
    """Return the gradients of a step over equal micro-batches, and the metrics of the step."""
    model.zero_grad()
    for ids in micro_batches:
        logits = model(ids) if forward is None else forward(ids)
        (remember_scale(chunked_cross_entropy(logits, ids)) / len(micro_batches)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    update_routers(routers_of(model).values())
    return gradients, load_metrics(model)


def batches(number):
    return list(torch.randint(0, 64, (number, 2, 9), generator=torch.Generator().manual_seed(1)))


def test_a_step_of_one_batch_is_the_same_under_both_scopes():
    (batch,) = batches(1)
    gradients, metrics = step(model_of("global_batch"), [batch])
    expected, expected_metrics = step(model_of("micro_batch"), [batch])
    torch.testing.assert_close(gradients, expected)
    assert metrics == pytest.approx(expected_metrics)


def test_each_batch_takes_the_shares_of_the_step_so_far():
    """Against the formula: E * f * P with the f of the paper's buffer, which begins anew with every step."""
    layer = randomize(SharedExpertMoE(config_of("global_batch"))).double()
    inputs = torch.randn(3, 2, 7, 16, dtype=torch.float64)
    for _ in range(2):
        layer.zero_grad()
        expected, counts = 0.0, torch.zeros(8)
        for x in inputs:
            (layer(x).sum() * 0.0).backward()
            routing, scores = layer.gate(x.flatten(0, 1)), layer.gate.scores(x.flatten(0, 1))
            counts = counts + routing.counts_E
            shares = (counts / counts.sum()).double()
            expected += torch.autograd.grad(COEF * 8 * (shares * scores.mean(0)).sum(), layer.gate.weight)[0]
            layer.gate.step_shares._pending.clear()  # the router was asked once more than it was trained
        torch.testing.assert_close(layer.gate.weight.grad, expected)
        update_routers([layer.gate])


def test_a_step_that_is_left_out_has_no_share_of_the_next():
    *left_out, last = batches(3)
    model = model_of("global_batch")
    for ids in left_out:
        remember_scale(chunked_cross_entropy(model(ids), ids)).backward()
    forget_step(routers_of(model).values())
    gradients, metrics = step(model, [last])
    expected, expected_metrics = step(model_of("global_batch"), [last])
    torch.testing.assert_close(gradients, expected)
    assert metrics == pytest.approx(expected_metrics)


def test_a_pass_that_never_went_backward_has_no_share_of_the_next_step():
    first, second = batches(2)
    model = model_of("global_batch")
    model(first)
    forget_step(routers_of(model).values())
    gradients, _ = step(model, [second])
    expected, _ = step(model_of("global_batch"), [second])
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("before", [0, 1])
def test_passes_that_are_only_tried_have_no_share(before):
    """Between the forward and the backward pass of the first batch of a step, or of the second."""
    *others, tried = batches(3)
    model = model_of("global_batch")

    def loss(ids):
        return remember_scale(chunked_cross_entropy(model(ids), ids)) / len(others)

    for i, ids in enumerate(others):
        value = loss(ids)
        if i == before:
            with step_shares.nothing_counted():
                torch.autograd.grad(loss(tried), list(model.parameters()), allow_unused=True)
        value.backward()
    expected, _ = step(model_of("global_batch"), others)
    torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


def test_a_backward_pass_after_the_step_has_the_shares_of_its_own_batch():
    """The counts of a step go with it."""
    first, second = batches(2)
    model = model_of("global_batch")
    step(model, [first])
    late = remember_scale(chunked_cross_entropy(model(second), second))
    forget_step(routers_of(model).values())
    model.zero_grad()
    late.backward()
    expected, _ = step(model_of("global_batch"), [second])
    torch.testing.assert_close({name: value.grad for name, value in model.named_parameters()}, expected)


def test_batches_that_go_backward_together():
    """All that went forward before is counted, as where one loss is made of several."""
    first, second = batches(2)
    model = model_of("global_batch")
    sum(remember_scale(chunked_cross_entropy(model(ids), ids)) / 2 for ids in (first, second)).backward()
    expected, _ = step(model_of("global_batch"), [torch.cat([first, second])])
    gate = "transformer.h.1.mlp.gate.weight"
    torch.testing.assert_close(dict(model.named_parameters())[gate].grad, expected[gate])


def test_accumulation_one_and_four():
    """Where every micro-batch has the load of the step, what is not known yet changes nothing."""
    (batch,) = batches(1)
    once, _ = step(model_of("global_batch"), [batch])
    four_times, _ = step(model_of("global_batch"), [batch] * 4)
    torch.testing.assert_close(four_times, once)


@pytest.mark.parametrize("mode", ["full", "selective", "reentrant"])
def test_recomputation_counts_nothing(mode, monkeypatch):
    sums, collect = [], step_shares._collect
    monkeypatch.setattr(step_shares, "_collect", lambda members: sums.append(len(members)) or collect(members))
    model = model_of("global_batch")
    expected = step(copy.deepcopy(model), batches(3))
    if mode == "reentrant":
        for block in model.transformer.h:
            block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    else:
        ActivationCheckpointing(mode).on_before_setup(model)
    assert sums == [2, 2, 2], "once for both layers of each of three batches"
    torch.testing.assert_close(step(model, batches(3)), expected)
    assert sums == [2] * 6


def test_padding_has_no_share(monkeypatch):
    monkeypatch.setattr("litgpt_moe_ext.tokens.padding._accepted", True)
    layer = randomize(SharedExpertMoE(config_of("global_batch"))).double()
    x, gradients = torch.randn(1, 7, 16, dtype=torch.float64), []
    padded = torch.cat([x, torch.randn(1, 7, 16, dtype=torch.float64)], dim=1)
    for inputs, real in ((x, None), (padded, torch.arange(14).unsqueeze(0) < 7)):
        layer.zero_grad()
        layer(inputs, real).square().sum().backward()
        gradients.append(layer.gate.weight.grad.clone())
        update_routers([layer.gate])
    torch.testing.assert_close(*gradients)


def test_a_batch_of_padding_alone_has_no_loss():
    """Shares of no token are no numbers."""
    layer = randomize(SharedExpertMoE(config_of("global_batch")))
    layer(torch.randn(1, 7, 16), torch.zeros(1, 7, dtype=torch.bool)).sum().backward()
    update_routers([layer.gate])
    assert not layer.gate.weight.grad.any()
    assert load_metrics(layer)["moe/load_balancing_loss"] == 0


def test_validation_has_no_share():
    layer = randomize(SharedExpertMoE(config_of("global_batch"))).double()
    x, gradients = torch.randn(1, 7, 16, dtype=torch.float64), []
    for validates in (False, True):
        if validates:
            with torch.no_grad():
                layer.eval()(torch.randn(1, 50, 16, dtype=torch.float64))
            layer.train()
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append(layer.gate.weight.grad.clone())
        update_routers([layer.gate])
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
def test_compiled(checkpoints):
    model = model_of("global_batch").float()
    for router in routers_of(model):
        model.get_submodule(router.removesuffix("gate") + "experts").forced_backend = None
    expected = step(copy.deepcopy(model), batches(3))
    if checkpoints:
        ActivationCheckpointing("full").on_before_setup(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(step(model, batches(3), compiled), expected, rtol=1e-4, atol=1e-5)


def half_of_a_step(scope):
    """Train on this rank's half of a batch; return the mean gradients and how often counts were summed."""
    rank, model, sums = dist.get_rank(), model_of(scope), []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (sums.append(len(tensor)), all_reduce(tensor, *args, **kwargs))
    gradients, metrics = step(model, [batches(1)[0][rank : rank + 1]])
    dist.all_reduce = all_reduce
    for gradient in gradients.values():
        dist.all_reduce(gradient, dist.ReduceOp.SUM)
        gradient /= 2
    return gradients, {name: value for name, value in metrics.items() if name.startswith("moe/")}, sums


def test_two_processes_train_as_one():
    """Two layers, and one sum over the ranks for both besides that of the tallies."""
    expected, expected_metrics = step(model_of("micro_batch"), batches(1))
    for gradients, metrics, sums in in_ranks(half_of_a_step, 2, "global_batch"):
        torch.testing.assert_close(gradients, expected)
        assert metrics == pytest.approx({name: expected_metrics[name] for name in metrics})
        assert sums == [16, 2 * (8 + 3 + 1)]
    other, *_ = in_ranks(half_of_a_step, 2, "micro_batch")[0]
    assert any(not torch.allclose(other[name], expected[name]) for name in expected)


def test_a_copy_counts_for_itself():
    router = SharedExpertMoE(config_of("global_batch")).gate
    router.step_shares.count(torch.arange(8))
    other = copy.deepcopy(router).step_shares
    assert other.handle != router.step_shares.handle
    assert not other._pending


def test_shares_beyond_float32():
    counted, counts_E = step_shares.StepShares(), torch.tensor([2**24 + 1, 1])
    for _ in range(2):
        assert counted.shares(counted.count(counts_E)).tolist() == [(2**24 + 1) / (2**24 + 2), 1 / (2**24 + 2)]


def test_counts_begin_anew_on_another_device():
    """As after `model.to(...)` between two steps."""
    counted = step_shares.StepShares()
    for device in ("cpu", "meta"):
        counts = counted.count(torch.ones(4, device=device))
        assert counted.shares(counts).device.type == device


def test_a_scope_without_the_loss_is_refused():
    with pytest.raises(SettingsError, match="router_load_balancing_loss_coef is not set"):
        moe_config(router_load_balancing_loss_scope="global_batch")
