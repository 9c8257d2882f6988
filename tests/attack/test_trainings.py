"""Trainings with settings that nobody has tried together: however they are run, they come to the same."""

import pytest

from tests.attack.trainings import attack

# With 24, sharded processes once ended where experts were computed again.
SEEDS = (0, 1, 2, 3, 24, 25)


@pytest.mark.slow
def test_any_combination_of_training_settings(tmp_path, corpus_settings):
    found = [what for seed in SEEDS for what in attack(seed, tmp_path / str(seed), corpus_settings)]
    assert found.count("resumed") == len(SEEDS)
    assert sum(what.startswith("two processes") for what in found) >= 2
