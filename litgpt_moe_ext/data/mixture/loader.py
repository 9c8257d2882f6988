"""Loaders over a mixture: training rows in the order of its schedule, validation corpus by corpus."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from litgpt_moe_ext.data.loader import Order, Replica, TokenLoader
from litgpt_moe_ext.data.mixture.schedule import Phases
from litgpt_moe_ext.data.windows import TokenStream, Windows
from litgpt_moe_ext.errors import SettingsError


@dataclass(frozen=True)
class Part:
    """A corpus of a mixture.

    Attributes:
        name: Name of the corpus in the recipe.
        windows: Its rows.
        order: What determines the order of its rows.
    """

    name: str
    windows: Windows
    order: Order


class MixedWindows(Windows):
    """The rows of several corpora as one endless sequence; row 0 is the first of a training.

    Each corpus has its own order, shuffled anew every time it starts over and independent of the others: its rows come
    in the order that the corpus would have alone.

    Args:
        parts: The corpora, all with rows of the same length.
        phases: The corpus of each row.
        name: Name of the data in error messages.
    """

    def __init__(self, parts: Sequence[Part], phases: Phases, name: str) -> None:
        shards = [shard for part in parts for shard in part.windows.tokens.shards]
        super().__init__(TokenStream(shards), parts[0].windows.block_size, name)
        self.parts = parts
        self.phases = phases
        self.pads = any(part.windows.pads for part in parts)
        self._orders: list[tuple[int, np.ndarray]] = [(-1, np.empty(0, np.int64))] * len(parts)

    def __len__(self) -> int:
        """Return the number of windows of all corpora together, which makes an epoch of the mixture."""
        return sum(len(part.windows) for part in self.parts)

    @property
    def targets(self) -> int:
        """See `Windows.targets`."""
        return sum(part.windows.targets for part in self.parts)

    def fill(self, out: np.ndarray, indices: np.ndarray) -> None:
        """See `Windows.fill`; `indices` are rows of the training, from 0 without end."""
        corpora, before = self.phases.look_up(indices)
        for number, part in enumerate(self.parts):
            rows = np.flatnonzero(corpora == number)
            if not len(rows):
                continue
            windows = self._windows_of(number, before[rows])
            if len(rows) == len(out):
                part.windows.fill(out, windows)
            else:
                filled = np.empty((len(rows), out.shape[1]), out.dtype)
                part.windows.fill(filled, windows)
                out[rows] = filled

    def _windows_of(self, number: int, turns: np.ndarray) -> np.ndarray:
        """Return the windows of a corpus at its rows `turns`, in ascending order."""
        size = len(self.parts[number].windows)
        first = int(turns[0]) // size
        if int(turns[-1]) < (first + 1) * size:
            return self._order(number, first)[turns - first * size]
        epochs, positions = np.divmod(turns, size)
        return np.concatenate(
            [self._order(number, int(epoch))[positions[epochs == epoch]] for epoch in np.unique(epochs)]
        )

    def _order(self, number: int, epoch: int) -> np.ndarray:
        if self._orders[number][0] != epoch:
            part = self.parts[number]
            self._orders[number] = epoch, part.order.of_epoch(epoch, len(part.windows))
        return self._orders[number][1]


class MixtureLoader(TokenLoader):
    """The training loader of a mixture.

    A global batch is a contiguous piece of the mixture's rows, split among the ranks as in `TokenLoader`. The position
    counts batches from the start of the training. No remainder of an epoch is dropped, so neither the rows nor a resume
    depend on the number of processes.

    Args:
        windows: The mixture.
        batch_size: Rows per batch and rank.
        replica: See `TokenLoader`.
    """

    def __init__(self, windows: MixedWindows, batch_size: int, replica: Replica | None = None) -> None:
        super().__init__(windows, batch_size, True, replica=replica)
        self.mixture = windows

    @property
    def epoch(self) -> int:
        """How many times the total rows of all corpora have been handed out."""
        return self._position * self._rows * self._rank_and_world().world_size // len(self.windows)

    def _train_batches(self) -> Iterator[Tensor]:
        rank, world = self._rank_and_world()
        epoch, pin = self.epoch, torch.cuda.is_available()
        while self.epoch == epoch:
            start = (self._position * world + rank) * self._rows
            batch = self.windows.gather(np.arange(start, start + self._rows), pin)
            self._position += 1
            yield batch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `TokenLoader.load_state_dict`; another beginning of the annealing is refused with what keeps it."""
        phases, block_size = self.mixture.phases, self.windows.block_size
        began = state.get("fingerprint", {}).get("annealing")
        if began is not None and phases.second is not None and began[0] != phases.border:
            then, now = began[0] * block_size, phases.border * block_size
            raise SettingsError(
                f"resume: the annealing of the mixture began after {then:,} tokens in the checkpoint, and would begin "
                f"after {now:,} now; keep it there with --data.annealing.from_tokens {then}, and from_fraction and "
                "from_step null"
            )
        super().load_state_dict(state)

    def _is_in_range(self, state: dict[str, Any]) -> bool:
        return state["epoch"] == 0 and state["position"] >= 0

    def _fingerprint(self, position: int) -> dict[str, Any]:
        parts, phases = self.mixture.parts, self.mixture.phases
        world = self._rank_and_world().world_size
        # Shares of rows still to come may change.
        annealed = phases.second is not None and position * self._rows * world > phases.border
        return {
            "corpora": [[part.name, part.order.corpus, len(part.windows)] for part in parts],
            "block_size": self.windows.block_size,
            "batch_size": self._rows,
            "world_size": world,
            "seed": [part.order.seed for part in parts],
            "shuffle": [part.order.shuffle for part in parts],
            "weights": phases.first.shares.tolist(),
            "annealing": [phases.border, *phases.second.shares.tolist()] if annealed and phases.second else None,
        }


class MixtureValidation(DataLoader):
    """The validation loader of a mixture: a batch of each corpus in turn, so that a few batches cover all corpora.

    Every window comes once, as with `TokenLoader`, and the n-th batch belongs to the same corpus on all ranks. A corpus
    whose batches are used up is skipped.

    Args:
        loaders: A validation loader for each corpus, by name.
        weights: Weight of each corpus in the loss of the mixture: its share in training.

    Attributes:
        weights: As given.
    """

    def __init__(self, loaders: Mapping[str, TokenLoader], weights: Mapping[str, float]) -> None:
        first = next(iter(loaders.values()))
        super().__init__(first.windows, batch_size=first.batch_size, num_workers=0)
        self.loaders = dict(loaders)
        self.weights = dict(weights)

    def __len__(self) -> int:
        """Number of batches on each rank."""
        return sum(map(len, self.loaders.values()))

    def __iter__(self) -> Iterator[Tensor]:  # pyrefly: ignore[bad-override] the base class promises its private type
        for turn in zip_longest(*self.loaders.values()):
            yield from (batch for batch in turn if batch is not None)

    def names(self) -> Iterator[str]:
        """Yield the corpus of each batch, in the order of the batches."""
        lengths = {name: len(loader) for name, loader in self.loaders.items()}
        for turn in range(max(lengths.values())):
            yield from (name for name, length in lengths.items() if turn < length)
