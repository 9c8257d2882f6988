"""The validation loss of each corpus of a mixture, and of the whole mixture.

Shape legend: N batches of a validation on this rank, C corpora.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt_moe_ext.moe.balancing.tally import counting_dtype
from litgpt_moe_ext.training.callback import Callback
from litgpt_moe_ext.training.steps.batches import unwrapped

if TYPE_CHECKING:
    from litgpt_moe_ext.data.mixture.loader import MixtureValidation

PREFIX = "val_loss/"


def find_mixture(loader: Any) -> MixtureValidation | None:
    """Return the mixture's validation loader inside Fabric's wrapper; None if the data is not a mixture."""
    inner = unwrapped(loader)
    return inner if hasattr(inner, "names") and hasattr(inner, "weights") else None


class CorpusLosses(Callback):
    """Adds `val_loss/NAME` for every corpus of a mixture to the log of a validation.

    Args:
        ranks: Number of ranks.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._names: list[str] = []
        self._losses_C = torch.empty(0)

    def mean(self, mixture: MixtureValidation, means_N: Tensor, counts_N: Tensor) -> Tensor:
        """Return the mean of the corpora's losses with the training's weights; equal on all ranks.

        The loss of a corpus is the mean over its tokens on all ranks.

        Args:
            mixture: The loader that the batches come from.
            means_N: Mean loss of each batch.
            counts_N: Number of tokens in each mean.
        """
        names = list(islice(mixture.names(), len(means_N)))
        self._names = list(dict.fromkeys(names))
        corpus_N = torch.tensor([self._names.index(name) for name in names], device=means_N.device)
        dtype = counting_dtype(means_N.device)
        counts_N = counts_N.to(dtype)
        sums_2C = torch.zeros(2, len(self._names), dtype=dtype, device=means_N.device)
        sums_2C.index_add_(1, corpus_N, torch.stack([means_N.to(dtype) * counts_N, counts_N]))
        if self._ranks > 1:
            torch.distributed.all_reduce(sums_2C)
        self._losses_C = sums_2C[0] / sums_2C[1].clamp(min=1)
        weights_C = torch.tensor([mixture.weights[name] for name in self._names], dtype=dtype)
        if not weights_C.any():  # a few batches, as in the sanity check, may all be of corpora for the annealing
            weights_C.fill_(1)
        weights_C = (weights_C / weights_C.sum()).to(means_N.device)
        return (self._losses_C * weights_C).sum().to(means_N.dtype)

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add the corpora's losses to a validation line."""
        if "val_loss" in metrics:
            metrics |= {
                f"{PREFIX}{name}": loss for name, loss in zip(self._names, self._losses_C.tolist(), strict=True)
            }
