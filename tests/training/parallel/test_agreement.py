"""What ranks agree on between two steps."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.fabric import TrainingFabric
from litgpt_moe_ext.training.parallel.agreement import Agreement, refuse_together
from tests.training.processes import in_ranks


def answers() -> list[list[int]]:
    """Return what the agreement says after three steps, the second without gradients, and between passes thereafter."""
    fabric = SimpleNamespace(world_size=dist.get_world_size(), device=torch.device("cpu"))
    seen = [1, 1]
    agreement = Agreement(fabric, lambda: tuple(seen))
    found = [list(agreement.reached())]
    seen[dist.get_rank()] = 5 + dist.get_rank()
    found.append(list(agreement.reached()))
    agreement.on_gradients_clipped(None, None, None, False)
    seen[:] = [9, 9]
    found.append(list(agreement.reached()))
    for number in (20, 30, 40):
        found.append(list(agreement.reached_earlier()))
        seen[:] = [number, number]
    return found


@pytest.mark.slow
def test_all_learn_what_one_has_seen():
    """Up to the gradients of the step, or to the look before; what comes later is for the next."""
    assert in_ranks(answers, 2) == [[[1, 1], [5, 6], [5, 6], [9, 9], [9, 9], [20, 20]]] * 2


def test_one_process_asks_nobody():
    seen = [0]
    agreement = Agreement(SimpleNamespace(world_size=1), lambda: (seen[0],))
    agreement.on_gradients_clipped(None, None, None, False)
    seen[0] = 15
    assert agreement.reached() == (15,)


def refusals(wrong: list[int]) -> list[str]:
    """Return how this rank is refused if those of these numbers have a problem."""
    rank = dist.get_rank()
    try:
        refuse_together(SimpleNamespace(world_size=dist.get_world_size()), [f"rank {rank}"] if rank in wrong else [])
    except SettingsError as error:
        return [str(error)]
    return []


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "said"), [([], []), ([1], ["rank 1"]), ([0, 1], ["rank 0"])])
def test_all_are_refused_for_the_problem_of_one(wrong, said):
    assert in_ranks(refusals, 2, wrong) == [said, said]


def test_one_process_is_refused_alone():
    fabric = SimpleNamespace(world_size=1)
    refuse_together(fabric, [])
    with pytest.raises(SettingsError, match="^first$"):
        refuse_together(fabric, ["first", "second"])


def first_without_the_other() -> str:
    """Return what a rank hears that would go first or second when the other one has ended."""
    fabric = object.__new__(TrainingFabric)
    fabric._strategy = SimpleNamespace(barrier=lambda name: dist.barrier(), global_rank=dist.get_rank())
    fabric._launched = True
    if dist.get_rank() == 1:
        dist.destroy_process_group()
        return ""
    with pytest.raises(RuntimeError) as lost, fabric.rank_zero_first():
        pass
    dist.destroy_process_group()
    return str(lost.value)


@pytest.mark.slow
def test_nobody_waits_for_a_process_that_is_gone_before_the_first_one_begins():
    said, _ = in_ranks(first_without_the_other, 2)
    assert "gloo" in said
