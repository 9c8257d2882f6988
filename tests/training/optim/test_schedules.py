"""Learning rates: exact values, ends, and that they depend on the step alone."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litgpt_moe_ext.training.optim.schedules import Schedule, count_steps, schedule_steps
from litgpt_moe_ext.training.settings import ScheduleArgs

NAMES = ("cosine", "onecycle", "wsd", "linear", "constant", "inverse_sqrt")


def rates(name: str, warmup: int = 10, total: int = 100, floor: float = 0.1, **settings) -> list[float]:
    schedule = Schedule(ScheduleArgs(name, **settings), 1.0, floor, warmup, total)
    return [schedule.rate(step) for step in range(total)]


@pytest.mark.parametrize("name", NAMES)
def test_starts_above_zero_peaks_after_the_warmup_and_ends_near_the_floor(name):
    values = rates(name)
    assert 0 < values[0] <= 0.11
    assert max(values) == pytest.approx(1.0)
    assert values.index(max(values)) in (9, 10)
    last = {"constant": 1.0, "inverse_sqrt": (10 / 99) ** 0.5}.get(name, 0.1)
    assert values[-1] == pytest.approx(last, abs=0.06)


def test_shapes():
    assert rates("linear", warmup=0, total=10, floor=0.0) == pytest.approx([1 - k / 10 for k in range(10)])
    wsd = rates("wsd", decay_fraction=0.2)
    assert wsd[10:81] == [1.0] * 71
    assert wsd[90] == pytest.approx(0.55)
    assert rates("wsd", warmup=8, total=10, decay_fraction=1.0)[7:] == pytest.approx([1.0, 1.0, 0.55])
    assert rates("inverse_sqrt")[40] == pytest.approx((10 / 40) ** 0.5)
    assert rates("cosine", warmup=0)[50] == pytest.approx(0.55)


@pytest.mark.parametrize("name", NAMES)
def test_a_warmup_is_never_cut_off(name):
    """One as long as the training, or longer, rises to its end, as a run with such settings says."""
    values = rates(name, warmup=20, total=10)
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values[-1] == pytest.approx(1.0)


def test_cosine_is_that_of_litgpt_one_step_on():
    """LitGPT's warm-up starts at 0; from its end on, the two agree."""
    from litgpt.pretrain import get_lr

    theirs = [get_lr(1.0, step, 10, 100, 0.1) for step in range(100)]
    ours = rates("cosine")
    assert ours[10:] == pytest.approx(theirs[10:])
    assert ours[:9] == pytest.approx(theirs[1:10])


@pytest.mark.parametrize("warmup", [2, 10, 99])
def test_onecycle_is_that_of_torch(warmup):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=100, pct_start=warmup / 100, final_div_factor=1 / 25 / 0.01
    )
    optimizer.step()
    expected = [scheduler.get_last_lr()[0]]
    for _ in range(99):
        scheduler.step()
        expected.append(scheduler.get_last_lr()[0])
    assert rates("onecycle", warmup=warmup, floor=0.01) == pytest.approx(expected)


@given(
    st.sampled_from(NAMES), st.integers(0, 30), st.integers(1, 40), st.lists(st.integers(0, 60), min_size=1, max_size=8)
)
def test_a_rate_depends_on_its_step_only(name, warmup, total, steps):
    """Asked in any order, also past the end, and with warm-ups longer than the training: the same bits."""
    in_order = Schedule(ScheduleArgs(name), 0.3, 0.01, warmup, total)
    expected = [in_order.rate(step) for step in range(61)]
    asked = Schedule(ScheduleArgs(name), 0.3, 0.01, warmup, total)
    assert [asked.rate(step) for step in steps] == [expected[step] for step in steps]
    assert all(0 < value <= 0.3 + 1e-12 for value in expected)


@pytest.mark.parametrize("name", NAMES)
def test_ends_of_training_are_the_lowest_rate_of_the_decay(name):
    """Nor does it rise past the end."""
    schedule = Schedule(ScheduleArgs(name), 1.0, 0.1, 5, 50)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(map(schedule.rate, range(5, 60))))


def test_iterations_as_steps():
    """A warm-up that ends within a step lasts to its end; a step that would not be whole is none."""
    assert [schedule_steps(warmup, 17, 4) for warmup in (0, 1, 4, 5, 8)] == [(0, 4), (1, 4), (1, 4), (2, 4), (2, 4)]
    assert schedule_steps(3, 9, 1) == (3, 9)


def test_steps_end_with_the_tokens_or_before():
    steps = [count_steps(SimpleNamespace(max_tokens=1099, max_steps=most), 100) for most in (None, 5, 50)]
    assert steps == [10, 5, 10]


def test_a_wrong_fraction():
    with pytest.raises(ValueError, match="schedule.decay_fraction: 1.5 must be"):
        ScheduleArgs("wsd", decay_fraction=1.5)
