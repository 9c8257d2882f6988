"""The micro-batches of a step, and how many tokens each of them predicts.

LitGPT fetches a micro-batch, trains on it, and divides its mean loss by the number of micro-batches. Where rows are
padded, micro-batches predict different numbers of tokens, and the mean of their means is not the mean over the tokens
of the step: a token counts the more, the fewer others are in its micro-batch. To weigh them, the tokens of the whole
step must be known before the first loss. So all micro-batches of a step are fetched at its beginning, where the data
position of a checkpoint is exact, and one number is summed over the ranks while the first forward pass runs.

Shape legend: B batch, T tokens, A micro-batches of a step.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.moe.balancing import counting_dtype
from litgpt_moe_ext.padding import PADDING
from litgpt_moe_ext.training.callback import Callback


def count_targets(targets: Tensor) -> Tensor:
    """Return how many targets the loss counts, int64, a scalar on their device."""
    return (targets != PADDING).sum()


def unwrapped(loader: Any) -> Any:
    """Return a data loader itself: Fabric's wrapper hands on its batches, not its attributes."""
    return getattr(loader, "_dataloader", loader)


def can_pad(loader: Any) -> bool:
    """Return whether a data loader may hand out rows with padding; one that does not say may."""
    return getattr(getattr(unwrapped(loader), "windows", None), "pads", True)


class MicroBatch(NamedTuple):
    """A micro-batch as the loop gets it.

    Attributes:
        tokens_BT: Token ids, (B, T + 1), int64.
        waited: Seconds that fetching it took.
        weight: What its mean loss is multiplied by, a scalar of float64 (float32 where the device has none); None
            stands for 1.
    """

    tokens_BT: Tensor
    waited: float
    weight: "StepWeight | None" = None


class StepWeight:
    """The weight of one micro-batch, which is computed when it is asked for.

    Args:
        step: The counts of its step.
        index: Its place in the step.
    """

    def __init__(self, step: "_Counts", index: int) -> None:
        self._step, self._index = step, index

    def __call__(self) -> Tensor:
        """Return the weight; the first call of a step waits for the other ranks' counts."""
        return self._step.weights_A()[self._index]


class StepBatches(Callback):
    """Hands out micro-batches; fetches and counts a whole step at once where rows may be padded.

    It adds `padding` to the log: the part of the tokens since the last line, over all ranks, that was padding.

    Args:
        length: Tokens per sequence.
        accumulation: Micro-batches of a step on each rank.
        ranks: Number of ranks.

    Attributes:
        counts: Whether rows may be padded.
    """

    def __init__(self, length: int, accumulation: int, ranks: int) -> None:
        self._length, self._accumulation, self._ranks = length, accumulation, ranks
        self._ahead: deque[MicroBatch] = deque()
        self._steps: list[_Counts] = []
        self.counts = False

    def next(self, fetch: Callable[[], Tensor], iteration: int) -> MicroBatch:
        """Return the next micro-batch.

        Args:
            fetch: Returns the next one of the data.
            iteration: Number of those that were trained on.
        """
        if not self.counts:
            return _fetch(fetch)
        if not self._ahead:
            self._ahead.extend(self._fetch_step(fetch, self._accumulation - iteration % self._accumulation))
        return self._ahead.popleft()

    def _fetch_step(self, fetch: Callable[[], Tensor], number: int) -> list[MicroBatch]:
        batches = [_fetch(fetch) for _ in range(number)]
        counts_A = torch.stack([count_targets(batch.tokens_BT[:, 1 : self._length + 1]) for batch in batches])
        step = _Counts(counts_A, self._accumulation * self._ranks, self._ranks)
        step.positions = sum(len(batch.tokens_BT) for batch in batches) * self._length * self._ranks
        self._steps.append(step)
        return [batch._replace(weight=StepWeight(step, index)) for index, batch in enumerate(batches)]

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add the share of padding to a line of training."""
        if "loss" in metrics and self._steps:
            real = int(torch.stack([step.total() for step in self._steps]).sum())
            metrics["padding"] = 1.0 - real / sum(step.positions for step in self._steps)
            self._steps.clear()


class _Counts:
    """The targets of a step: of each micro-batch of this rank, and of all of every rank."""

    def __init__(self, counts_A: Tensor, micro_batches: int, ranks: int) -> None:
        self._counts_A, self._micro_batches = counts_A, micro_batches
        self._total = counts_A.sum()
        self._work = torch.distributed.all_reduce(self._total, async_op=True) if ranks > 1 else None
        self._weights_A: Tensor | None = None
        self.positions = 0

    def total(self) -> Tensor:
        if self._work is not None:
            self._work.wait()  # on a GPU the stream waits, not the host
            self._work = None
        return self._total

    def weights_A(self) -> Tensor:  # noqa: N802
        if self._weights_A is None:
            dtype = counting_dtype(self._counts_A.device)
            # Exactly 1 where all counts are equal: integers below 2**53 are.
            shares_A = (self._counts_A * self._micro_batches).to(dtype)
            self._weights_A = shares_A / self.total().clamp(min=1).to(dtype)
        return self._weights_A


def _fetch(fetch: Callable[[], Tensor]) -> MicroBatch:
    asked = time.perf_counter()
    tokens_BT = fetch()
    return MicroBatch(tokens_BT, time.perf_counter() - asked)
