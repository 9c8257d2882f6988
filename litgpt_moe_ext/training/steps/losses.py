"""Losses as means over tokens: of a step, over its micro-batches and all ranks, and of a validation.

LitGPT averages the means of batches. Here each mean is first multiplied by the batch's token count relative to an
average batch, so that averages over batches and ranks become means over tokens. For batches of equal size the factor is
exactly 1, and every number is LitGPT's own.
"""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.training.steps.batches import counts_for_loss
from litgpt_moe_ext.training.steps.corpora import CorpusLosses, find_mixture


class TokenMeans:
    """Wraps LitGPT's loss function and validation.

    Args:
        ranks: Number of ranks.

    Attributes:
        weights: Returns the weights of the current training micro-batch; None means 1.
        corpora: Keeps the validation losses of a mixture's corpora.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._validated: list[tuple[Tensor, Tensor]] | None = None
        self.corpora = CorpusLosses(ranks)
        self.weights: Callable[[], Tensor] | None = None

    def wrap_loss(self, cross_entropy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss function that weighs its micro-batch.

        Auxiliary losses follow the scale of the loss and so are weighed as well.

        Args:
            cross_entropy: Takes logits and targets and returns the mean over the counting targets.
        """

        def loss(logits: Any, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            mean = cross_entropy(logits, targets, *args, **kwargs)
            if self._validated is not None:
                self._validated.append((mean, counts_for_loss(targets).sum()))
            elif self.weights is not None:
                # A 16-bit weight would be off by up to 0.4 %.
                dtype = torch.promote_types(mean.dtype, torch.float32)
                return mean.to(dtype) * self.weights()[0].to(dtype)
            return mean

        return loss

    def wrap_validation(self, validate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a validation whose result is the mean over the tokens of all ranks, equal on all of them.

        For a mixture, it is the mean over its corpora with the training's weights.

        Args:
            validate: LitGPT's validation, which calls the loss function once for every batch.
        """

        def validate_tokens(fabric: Any, model: Any, val_dataloader: Any, *args: Any, **kwargs: Any) -> Tensor:
            self._validated = validated = []
            try:
                validate(fabric, model, val_dataloader, *args, **kwargs)
            finally:
                self._validated = None
            counts_N = torch.stack([count for _, count in validated])
            # For a batch without counting tokens torch's loss is NaN; leave it out.
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
    """The mean of the last losses; replaces torchmetrics' class, which waits for the device at every loss.

    Unlike torchmetrics, it does not leave NaN losses out of the mean.

    Args:
        window: Number of losses.
        **_options: Options of torchmetrics' class, without effect here.
    """

    def __init__(self, window: int, **_options: Any) -> None:
        self._losses: deque[Tensor] = deque(maxlen=window)

    def to(self, _device: Any) -> "RunningMean":
        """Return itself: the losses stay where they are."""
        return self

    def update(self, loss: Tensor) -> None:
        """Add a loss, a scalar."""
        self._losses.append(loss)

    def compute(self) -> Tensor:
        """Return the mean, summed one by one as in torchmetrics; float32, or float64 for float64 losses."""
        losses = [loss if loss.dtype == torch.float64 else loss.float() for loss in self._losses]
        return functools.reduce(torch.add, losses) / len(losses)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return 1 if every number is finite, else 0, as an int64 scalar on the device of the first tensor."""
    # With shards offloaded to the CPU, some are still gathered on the GPU after a validation.
    found = [tensor.isfinite().all().to(tensors[0].device) for tensor in tensors]
    return torch.stack(found).all().long()
