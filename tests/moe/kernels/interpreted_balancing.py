"""Balancing biases on a CPU, by Triton's interpreter: not collected by itself, `tests/test_triton.py` runs it."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from litgpt_moe_ext.moe.kernels.routing.balancing import Moved, move_biases
from litgpt_moe_ext.moe.kernels.triton import balancing
from tests.moe.kernels.biases import RATE, SCHEDULES, compare, compare_rates, make_moved
from tests.moe.kernels.interpreted_triton import EXAMPLES


@given(
    L=st.integers(1, 4), E=st.integers(1, 70), schedule=st.sampled_from(SCHEDULES), seed=st.integers(0, 99),
    tokens=st.sampled_from((0, 3, 2**24, 2**40)), grid=st.booleans(),
)  # fmt: skip
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_layers(L, E, schedule, seed, tokens, grid):
    torch.manual_seed(seed)
    compare(make_moved(L, E, schedule, tokens, grid))


@pytest.mark.parametrize("E", [49, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [0, 2**40])
def test_an_expert_with_the_mean_stays(E, tokens):
    """49 times one over 49 is not one."""
    counts = torch.full((E,), tokens + 1, dtype=torch.float64)
    counts[:2] += torch.tensor([1, -1])
    bias = torch.zeros(E)
    move_biases(Moved([bias], [counts], [], RATE, None))
    assert bias.tolist() == [-RATE, RATE, *[0.0] * (E - 2)]


def test_more_layers_than_a_launch_has(monkeypatch):
    monkeypatch.setattr(balancing, "_MOST_LAYERS", 2)
    compare(make_moved(5, 6, SCHEDULES[2]))


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=str)
def test_rates_are_those_of_the_schedule(schedule):
    compare_rates(schedule, "cpu")
