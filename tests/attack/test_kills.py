"""Whole runs that are killed wherever they touch a file, and at any moment, give what the undisturbed run gives.

`MOE_TEST_KILLS` says how many runs of one process are killed, a third as many of two; `MOE_TEST_SEED` where.
"""

import os

import pytest

from tests.attack.faults import forget_the_average
from tests.attack.killing import Attack

KILLS = int(os.environ.get("MOE_TEST_KILLS", "6"))
SEED = int(os.environ.get("MOE_TEST_SEED", "0"))

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment(recipe, tmp_path, processes):
    with Attack(recipe, tmp_path, processes, SEED) as attack:
        attack.go_on(KILLS if processes == 1 else max(1, KILLS // 3))
    assert attack.tally.finished >= 1


def test_a_fault_in_the_code_is_found(recipe, tmp_path):
    with (
        Attack(recipe, tmp_path, 1, SEED, forget_the_average) as attack,
        pytest.raises(AssertionError, match="final/ema"),
    ):
        attack.go_on(40)  # it takes three on average
