"""Passes as CUDA graphs on the null GPU that computes: not collected by itself, `test_numbers.py` runs it.

The tests of `tests/gpu/test_graphs.py` at a size for which Triton's interpreter is fast enough.
"""

import pytest
import torch

from litgpt_moe_ext.errors import SettingsError
from tests.gpu.test_graphs import DOCUMENTS, GLOBAL, trained

SMALL = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_query_groups": 1, "n_expert": 4, "router_z_loss_coef": 0.01}
DENSE_FIRST = {"n_layer": 2, "first_k_dense_replace": 1, "intermediate_size": 48}
DROPOUT = {"expert_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}


@pytest.mark.parametrize(
    ("dtype", "share", "recomputed", "shape", "changes"),
    [
        # Large enough for more documents than were captured.
        (torch.bfloat16, True, "full", (3, 49), DOCUMENTS | {"embedding_dropout": 0.1}),
        (None, True, None, (2, 33), DROPOUT | GLOBAL | {"n_layer": 2, "muon": True}),
        (torch.float16, False, "selective", (2, 33), DENSE_FIRST | {"residual_dropout": 0.1}),
    ],
    ids=["documents, blocks computed again", "dropout, global batch, Muon", "experts computed again, apart"],
)  # fmt: skip
def test_replays_equal_the_passes_themselves(dtype, share, recomputed, shape, changes):
    """Losses, norms, weights, loads: in the memory of graphs, with casts and sums that micro-batches share."""
    card = torch.device("cuda")
    changes = SMALL | changes
    ours = trained(card, dtype, 2, True, share, recomputed, shape=shape, **changes)
    theirs = trained(card, dtype, 2, False, recomputed=recomputed, shape=shape, **changes)
    assert sum(bool(value.abs().sum() > 0) for value in theirs) > len(theirs) // 2  # something was computed
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mode", "dropout"), [("full", "residual_dropout"), ("selective", "expert_dropout")], ids=["full", "selective"]
)
def test_random_numbers_that_must_be_drawn_twice_are_named(mode, dropout):
    with pytest.raises(SettingsError, match="activation_checkpointing would draw other random numbers"):
        trained(torch.device("cuda"), None, 1, True, recomputed=mode, **SMALL, **{dropout: 0.1})
