"""A data loader over windows of tokens that resumes exactly.

Decisions, with their reasons:

* No workers. Gathering a batch is one indexed copy from a memory map, far cheaper than passing it between processes.
  Without prefetching, the saved position is by construction the number of batches handed out.
* The order of an epoch is a pure function of (seed, epoch), so a checkpoint holds two integers and no random state. The
  loader never touches torch's global generator (a plain `DataLoader` draws from it at the start of every epoch).
* A global batch is a contiguous piece of that order, split among the ranks. So W ranks with micro-batches of B see in
  one step what a single rank sees in one batch of W * B, or in W accumulated batches of B.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from litgpt_moe_ext.data.windows import Windows
from litgpt_moe_ext.errors import FROM_ITS_WEIGHTS, SettingsError
from litgpt_moe_ext.wording import counted


class Order(NamedTuple):
    """What decides the order of the training windows.

    Attributes:
        seed: Seed of the shuffle.
        shuffle: Whether the windows are shuffled, or stay in the order of the data.
        corpus: Identifies the data in saved states, so that a resume on other data is noticed.
    """

    seed: int = 42
    shuffle: bool = True
    corpus: str = ""

    def of_epoch(self, epoch: int, windows: int) -> np.ndarray:
        """Return the window indices of an epoch in order, int64, shape (windows,)."""
        order = np.arange(windows)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        return order


class Replica(NamedTuple):
    """A position among the data-parallel replicas.

    Attributes:
        rank: From 0.
        world_size: Number of replicas.
    """

    rank: int
    world_size: int


def corpora_of(state: Any) -> set[str]:
    """Return the keys of the corpora in a saved position of `TokenLoader`; none if it is another loader's.

    Args:
        state: A result of `TokenLoader.state_dict`, or anything else a checkpoint may hold.
    """
    saved = state.get("fingerprint") if isinstance(state, dict) else None
    if not isinstance(saved, dict):
        return set()
    found = [saved.get("corpus"), *(part[1] for part in saved.get("corpora", []))]
    return {corpus.partition(":")[0] for corpus in found if corpus}


class TokenLoader(DataLoader):
    """Batches of token windows, split over the ranks.

    Training (`train=True`): the windows are shuffled anew in every epoch (or, with `shuffle=False`, stay in the
    order of the data); each appears exactly once per epoch over all ranks, except for the fewer than
    `world_size * batch_size` that do not fill the last global batch.
    `iter()` yields the *rest of the current epoch*: it continues after the batches already handed out, also across
    `load_state_dict`, and moves on to the next epoch at the end. So re-creating the iterator for every epoch, as
    LitGPT's `CycleIterator` does, gives a new order each time.

    Evaluation (`train=False`): file order, always from the start, every window exactly once over all ranks. All ranks
    get the same number of batches, as forward passes under sharded strategies are collective; the last one holds what
    remains, between 1 and `batch_size` windows (`batch_size + 1` where more than one rank cannot share evenly).

    Every batch is an int64 tensor of shape (batch, block_size + 1). LitGPT takes columns `[:, :-1]` as inputs and
    `[:, 1:]` as targets.

    Args:
        windows: The windows to hand out.
        batch_size: Windows per batch and rank.
        train: See above.
        order: What decides the order in training; None means the defaults.
        replica: Position among the data-parallel replicas and their number; None asks `torch.distributed` when an
            iteration starts, since loaders are often built before the process group.

    Raises:
        ValueError: `batch_size` is not positive.
        SettingsError: The data is too small.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        train: bool,
        order: Order | None = None,
        replica: Replica | None = None,
    ) -> None:
        super().__init__(windows, batch_size=batch_size, drop_last=train, num_workers=0)
        self.windows = windows
        self._rows = batch_size
        self.train = train
        self.order = Order() if order is None else order
        self._replica = replica
        self._epoch = 0
        self._position = 0  # batches of the epoch that were handed out on each rank
        # To refuse too little data before the run starts.
        self._count_batches(self._rank_and_world().world_size)

    @property
    def epoch(self) -> int:
        """The epoch, from 0, to which the next batch belongs."""
        return self._epoch

    def __len__(self) -> int:
        """Number of batches of an epoch on each rank."""
        return self._count_batches(self._rank_and_world().world_size)

    def __iter__(self) -> Iterator[Tensor]:  # pyrefly: ignore[bad-override] the base class promises its private type
        return self._train_batches() if self.train else self._eval_batches()

    def _train_batches(self) -> Iterator[Tensor]:
        rank, world = self._rank_and_world()
        batches = self._count_batches(world)
        epoch = self._epoch
        pin = torch.cuda.is_available()
        order = self.order.of_epoch(epoch, len(self.windows))
        # Position and epoch are read anew for each batch: of two live iterators, only one hands out each batch.
        while self._epoch == epoch:
            start = (self._position * world + rank) * self._rows
            batch = self.windows.gather(order[start : start + self._rows], pin)
            self._position += 1
            if self._position == batches:
                self._epoch, self._position = epoch + 1, 0
            yield batch

    def _eval_batches(self) -> Iterator[Tensor]:
        rank, world = self._rank_and_world()
        batches = self._count_batches(world)
        pin = torch.cuda.is_available()
        for index in range(batches - 1):
            start = (index * world + rank) * self._rows
            yield self.windows.gather(np.arange(start, start + self._rows), pin)
        start = (batches - 1) * world * self._rows
        rest = len(self.windows) - start
        yield self.windows.gather(np.arange(start + rest * rank // world, start + rest * (rank + 1) // world), pin)

    def _rank_and_world(self) -> Replica:
        if self._replica is not None:
            return self._replica
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return Replica(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return Replica(0, 1)

    def _count_batches(self, world: int) -> int:
        count = len(self.windows)
        if self.train:
            batches = count // (world * self._rows)
            needed = world * self._rows
        else:
            # Rounded up from the smallest share, not the largest: no rank may get an empty batch.
            batches = -(-(count // world) // self._rows)
            needed = world
        if batches == 0:
            raise SettingsError(
                f"train.micro_batch_size: {self._rows} on {counted(world, 'process')} needs "
                f"{counted(needed, 'window')} of max_seq_length {self.windows.block_size}, but the {self.windows.name} "
                f"has {count} ({len(self.windows.tokens)} tokens); use a smaller micro_batch_size, a shorter "
                "max_seq_length, fewer processes, or more data"
            )
        return batches

    def _fingerprint(self, position: int) -> dict[str, Any]:
        """Return everything that the meaning of a position depends on."""
        return {
            "corpus": self.order.corpus,
            "windows": len(self.windows),
            "block_size": self.windows.block_size,
            "batch_size": self._rows,
            "world_size": self._rank_and_world().world_size,
            "seed": self.order.seed,
            "shuffle": self.order.shuffle,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training order, as plain numbers and strings, equal on all ranks.

        After k batches were handed out, a loader that loads this state continues with batch k + 1.
        """
        return {"epoch": self._epoch, "position": self._position, "fingerprint": self._fingerprint(self._position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            SettingsError: The state belongs to other data or settings, so its position would mean other windows.
        """
        missing = {"epoch", "position", "fingerprint"} - set(state)
        if missing:
            raise SettingsError(
                f"resume: the checkpoint's data position lacks {sorted(missing)}, so another kind of data loader saved "
                f"it; resume with the data module of the original run, or {FROM_ITS_WEIGHTS}"
            )
        saved, current = state["fingerprint"], self._fingerprint(state["position"])
        changed = [
            f"{key}: {saved.get(key)!r} in the checkpoint, {value!r} now"
            for key, value in current.items()
            if saved.get(key) != value
        ]
        if changed:
            raise SettingsError(
                f"resume: the {self.windows.name} cannot be resumed exactly, as the saved position belongs to another "
                f"order of windows ({', '.join(changed)}); resume with the original values, or {FROM_ITS_WEIGHTS}"
            )
        if not self._is_in_range(state):
            raise SettingsError(
                f"resume: the checkpoint's data position is damaged (epoch {state['epoch']}, batch {state['position']} "
                f"of {len(self)}); resume from another checkpoint"
            )
        self._epoch, self._position = state["epoch"], state["position"]

    def _is_in_range(self, state: dict[str, Any]) -> bool:
        return state["epoch"] >= 0 and 0 <= state["position"] < len(self)
