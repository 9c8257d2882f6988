"""Weights on their way into a new checkpoint."""

import weakref

import torch

from litgpt_moe_ext.evaluation.loading import read_checkpoint
from litgpt_moe_ext.export.litgpt_checkpoint import save_weights


def test_they_are_written_one_after_the_other(tmp_path):
    whole, made = torch.arange(12.0).view(3, 4), []

    def weights():
        yield "part", whole[1]
        yield "turned", whole.mT
        for number in range(3):
            # The one before is all that may be left.
            assert sum(reference() is not None for reference in made) <= 1
            tensor = torch.full((1000,), float(number))
            made.append(weakref.ref(tensor))
            yield f"made-{number}", tensor

    save_weights(weights(), tmp_path)
    assert (tmp_path / "lit_model.pth").stat().st_size < 3 * 4000 + 4000
    found = read_checkpoint(tmp_path / "lit_model.pth")
    assert found["part"].tolist() == whole[1].tolist()
    assert found["turned"].tolist() == whole.mT.tolist()
    assert [found[f"made-{number}"][0].item() for number in range(3)] == [0, 1, 2]
    assert found["part"].untyped_storage().nbytes() == 16
