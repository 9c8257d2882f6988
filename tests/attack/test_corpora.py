"""Corpora of files that nobody has written, with settings that nobody has tried together: no token is lost."""

import pytest

from tests.attack.corpora import attack

SEEDS = range(16)


@pytest.mark.slow
def test_any_corpus(tmp_path):
    found = [what for seed in SEEDS for what in attack(seed, tmp_path / str(seed))]
    assert sum(what.startswith("killed") for what in found) >= 12
    assert found.count("training: every row once, resumed") >= 8
    assert found.count("mixture: shares, resumed") >= 8
    assert found.count("token shards") >= 4
    assert len({what for what in found if what.startswith("rows: ")}) == 3
