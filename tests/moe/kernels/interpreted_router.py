"""The fused router on a CPU, by Triton's interpreter: not collected by itself, `tests/test_triton.py` runs it."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch.utils.checkpoint import checkpoint

from litgpt_moe_ext.moe.balancing.bias import update_routers
from litgpt_moe_ext.moe.batch_metadata import TokenIds
from litgpt_moe_ext.moe.kernels.routing import fused_router, router_product
from litgpt_moe_ext.moe.kernels.triton import projecting
from litgpt_moe_ext.moe.kernels.triton.common import constexpr
from litgpt_moe_ext.moe.kernels.triton.routing import launches, sums
from litgpt_moe_ext.moe.layer import MoE
from litgpt_moe_ext.moe.registry import ROUTERS, load
from litgpt_moe_ext.moe.routing.fixed_routers import FixedRouter
from tests.models import moe_config, randomize
from tests.moe.kernels.interpreted_triton import EXAMPLES
from tests.moe.routers import (
    BALANCING,
    GLOBAL,
    NOISY,
    ORTHOGONALITY,
    RULES,
    SEQUENCES,
    compare,
    compare_fixed,
    compare_layer,
    keep_choices,
    make_gate,
    run,
)
from tests.subsets import soon

# Between them, these have everything.
SOON = ("sigmoid, groups", "sigmoid, sequences", "softmax, balancing", "noisy, everything")


@pytest.fixture(autouse=True)
def _no_card(monkeypatch):
    """The kernel of the logits' product would ask which card it is."""
    monkeypatch.setattr(router_product, "_has_tensor_cores", lambda device: True)


@pytest.mark.parametrize("name", soon(RULES, SOON))
def test_equals_the_operators(name):
    """Decision, gradients of inputs and weights, losses and statistics; several blocks, the last one not full."""
    torch.manual_seed(0)
    gate = make_gate(**RULES[name])
    if hasattr(gate, "e_score_correction_bias"):
        gate.e_score_correction_bias.normal_(std=0.3)
    compare(gate, 130)
    compare(gate, 132, n_sequence=2, padded=True)
    gate.eval()
    compare(gate, 3)


@given(
    T=st.integers(1, 70), E=st.integers(2, 9), k=st.integers(1, 4), name=st.sampled_from(list(RULES)),
    seed=st.integers(0, 99), n_sequence=st.integers(1, 3), padded=st.booleans(),
)  # fmt: skip
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_shape(T, E, k, name, seed, n_sequence, padded):
    torch.manual_seed(seed)
    changes = {} if "groups" in name else {"n_expert": E, "n_expert_per_token": min(k, E - 1)}
    compare(make_gate(**RULES[name], **changes), T * n_sequence, n_sequence, padded)


@pytest.mark.parametrize("name", ["sigmoid, sequences", pytest.param("noisy, everything", marks=pytest.mark.slow)])
def test_blocks_that_several_programs_add_up(monkeypatch, name):
    """Two of three blocks at a time, sixteen of twenty experts in the first program."""
    monkeypatch.setattr(launches, "_FEW_BLOCKS", 0)
    monkeypatch.setattr(launches, "_MOST_FOR_ONE", 0)
    monkeypatch.setattr(sums, "_BLOCKS", constexpr(2))
    torch.manual_seed(0)
    gate = make_gate(**RULES[name], n_expert=20)
    compare(gate, 262, n_sequence=2, padded=True)
    compare(gate.eval(), 99)


@pytest.mark.parametrize("name", ["sigmoid, sequences", pytest.param("noisy, everything", marks=pytest.mark.slow)])
def test_more_blocks_than_each_looks_at(monkeypatch, name):
    monkeypatch.setattr(launches, "_FEW_BLOCKS", 2)
    monkeypatch.setattr(launches, "sum_up_and_place", None)
    compare(make_gate(**RULES[name]), 134, n_sequence=2, padded=True)


@pytest.mark.parametrize("name", ["sigmoid, groups", "noisy"])
def test_a_few_tokens_are_counted_where_they_are_routed(monkeypatch, name):
    """As many as a program has, when nothing is learned."""
    torch.manual_seed(0)
    gate = make_gate(**RULES[name]).eval()
    compare(gate, 65, padded=True)
    monkeypatch.setattr(launches, "sum_up_and_place", None)
    for n_token in (1, 64):
        compare(gate, n_token)
        compare(gate, n_token, padded=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid, groups", "noisy, everything"])
def test_hundreds_of_experts(name):
    """So many that a block holds a few tokens, and blocks are added up fewer at a time."""
    torch.manual_seed(0)
    compare(make_gate(**RULES[name], n_expert=1000, n_expert_per_token=8), 44, n_sequence=2, padded=True)


@pytest.mark.parametrize(("kind", "padded"), [("hash", True), ("uniform", False)])
def test_routers_that_do_not_learn(kind, padded):
    compare_fixed(kind, padded, torch.device("cpu"))


def test_a_few_hashed_tokens(monkeypatch):
    gate = MoE(moe_config(mlp_class_name="MoE", router_type="hash", n_expert_per_token=3)).gate.eval()
    ids = TokenIds(torch.arange(9) * 7919)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(fused_router, "works_on", lambda x, fused=fused: fused)
        routed = gate(torch.randn(9, 16), 1, torch.arange(9) < 7, ids)
        results.append((routed.experts_TK.sort(1).values, routed.counts_E))
    torch.testing.assert_close(*results)
    assert torch.equal(routed.decision.ends_E, routed.counts_E.cumsum(0).int())


def test_one_expert():
    compare(make_gate(n_expert=1, n_expert_per_token=1), 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_every_token_has_different_experts_that_exist(bad):
    """Also where logits are not numbers: a wrong index would be a wrong address on a card."""
    for changes in (RULES["sigmoid, groups"], RULES["softmax"], NOISY):
        gate = make_gate(**changes)
        x = torch.randn(9, 16)
        x[::2] = bad
        _, result = run(gate.eval(), x, None, fused=True)
        chosen = result.experts_TK.sort(1).values
        assert (chosen >= 0).all()
        assert (chosen < 8).all()
        assert (chosen.diff(dim=1) > 0).all()
        assert result.counts_E.sum() == 9 * 2


def test_no_token():
    _, result = run(make_gate().eval(), torch.empty(0, 16), None, fused=True)
    assert result.weights_TK.shape == (0, 2)
    assert not result.counts_E.any()


@pytest.mark.parametrize("method", ["logits", "project"])
@pytest.mark.parametrize("kind", ["topk", "noisy_topk"])
def test_logits_of_a_subclass_are_decided_by(monkeypatch, kind, method):
    """And not those of the kernel, which knows the gate's product alone."""
    monkeypatch.setattr(router_product, "FEWEST_NUMBERS", 4)
    monkeypatch.setattr(fused_router, "works_on", lambda x: True)
    base = load(ROUTERS[kind].router)
    halved = type("Halved", (base,), {method: lambda self, *args: getattr(base, method)(self, *args) / 2})
    gate = randomize(halved(moe_config(mlp_class_name="MoE", router_type=kind)))
    x_TD = torch.randn(12, 16)
    assert gate(x_TD).decision is not None
    torch.testing.assert_close(gate.given(x_TD)[0].logits_TE, x_TD @ gate.weight.T / 2)


def test_nothing_but_padding():
    gate = make_gate(**SEQUENCES, **BALANCING, **ORTHOGONALITY)
    results, _ = run(gate, torch.randn(6, 16), torch.rand(6, 2), True, 2, torch.zeros(6, dtype=torch.bool))
    assert (results.pop("experts") == 8).all()
    for name, value in results.items():
        assert not value.any(), name


def test_accumulated_batches_have_the_shares_of_their_step(monkeypatch):
    """As with torch's operators: a loss over the global batch goes by the tokens of all batches so far."""
    gate, batches, results = make_gate(**GLOBAL), torch.randn(2, 12, 16), []
    for fused in (True, False):
        monkeypatch.setattr(fused_router, "works_on", lambda x, fused=fused: fused)
        gate.zero_grad()
        gate.e_score_correction_bias.zero_()
        for x in batches:
            gate(x).weights_TK.sum().backward()
        update_routers([gate])
        results.append((gate.weight.grad, gate.record))
    torch.testing.assert_close(*results, rtol=2e-4, atol=2e-5)


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    gate, x, upstream = make_gate(**RULES["noisy, all losses"]), torch.randn(130, 16), torch.rand(130, 2)
    (first, _), (second, _) = (run(gate, x, upstream, fused=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def other(kind, method):
    """A router whose class says something else than its base class, though only by calling it."""
    base = load(ROUTERS[kind].router)
    router = type("Other", (base,), {method: lambda self, *args: getattr(base, method)(self, *args)})
    return randomize(router(moe_config(mlp_class_name="MoE", router_type=kind)))


@pytest.mark.parametrize("make", [
    *(partial(other, kind, "choose") for kind in ("topk", "noisy_topk", "hash", "uniform")),
    partial(other, "topk", "auxiliary_loss"),
    lambda: make_gate().double(), lambda: make_gate(**NOISY).double(), lambda: make_gate(expert_backend="loop"),
])  # fmt: skip
def test_what_the_kernels_do_not_know(make, monkeypatch):
    """Other rules and losses, wider weights, and those who ask for ordinary operators."""
    monkeypatch.setattr(fused_router, "works_on", lambda x: True)
    gate = make()
    ids = TokenIds(torch.arange(12)) if isinstance(gate, FixedRouter) else None
    assert gate(torch.randn(12, 16), ids=ids).decision is None


@pytest.mark.parametrize(("name", "padded"), [
    ("gated", True), ("shared", False), pytest.param("gated", False, marks=pytest.mark.slow),
    pytest.param("on input", True, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_whole_layer(monkeypatch, watch, name, padded):
    watch.reads_unwritten = padded
    monkeypatch.setattr(fused_router, "works_on", lambda x: True)
    compare_layer(name, "triton", (2, 5), padded, torch.device("cpu"))


@pytest.mark.parametrize("name", ["shared", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gated", "on input"))])
def test_a_layer_in_half_precision(monkeypatch, name):
    """Its router passes the tokens on to routed and shared experts, whose gradients it adds up."""
    monkeypatch.setattr(router_product, "FEWEST_NUMBERS", 4)
    monkeypatch.setattr(fused_router, "works_on", lambda x: True)
    calls, original = [], projecting.project
    monkeypatch.setattr(projecting, "project", lambda *args: calls.append(args[-1]) or original(*args))
    compare_layer(name, "triton", (2, 5), False, torch.device("cpu"), torch.float16)
    assert calls == [torch.float16]


def test_checkpointing_keeps_the_decision(monkeypatch):
    """As it keeps the choice of torch's operators, so that it cannot come out differently the second time."""
    gate, calls, decide = make_gate(**BALANCING), [], launches.route
    monkeypatch.setattr(fused_router, "works_on", lambda x: True)
    monkeypatch.setattr(launches, "route", lambda *arguments: calls.append(1) or decide(*arguments))
    gradients = []
    for recompute in (
        lambda forward, x: forward(x),
        partial(checkpoint, use_reentrant=False, context_fn=keep_choices),
    ):
        x = torch.linspace(-1, 1, 12 * 16).view(12, 16).requires_grad_()
        recompute(lambda x: gate(x).weights_TK, x).square().sum().backward()
        gradients.append(x.grad)
        update_routers([gate])
        assert gate.record[:8].sum() == 24
    assert torch.equal(*gradients)
    assert len(calls) == 2
