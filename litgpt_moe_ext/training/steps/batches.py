"""The micro-batches of a step, and how many tokens each of them predicts.

LitGPT fetches a micro-batch, trains on it, and divides its mean loss by the number of micro-batches. With padded rows,
micro-batches predict different numbers of tokens, so the mean of their means is not the mean over the tokens of the
step: tokens in sparse micro-batches weigh more. Correct weights need the token count of the whole step before the first
loss. So all micro-batches of a step are fetched at its start, where a checkpoint's data position is exact, and the
counts are summed over the ranks while the first forward pass runs.

Shape legend: B batch, T tokens, A micro-batches of a step, C kinds of counted tokens: targets, and perhaps inputs.
"""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.moe.balancing.tally import counting_dtype
from litgpt_moe_ext.tokens.padding import PADDING
from litgpt_moe_ext.training.callback import Callback


def counts_for_loss(targets: Tensor) -> Tensor:
    """Return which targets count for the loss, bool, in their shape."""
    return targets != PADDING


def unwrapped(loader: Any) -> Any:
    """Return the data loader inside Fabric's wrapper, which hides its attributes."""
    return getattr(loader, "_dataloader", loader)


def can_pad(loader: Any) -> bool:
    """Return whether a data loader may return padded rows; assume so if it does not say."""
    return getattr(getattr(unwrapped(loader), "windows", None), "pads", True)


class MicroBatch(NamedTuple):
    """A micro-batch as the loop gets it.

    Attributes:
        data: The loader's batch; in pretraining token ids, (B, T + 1), int64.
        waited: Seconds spent fetching it.
        weights: Returns factors for its mean losses, one for each kind of counted tokens, (C,), float64 (float32 if the
            device has no float64). The first call of a step waits for the other ranks' counts. None means 1.
    """

    data: Any
    waited: float
    weights: Callable[[], Tensor] | None = None


class StepBatches(Callback):
    """Hands out micro-batches; if rows may be padded, fetches and counts those of a whole step at once.

    Adds `padding` to the log: the fraction of padding among the tokens of all ranks since the last line.

    Args:
        counted: Returns masks, bool, of the tokens of a micro-batch that count: the targets of the loss, and also the
            text among the inputs if its count differs.
        accumulation: Micro-batches of a step on each rank.
        ranks: Number of ranks.

    Attributes:
        counts: Whether rows may be padded.
    """

    def __init__(self, counted: Callable[[Any], tuple[Tensor, ...]], accumulation: int, ranks: int) -> None:
        self._counted, self._accumulation, self._ranks = counted, accumulation, ranks
        self._ahead: deque[MicroBatch] = deque()
        self._steps: list[_Counts] = []
        self._text = self._positions = 0  # tokens of all logged steps: those of text, and all
        self.counts = False

    @property
    def padding(self) -> float | None:
        """Fraction of all logged tokens that was padding; None if rows cannot be padded."""
        return 1.0 - self._text / self._positions if self._positions else None

    def next(self, fetch: Callable[[], Any], iteration: int) -> MicroBatch:
        """Return the next micro-batch.

        Args:
            fetch: Fetches the next batch from the loader.
            iteration: Number of micro-batches trained on so far.
        """
        if not self.counts:
            return _fetch(fetch)
        if not self._ahead:
            self._ahead.extend(self._fetch_step(fetch, self._accumulation - iteration % self._accumulation))
        return self._ahead.popleft()

    def _fetch_step(self, fetch: Callable[[], Any], number: int) -> list[MicroBatch]:
        batches = [_fetch(fetch) for _ in range(number)]
        counted = [self._counted(batch.data) for batch in batches]
        counts_AC = torch.stack([torch.stack([tokens.sum() for tokens in ways]) for ways in counted])
        positions = sum(text.numel() for *_, text in counted) * self._ranks
        step = _Counts(counts_AC, positions, self._accumulation * self._ranks, self._ranks)
        self._steps.append(step)
        return [batch._replace(weights=partial(step.weights_C, index)) for index, batch in enumerate(batches)]

    def on_log(self, metrics: dict[str, Any]) -> None:
        """Add the share of padding to a line of training."""
        if "loss" in metrics and self._steps:
            text = int(torch.stack([step.total_C()[-1] for step in self._steps]).sum())
            positions = sum(step.positions for step in self._steps)
            metrics["padding"] = 1.0 - text / positions
            self._text, self._positions = self._text + text, self._positions + positions
            self._steps.clear()


class _Counts:
    """The token counts of a step: of each micro-batch on this rank, and in total over all ranks."""

    def __init__(self, counts_AC: Tensor, positions: int, micro_batches: int, ranks: int) -> None:
        self._counts_AC, self._micro_batches, self.positions = counts_AC, micro_batches, positions
        self._total_C = counts_AC.sum(dim=0)
        self._work = torch.distributed.all_reduce(self._total_C, async_op=True) if ranks > 1 else None
        self._weights_AC: Tensor | None = None

    def total_C(self) -> Tensor:  # noqa: N802
        if self._work is not None:
            self._work.wait()  # on a GPU the stream waits, not the host
            self._work = None
        return self._total_C

    def weights_C(self, index: int) -> Tensor:  # noqa: N802
        if self._weights_AC is None:
            dtype = counting_dtype(self._counts_AC.device)
            # Exactly 1 if all counts are equal, as float64 represents integers below 2**53 exactly.
            shares_AC = (self._counts_AC * self._micro_batches).to(dtype)
            self._weights_AC = shares_AC / self.total_C().clamp(min=1).to(dtype)
        return self._weights_AC[index]


def _fetch(fetch: Callable[[], Any]) -> MicroBatch:
    asked = time.perf_counter()
    data = fetch()
    return MicroBatch(data, time.perf_counter() - asked)
