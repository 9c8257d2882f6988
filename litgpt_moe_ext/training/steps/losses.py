"""Losses as means over tokens: of a step, over its micro-batches and all ranks, and of a validation.

LitGPT averages the means of batches. They are multiplied here by the batch's share of the tokens, in units of an
average batch, so that LitGPT's averages, and those over ranks, come out as means over tokens. For batches of equal
size that factor is exactly 1, and every number is LitGPT's own.
"""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.training.steps.batches import MicroBatchWeights, counts_for_loss
from litgpt_moe_ext.training.steps.corpora import CorpusLosses, find_mixture


class TokenMeans:
    """What stands in for LitGPT's loss function and its validation.

    Args:
        ranks: Number of ranks.

    Attributes:
        weights: Of the micro-batch that is trained on; None stands for 1.
        corpora: Keeps the validation losses of a mixture's corpora.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._validated: list[tuple[Tensor, Tensor]] | None = None
        self.corpora = CorpusLosses(ranks)
        self.weights: MicroBatchWeights | None = None

    def wrap_loss(self, cross_entropy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss function that weighs its micro-batch.

        Auxiliary losses, which follow the scale of the loss, are weighed with it.

        Args:
            cross_entropy: Takes logits and targets and returns the mean over the targets that count.
        """

        def loss(logits: Any, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            mean = cross_entropy(logits, targets, *args, **kwargs)
            if self._validated is not None:
                self._validated.append((mean, counts_for_loss(targets).sum()))
            elif self.weights is not None:
                # A weight in 16 bits would be off by up to 0.4 %.
                dtype = torch.promote_types(mean.dtype, torch.float32)
                return mean.to(dtype) * self.weights()[0].to(dtype)
            return mean

        return loss

    def wrap_validation(self, validate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a validation whose result is the mean over all tokens of all ranks, equal on them.

        That of a mixture is the mean over its corpora, weighted like the training.

        Args:
            validate: LitGPT's; calls the loss function once for every batch.
        """

        def validate_tokens(fabric: Any, model: Any, val_dataloader: Any, *args: Any, **kwargs: Any) -> Tensor:
            self._validated = validated = []
            try:
                validate(fabric, model, val_dataloader, *args, **kwargs)
            finally:
                self._validated = None
            counts_N = torch.stack([count for _, count in validated])
            # The mean over no token, for which torch's loss function returns NaN, counts nothing.
            means_N = torch.stack([mean for mean, _ in validated]).masked_fill(counts_N == 0, 0.0)
            if (mixture := find_mixture(val_dataloader)) is not None:
                return self.corpora.mean(mixture, means_N, counts_N)
            return self._token_mean(means_N, counts_N)

        return validate_tokens

    def _token_mean(self, means_N: Tensor, counts_N: Tensor) -> Tensor:
        total = counts_N.sum()
        if self._ranks > 1:
            torch.distributed.all_reduce(total)
        weights_N = (counts_N * (len(counts_N) * self._ranks)).to(means_N.dtype) / total.clamp(min=1).to(means_N.dtype)
        mean = (means_N * weights_N).mean()
        if self._ranks > 1:
            torch.distributed.all_reduce(mean)
            mean = mean / self._ranks
        return mean


class RunningMean:
    """The mean of the last losses, in the place of torchmetrics', which waits for the device at every one of them.

    A loss that is not a number is not left out of the mean, as torchmetrics does.

    Args:
        window: Their number.
        **_options: Of torchmetrics' class, without effect here.
    """

    def __init__(self, window: int, **_options: Any) -> None:
        self._losses: deque[Tensor] = deque(maxlen=window)

    def to(self, _device: Any) -> "RunningMean":
        """Return itself: the losses stay where they are."""
        return self

    def update(self, loss: Tensor) -> None:
        """Take over a loss, a scalar."""
        self._losses.append(loss)

    def compute(self) -> Tensor:
        """Return the mean, float32 or the type of larger losses, added up one by one as torchmetrics does."""
        losses = [loss if loss.dtype == torch.float64 else loss.float() for loss in self._losses]
        return functools.reduce(torch.add, losses) / len(losses)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether every number is finite, an int64 scalar on the device of the first tensor: 1 or 0."""
    # Of shards that wait on the CPU some are gathered on the GPU after a validation.
    found = [tensor.isfinite().all().to(tensors[0].device) for tensor in tensors]
    return torch.stack(found).all().long()
