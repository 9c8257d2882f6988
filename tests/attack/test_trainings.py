"""Trainings with settings that nobody has tried together: however they are run, they come to the same."""

import pytest

from tests.attack.trainings import STRATEGIES, attack

# With each of the strategies, and one that is exported.
SEEDS = (2, 10, 11, 18, 38)


@pytest.mark.slow
def test_any_combination_of_training_settings(tmp_path, corpus_settings):
    found = [what for seed in SEEDS for what in attack(seed, tmp_path / str(seed), corpus_settings)]
    assert found.count("resumed") == len(SEEDS)
    assert {f"two processes go on: {name}" for name in STRATEGIES} <= {what.partition(",")[0] for what in found}
