"""Models with settings that nobody has tried together: they compute what they should, here and elsewhere."""

import pytest

from tests.attack.combinations import attack


@pytest.mark.slow
def test_any_combination_of_model_settings(tmp_path):
    found = [what for seed in range(60) for what in attack(seed, tmp_path / str(seed))]
    assert found.count("slow ways") == 60
    assert found.count("imported") >= 10
    assert len(set(found)) >= 10  # classes of transformers among them
