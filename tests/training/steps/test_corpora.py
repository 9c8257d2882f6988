"""The validation loss of a mixture."""

from types import SimpleNamespace

import pytest
import torch

from litgpt_moe_ext.training.steps.corpora import CorpusLosses


@pytest.mark.parametrize(
    ("weights", "expected"), [({"a": 3.0, "b": 1.0}, (3 * 1.75 + 5) / 4), ({"a": 0.0, "b": 0.0}, (1.75 + 5) / 2)]
)
def test_corpora_count_by_their_weights(weights, expected):
    """All alike where none has a weight, as before the annealing."""
    mixture = SimpleNamespace(names=lambda: iter("aba"), weights=weights)
    losses, metrics = CorpusLosses(ranks=1), {"val_loss": 0.0}
    mean = losses.mean(mixture, torch.tensor([1.0, 5.0, 2.0]), torch.tensor([1, 2, 3]))
    assert mean.item() == pytest.approx(expected)
    losses.on_log(metrics)
    assert metrics == {"val_loss": 0.0, "val_loss/a": 1.75, "val_loss/b": 5.0}
