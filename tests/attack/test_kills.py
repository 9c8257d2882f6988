"""Whole runs that are killed wherever they touch their directory give what the uninterrupted run gives, bit for bit.

`MOE_TEST_KILLS` says how many runs of one process are killed, a tenth as many of two; `MOE_TEST_SEED` where.
"""

import os

import pytest

from tests.attack.killing import attack

KILLS = int(os.environ.get("MOE_TEST_KILLS", "2"))
SEED = int(os.environ.get("MOE_TEST_SEED", "0"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_wherever_a_file_is_touched(recipe, tmp_path, processes):
    kills = KILLS if processes == 1 else max(1, KILLS // 10)
    tally = attack(recipe, tmp_path, kills, processes, SEED)
    assert tally.kills == kills
    assert tally.finished >= 1
