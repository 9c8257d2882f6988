"""Passes as CUDA graphs on the null GPU that computes: not collected by itself, `test_numbers.py` runs it.

The tests of `tests/gpu/test_graphs.py` at a size for which Triton's interpreter is fast enough.
"""

import pytest
import torch

from tests.gpu.test_graphs import DOCUMENTS, GLOBAL, trained

SMALL = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_query_groups": 1, "n_expert": 4, "router_z_loss_coef": 0.01}
DROPOUT = {"expert_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}


@pytest.mark.parametrize(
    ("dtype", "share", "changes"),
    [
        (torch.bfloat16, True, DOCUMENTS | GLOBAL | {"n_layer": 2}),
        (torch.float16, False, {"router_load_balancing_loss_coef": 0.01}),
        (None, True, DROPOUT),
    ],
    ids=["bfloat16 with documents and the global batch", "float16 apart", "float32 with dropout"],
)
def test_replays_equal_the_passes_themselves(dtype, share, changes):
    """Losses, norms, weights, loads: in the memory of graphs, with casts and sums that micro-batches share."""
    card = torch.device("cuda")
    ours = trained(card, dtype, 2, True, share, **(SMALL | changes))
    theirs = trained(card, dtype, 2, False, **(SMALL | changes))
    assert sum(bool(value.abs().sum() > 0) for value in theirs) > len(theirs) // 2  # something was computed
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
