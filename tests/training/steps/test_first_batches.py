"""What data modules of others may yield by mistake."""

import pytest
import torch

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.steps.first_batches import FirstBatches

ROWS = torch.zeros(2, 9, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "words"),
    [(None, "a NoneType"), ({"ids": ROWS, "mask": ROWS}, "a dict of ids, mask"), ([ROWS, ROWS], "a list of 2")],
)
def test_a_batch_is_one_tensor(batch, words):
    batches = FirstBatches(8, 1)
    batches.check("val_dataloader", ROWS)
    with pytest.raises(SettingsError, match=f"data: a batch of train_dataloader is {words}; it must be one tensor"):
        batches.check("train_dataloader", batch)
