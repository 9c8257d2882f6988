"""Balancing biases that this card moves, against torch's operators on a CPU."""

import copy

import pytest
import torch

from litgpt_moe_ext.moe.balancing.bias import update_routers
from litgpt_moe_ext.moe.kernels.routing import balancing
from litgpt_moe_ext.moe.layer import MoE
from tests.gpu.card import no_waits
from tests.models import moe_config
from tests.moe.kernels.biases import RATE, SCHEDULES, compare, compare_rates, make_moved
from tests.moe.test_launches import Launches

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_triton(device):
    if device.type == "cpu":
        pytest.skip("the kernel needs a card; tests/moe interprets it")


@pytest.mark.parametrize(("L", "E"), [(1, 2), (4, 16), (61, 49), (130, 1024)], ids=str)
@pytest.mark.parametrize("tokens", [0, 2**40])
@pytest.mark.parametrize("schedule", [None, SCHEDULES[-2]], ids=str)
def test_equals_the_operators(device, L, E, tokens, schedule):
    for grid in (True, False):
        moved = make_moved(L, E, schedule, tokens, grid, device)
        assert balancing.works_on(moved)
        compare(moved)


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=str)
def test_rates_are_those_of_the_schedule(device, schedule):
    compare_rates(schedule, device)


def make_gates(*kinds):
    return [MoE(moe_config(mlp_class_name="MoE", **kind)).gate for kind in kinds]


def finish_step(gates, counts):
    """Have routers count, and what follows an optimizer step happen."""
    for gate, counts_N in zip(gates, counts, strict=True):
        leaf_N = gate.tally.leaf_on(gate.weight.device)
        leaf_N.grad = counts_N[: len(leaf_N)].to(leaf_N.device)
    update_routers(gates)


def state_of(gates):
    return [x.cpu() for gate in gates for x in (*gate.buffers(), gate.record)]


def test_routers_of_every_kind(device, monkeypatch):
    """In a launch for all with the same settings; a bias that torch's operators move, and none, are among them."""
    rate = {"router_bias_update_rate": RATE}
    scheduled, loop = {**rate, "router_bias_update_schedule": SCHEDULES[2]}, {**rate, "expert_backend": "loop"}
    gates = make_gates(
        rate, scheduled, {"router_type": "noisy_topk"}, rate, {**loop, "n_expert": 4}, {**rate, "n_expert": 12}
    )
    counts, launches = torch.randint(0, 9, (6, 20)).double(), []
    on_card, move = copy.deepcopy(gates), balancing.move_biases
    monkeypatch.setattr(balancing, "move_biases", lambda moved: (launches.append(len(moved.biases)), move(moved)))
    for gate in on_card:
        gate.to(device)
    on_card_counts = counts.to(device)
    finish_step(on_card, on_card_counts)
    with no_waits(device):
        finish_step(on_card, on_card_counts)
    for _ in range(2):
        finish_step(gates, counts)
    assert launches == 2 * [2, 1, 1]
    for ours, theirs in zip(state_of(on_card), state_of(gates), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-22)


def test_in_a_graph(device):
    """Which somebody captures who has the whole step in one."""
    gates, counts = make_gates(*[{"router_bias_update_rate": RATE}] * 3), torch.randint(0, 9, (3, 20)).double()
    on_card, on_card_counts = [gate.to(device) for gate in copy.deepcopy(gates)], counts.to(device)
    finish_step(on_card, on_card_counts)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        finish_step(on_card, on_card_counts)
    for _ in range(2):
        graph.replay()
    for _ in range(3):
        finish_step(gates, counts)
    for ours, theirs in zip(state_of(on_card), state_of(gates), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2**-22)


def test_what_torch_moves(device):
    """What is of another type, has gaps, is elsewhere or too many; and everything where somebody watches."""
    moved = make_moved(2, 6, {}, device=device)
    wide = make_moved(2, 1025, {}, device=device)
    others = {
        "dtype": moved._replace(biases=[bias.bfloat16() for bias in moved.biases]),
        "class": moved._replace(biases=[torch.nn.Parameter(bias, False) for bias in moved.biases]),
        "gaps": moved._replace(biases=[torch.zeros(6, 2, device=device)[:, 0], moved.biases[1]]),
        "shape": moved._replace(biases=[moved.biases[0], wide.biases[1]]),
        "counts": moved._replace(records=[record.float() for record in moved.records]),
        "place": moved._replace(updates=[update.cpu() for update in moved.updates]),
        "size": wide,
    }
    assert balancing.works_on(moved)
    assert not any(map(balancing.works_on, others.values()))
    with Launches():
        assert not balancing.works_on(moved)
