"""Tokens are counted exactly, and the bias really moves and really balances."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from litgpt_moe_ext.kernels import launch
from litgpt_moe_ext.moe.balancing.bias import scheduled_rate, update_routers, updated_bias
from litgpt_moe_ext.moe.balancing.metrics import (
    coefficient_of_variation,
    load_entropy,
    load_metrics,
    max_violation,
    routers_of,
)
from litgpt_moe_ext.moe.balancing.tally import Tally
from litgpt_moe_ext.moe.kernels.routing import balancing
from litgpt_moe_ext.moe.layer import SharedExpertMoE
from tests.models import initialized_model, moe_config, noisy_config, randomize
from tests.moe.kernels.biases import make_moved
from tests.moe.routers import max_violations


def make_moe(**settings):
    return randomize(SharedExpertMoE(moe_config(**settings)))


def counts_of(moe, x):
    with torch.no_grad():
        return moe.gate(x.reshape(-1, x.size(-1))).counts_E.double()


def taken(moe):
    """The tokens per expert that the router has counted since the last time."""
    return moe.gate.tally.take()[: moe.gate.n_expert]


def test_updated_bias_by_hand():
    """Loads 5, 1, 3, 3 have mean 3: the first falls, the second rises, the others stay; the result has mean 0."""
    bias = updated_bias(torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([5.0, 1.0, 3.0, 3.0]), 0.1)
    torch.testing.assert_close(bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    bias = updated_bias(torch.zeros(3), torch.tensor([6.0, 0.0, 0.0]), 0.3)
    torch.testing.assert_close(bias, torch.tensor([-0.4, 0.2, 0.2]))


def test_counts_are_exact_over_accumulation():
    moe = make_moe()
    batches = [torch.randn(2, 7, 16) for _ in range(3)]
    for x in batches:
        moe(x).sum().backward()
    assert torch.equal(taken(moe), sum(counts_of(moe, x) for x in batches))
    assert not moe.gate.tally.pending


def test_counts_beyond_float32():
    tally = Tally(8)
    huge = torch.full((8,), 2**24 + 1)
    for _ in range(2):
        (tally.leaf_on(torch.device("cpu")) * huge).sum().backward()
    assert tally.take().tolist() == [2 * (2**24 + 1)] * 8


def test_a_tally_keeps_its_sums_on_another_device():
    tally = Tally(2)
    (tally.leaf_on(torch.device("cpu")) * torch.tensor([3.0, 4.0])).sum().backward()
    assert tally.leaf_on(torch.device("meta")).grad.device.type == "meta"
    assert tally.pending
    assert tally.take().device.type == "meta"


def test_a_compiler_meets_the_leaf_where_the_model_was_made():
    """It cannot trace how another one is made: the first pass would fall apart in every layer."""
    meta = torch.device("meta")
    with meta:
        tally = Tally(2)
    compiled = torch.compile(lambda x_N: tally.leaf_on(meta) * x_N, backend="eager", fullgraph=True)
    assert compiled(torch.ones(2, device=meta)).requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_once(use_reentrant):
    moe = make_moe()
    x = torch.randn(2, 7, 16, requires_grad=True)
    checkpoint(moe, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(taken(moe), counts_of(moe, x))


def test_a_compiled_layer_counts_the_same():
    moe = make_moe(n_shared_expert=1)
    compiled = torch.compile(moe, backend="aot_eager")
    for tokens in (7, 9):
        x = torch.randn(2, tokens, 16)
        output = compiled(x)
        output.sum().backward()
        assert torch.equal(taken(moe), counts_of(moe, x))
        torch.testing.assert_close(output, moe(x))


def test_evaluation_does_not_count():
    moe = make_moe()
    x = torch.randn(2, 7, 16)
    moe.eval()(x).sum().backward()
    assert not moe.gate.tally.pending
    with torch.no_grad():
        moe.train()(x)
    assert not moe.gate.tally.pending


def test_nothing_sees_the_counter():
    """Neither optimizers nor state dictionaries nor distributed wrappers: it is no parameter and no buffer."""
    moe = make_moe()
    assert set(dict(moe.gate.named_parameters())) == {"weight"}
    assert set(dict(moe.gate.named_buffers())) == {"e_score_correction_bias"}
    x = torch.randn(2, 7, 16)
    with_counter, without_counter = copy.deepcopy(moe), copy.deepcopy(moe)
    without_counter.gate._count_in_backward = lambda weights_TK, *_: weights_TK
    for module in (with_counter, without_counter):
        module(x).square().sum().backward()
    pairs = zip(with_counter.parameters(), without_counter.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_any_optimizer_step_moves_the_bias_once(optimizer_class):
    moe = make_moe(router_bias_update_rate=0.01)
    optimizer = optimizer_class(moe.parameters(), lr=1e-3)
    batches = [torch.randn(2, 7, 16) for _ in range(4)]
    expected = torch.zeros(8)
    for accumulated in (batches[:1], batches[1:]):
        counts = sum(counts_of(moe, x) for x in accumulated)
        expected = updated_bias(expected, counts, 0.01)
        for x in accumulated:
            moe(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(moe.gate.e_score_correction_bias, expected)
        assert torch.equal(moe.gate.load_E, counts)
    optimizer.step()
    assert torch.equal(moe.gate.e_score_correction_bias, expected), "a step without tokens must not move the bias"


def test_two_optimizers_on_one_model_move_the_bias_once():
    moe = make_moe(router_bias_update_rate=0.01)
    optimizers = [
        torch.optim.SGD(moe.experts.parameters(), lr=1e-3),
        torch.optim.SGD(moe.gate.parameters(), lr=1e-3),
    ]
    moe(torch.randn(2, 7, 16)).sum().backward()
    with pytest.warns(RuntimeWarning, match="does not hold their weights"):
        optimizers[0].step()
    with warnings.catch_warnings(action="error"):
        optimizers[0].step()  # which has been told
    assert not moe.gate.e_score_correction_bias.any()
    optimizers[1].step()
    assert moe.gate.e_score_correction_bias.abs().max() > 0
    assert moe.gate.record.dtype == torch.float64


def test_a_router_that_was_updated_once_has_an_owner():
    moe = make_moe(router_bias_update_rate=0.01)
    moe(torch.randn(2, 7, 16)).sum().backward()
    torch.optim.SGD(moe.gate.parameters(), lr=1e-3).step()
    moe(torch.randn(2, 7, 16)).sum().backward()
    with warnings.catch_warnings(action="error"):
        torch.optim.SGD(moe.experts.parameters(), lr=1e-3).step()


def test_a_frozen_gate_keeps_its_bias():
    """As under adapters, where LitGPT gives the optimizer all weights and saves those of the adapters."""
    moe = make_moe(router_bias_update_rate=0.01)
    moe.gate.requires_grad_(False)
    moe(torch.randn(2, 7, 16)).sum().backward()
    torch.optim.SGD(moe.parameters(), lr=1e-3).step()
    assert moe.gate.load_E.sum() == 28
    assert not moe.gate.e_score_correction_bias.any()


def test_routers_of_one_optimizer_move_by_their_own_settings():
    """As those of two models that are trained together."""
    rate, warmup = {"router_bias_update_rate": 0.1}, {"warmup_steps": 4}
    changes = [rate, {"router_bias_update_rate": 0.01}, {**rate, "n_expert": 4}]
    changes.append({**rate, "router_bias_update_schedule": warmup})
    layers = torch.nn.ModuleList(make_moe(**each) for each in changes)
    layers[3].gate.bias_updates.zero_()
    sum(moe(torch.randn(2, 7, 16)).sum() for moe in layers).backward()
    torch.optim.SGD(layers.parameters(), lr=0.0).step()
    rates = [0.1, 0.01, 0.1, scheduled_rate(0.1, warmup, torch.tensor(0))]
    for moe, expected in zip(layers, rates, strict=True):
        bias_E = updated_bias(torch.zeros(moe.gate.n_expert), moe.gate.load_E, expected)
        assert torch.equal(moe.gate.e_score_correction_bias, bias_E)


def test_two_models_do_not_disturb_each_other():
    first, second = make_moe(), make_moe()
    optimizers = [torch.optim.SGD(moe.parameters(), lr=1e-3) for moe in (first, second)]
    x = torch.randn(2, 7, 16)
    first(x).sum().backward()
    second(x).sum().backward()
    optimizers[0].step()
    assert first.gate.load_E is not None
    assert second.gate.load_E is None
    assert second.gate.tally.pending


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_balanced_too(duplicate):
    moe = duplicate(make_moe())
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-3)
    moe(torch.randn(2, 7, 16)).sum().backward()
    optimizer.step()
    assert moe.gate.e_score_correction_bias.abs().max() > 0


def test_rate_zero_switches_the_bias_off_but_counts():
    moe = make_moe(router_bias_update_rate=0)
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-3)
    moe(torch.randn(2, 7, 16)).sum().backward()
    optimizer.step()
    assert not moe.gate.e_score_correction_bias.any()
    assert moe.gate.load_E.sum() == 28


def test_bias_is_in_the_checkpoint():
    moe = make_moe()
    moe.gate.e_score_correction_bias.copy_(torch.arange(8.0))
    other = make_moe().bfloat16()
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other.gate.e_score_correction_bias, torch.arange(8.0))


def train_collapsed(rate: float, steps: int) -> tuple[float, float]:
    """Train a model whose routers prefer the same two experts; return MaxVio of the first and last steps."""
    torch.manual_seed(0)
    model = initialized_model(moe_config(router_bias_update_rate=rate, norm_topk_prob=True))
    for router in routers_of(model).values():
        router.e_score_correction_bias[:2] = 0.5
    return max_violations(model, 1e-3, steps)


def test_a_collapsed_router_recovers():
    first, last = train_collapsed(rate=0.008, steps=100)
    assert first == 3.0, "the start must be a collapse: two of eight experts take everything"
    # 64 tokens per expert and step: chance alone gives about 0.3.
    assert last < 0.6


def test_without_the_bias_it_stays_collapsed():
    _, last = train_collapsed(rate=0.0, steps=30)
    assert last > 2.9


def test_scheduled_rate_by_hand():
    updates = torch.arange(6)
    rise = scheduled_rate(0.5, {"warmup_steps": 4}, updates)
    assert rise.tolist() == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    fall = scheduled_rate(0.5, {"decay_start": 2, "decay_steps": 2}, updates)
    assert fall.tolist() == [0.5, 0.5, 0.25, 0.0, 0.0, 0.0]
    for at_once in ({}, {"decay_steps": 0}):
        frozen = scheduled_rate(0.5, {"decay_start": 3, **at_once}, updates)
        assert frozen.tolist() == [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]


def test_a_schedule_moves_the_bias_less_and_survives_a_checkpoint():
    def step(layers):
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.0)
        sum(moe(torch.randn(2, 7, 16)).sum() for moe in layers).backward()
        before = [moe.gate.e_score_correction_bias.clone() for moe in layers]
        optimizer.step()
        changes = [moe.gate.e_score_correction_bias - bias for moe, bias in zip(layers, before, strict=True)]
        return [round((change.amax() - change.amin()).item(), 6) for change in changes]

    settings = {"router_bias_update_rate": 0.1, "router_bias_update_schedule": {"warmup_steps": 2, "decay_start": 3}}
    layers, resumed = (torch.nn.ModuleList(make_moe(**settings) for _ in range(2)) for _ in range(2))
    for moe in layers:
        moe.gate.reset_parameters()
        torch.nn.init.normal_(moe.gate.weight)
    assert [step(layers) for _ in range(2)] == [[0.1, 0.1], [0.2, 0.2]]
    resumed.load_state_dict(layers.state_dict())
    assert [moe.gate.bias_updates.item() for moe in resumed] == [2, 2]
    assert [step(resumed) for _ in range(2)] == [[0.2, 0.2], [0.0, 0.0]]


def test_weights_fit_with_and_without_a_schedule():
    """Which begins with the training that has one."""
    plain, scheduled = (
        SharedExpertMoE(moe_config(router_bias_update_schedule=schedule)) for schedule in (None, {"warmup_steps": 9})
    )
    scheduled.gate.bias_updates.fill_(5)
    plain.load_state_dict(scheduled.state_dict())
    for assign in (False, True):
        scheduled.load_state_dict(plain.state_dict(), assign=assign)
        assert scheduled.gate.bias_updates == 0
        scheduled.to("meta")


def test_measures_of_balance_by_hand():
    loads = torch.tensor([[4.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0]])
    assert max_violation(loads).tolist() == [3.0, 0.0, 1.0]
    torch.testing.assert_close(coefficient_of_variation(loads), torch.tensor([3**0.5, 0.0, 1.0]))
    torch.testing.assert_close(load_entropy(loads), torch.tensor([0.0, 1.0, 0.5]))
    assert load_entropy(torch.tensor([[7.0]])) == 1, "of one expert there is one way to share"


def test_metrics_by_hand():
    """Two tokens, logits 2, 0, -2, 0 and 0, 0, 0, 0, one expert each; the factor of gate values is none of them."""
    settings = {"router_score_function": "softmax", "routed_scaling_factor": 2.5}
    moe = make_moe(n_embd=4, n_expert=4, n_expert_per_token=1, **settings)
    model = torch.nn.ModuleDict({"layer": torch.nn.ModuleList([torch.nn.Identity(), moe])})
    assert load_metrics(model) == {}
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.weight[:, 0] = torch.tensor([2.0, 0.0, -2.0, 0.0])
    moe.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 0.01, 0.0]))
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    x = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]]])
    for _ in range(3):  # as many accumulated batches: the means do not depend on them
        moe(x).sum().backward()
    optimizer.step()
    metrics = load_metrics(model)

    probabilities = torch.tensor([2.0, 0.0, -2.0, 0.0]).softmax(0)
    entropy = (torch.special.entr(probabilities).sum().item() + torch.tensor(4.0).log().item()) / 2
    expected = {
        "max_vio": 1.0,
        "dead_experts": 2,
        "load_cv": 1.0,
        "load_entropy": 0.5,
        "mean_gate": (probabilities[0].item() + 0.25) / 2,
        "router_entropy": entropy,
        "router_logit_rms": 1.0,
        "bias_range": 0.01,  # the two experts that have the tokens fall together
    }
    assert {
        n.removeprefix("moe_layer_01/"): v for n, v in metrics.items() if n.startswith("moe_layer")
    } == pytest.approx(expected, rel=1e-5)
    assert [metrics[f"moe_load_01/expert_{e:02}"] for e in range(4)] == [2.0, 0.0, 2.0, 0.0]
    for name, value in expected.items():
        assert metrics[f"moe/{name}"] == pytest.approx(value, rel=1e-5)


def test_layers_without_a_number_are_counted():
    layers = torch.nn.ModuleDict({"first": make_moe(), "second": make_moe()})
    sum(moe(torch.randn(2, 7, 16)).sum() for moe in layers.values()).backward()
    torch.optim.SGD(layers.parameters(), lr=0.0).step()
    metrics = load_metrics(layers)
    for i, moe in enumerate(layers.values()):
        assert metrics[f"moe_load_{i:02}/expert_00"] == pytest.approx(moe.gate.load_E[0].item() / (28 / 8))


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
def test_entropy_is_that_of_a_token_however_many_experts_it_visits(score_function):
    moe = make_moe(router_score_function=score_function)
    x = torch.randn(2, 7, 16)
    moe(x).sum().backward()
    torch.optim.SGD(moe.parameters(), lr=0.0).step()
    expected = torch.special.entr(moe.gate.scores(x.flatten(0, 1))).sum(-1).mean().item()
    assert load_metrics(moe)["moe/router_entropy"] == pytest.approx(expected, rel=1e-5)


def test_metrics_of_several_layers():
    model = initialized_model(noisy_config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randint(0, 64, (2, 32))).sum().backward()
    optimizer.step()
    metrics = load_metrics(model)
    assert "moe/bias_range" not in metrics
    layers = [metrics[f"moe_layer_{i:02}/max_vio"] for i in range(2)]
    assert metrics["moe/max_vio"] == max(layers)
    assert metrics["moe/load_entropy"] == min(metrics[f"moe_layer_{i:02}/load_entropy"] for i in range(2))
    assert metrics["moe/max_vio_avg"] == pytest.approx(sum(layers) / 2)
    assert metrics["moe/dead_experts"] == sum(metrics[f"moe_layer_{i:02}/dead_experts"] for i in range(2))
    worst, mean = {"load_cv": max, "router_logit_rms": max}, ("mean_gate", "router_entropy")
    for name, of in {**worst, **dict.fromkeys(mean, lambda values: sum(values) / 2)}.items():
        assert metrics[f"moe/{name}"] == of([metrics[f"moe_layer_{i:02}/{name}"] for i in range(2)])
    for i in range(2):
        assert sum(metrics[f"moe_load_{i:02}/expert_{e:02}"] for e in range(8)) == pytest.approx(8.0)
    assert metrics["moe/load_loss"] == sum(metrics[f"moe_layer_{i:02}/load_loss"] for i in range(2)) > 0


def test_the_tally_goes_where_its_router_goes():
    """Compilers cannot trace how the leaf of a tally is made, which would otherwise wait for the first batch."""
    router = SharedExpertMoE(moe_config(router_bias_update_rate=0.01)).gate
    assert router.tally.leaf_on(torch.device("cpu")).device.type == "cpu"
    router.to("meta")
    assert router.tally.take().device.type == "meta"
    router.to_empty(device="cpu")
    assert router.tally.take().device.type == "cpu"
    router.half()
    assert router.tally.take().dtype == torch.float64


def test_the_kernel_moves_plain_biases_of_one_card(monkeypatch):
    """Which torch's operators move where they are of another type, have gaps, are elsewhere or too many."""
    moved, wide = make_moved(2, 6, {}), make_moved(2, 1025, {})
    others = {
        "dtype": moved._replace(biases=[bias.bfloat16() for bias in moved.biases]),
        "class": moved._replace(biases=[torch.nn.Parameter(bias, False) for bias in moved.biases]),
        "gaps": moved._replace(biases=[moved.biases[0], torch.zeros(6, 2)[:, 0]]),
        "shape": moved._replace(biases=[moved.biases[0], wide.biases[1]]),
        "place": moved._replace(biases=[moved.biases[0], moved.biases[1].to("meta")]),
        "counts": moved._replace(records=[record.float() for record in moved.records]),
        "updates": moved._replace(updates=[moved.updates[0], moved.updates[1].int()]),
        "place of updates": moved._replace(updates=[moved.updates[0], moved.updates[1].to("meta")]),
        "size": wide,
    }
    assert not balancing.works_on(moved)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(launch, "triton_works_on", lambda device: True)
    assert balancing.works_on(moved)
    assert balancing.works_on(make_moved(1, 1024))
    assert not {name for name, other in others.items() if balancing.works_on(other)}


def test_the_kernel_leaves_biases_alone_that_ask_for_operators(monkeypatch):
    moved = []
    monkeypatch.setattr(balancing, "works_on", lambda moved: True)
    monkeypatch.setattr(balancing, "move_biases", moved.append)
    settings = {"router_bias_update_rate": 0.5}
    ours, loop = (make_moe(**settings, expert_backend=backend).gate for backend in (None, "loop"))
    for router in (ours, loop):
        router.tally.leaf_on(torch.device("cpu")).grad = torch.arange(11, dtype=torch.float64)
        update_routers([router])
    (of_ours,) = moved
    assert of_ours.biases[0] is ours.e_score_correction_bias
    assert torch.equal(of_ours.records[0], torch.arange(11))
    assert (of_ours.rate, of_ours.updates, of_ours.schedule) == (0.5, [], None)
    assert not ours.e_score_correction_bias.any(), "the kernel is none"
    assert loop.e_score_correction_bias.tolist() == [0.5] * 4 + [-0.5] * 4


@pytest.mark.parametrize("router_type", ["topk", "uniform"])
def test_a_model_without_data_counts_no_tokens(router_type):
    """Its FLOPs are counted in training; routers that no optimizer owns would come to the next step of another."""
    losses = {"router_load_balancing_loss_coef": 0.1, "router_load_balancing_loss_scope": "global_batch"}
    with torch.device("meta"):
        moe = SharedExpertMoE(moe_config(router_type=router_type, **(losses if router_type == "topk" else {})))
        moe(torch.empty(2, 5, 16, requires_grad=True)).sum().backward()
    assert not moe.gate.tally.pending
    assert router_type == "uniform" or not moe.gate.step_shares._pending
