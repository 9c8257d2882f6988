"""A data loader over windows of tokens that resumes exactly.

Decisions, with their reasons:

* No workers. Gathering a batch is one indexed copy out of a memory map, far cheaper than handing it between processes,
  and without prefetching the saved position is by construction the number of batches that were handed out.
* The order of an epoch is a pure function of (seed, epoch), so a checkpoint holds two integers and no random state. The
  loader never touches torch's global generator (a plain ``DataLoader`` draws from it at the start of every epoch).
* A global batch is a contiguous piece of that order, cut into one part per rank. W ranks with micro batches of B
  therefore see in one step what a single rank sees in one batch of W * B or in W accumulated batches of B.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from litgpt_moe_ext.data.windows import Windows


class TokenLoader(DataLoader):
    """Batches of token windows, split over the ranks.

    Training (``train=True``): the windows are shuffled anew in every epoch (or, with ``shuffle=False``, stay in the
    order of the data); each appears exactly once per epoch over all ranks, except for the fewer than
    ``world_size * batch_size`` that do not fill the last global batch.
    ``iter()`` yields the *rest of the current epoch*: it goes on after the batches already handed out, also across
    `load_state_dict`, and moves to the next epoch by itself once the current one is used up. So whoever re-creates
    the iterator at every epoch, as LitGPT's ``CycleIterator`` does, keeps getting new orders.

    Evaluation (``train=False``): file order, always from the start, every window exactly once over all ranks. All ranks
    get the same number of batches, as forward passes under sharded strategies are collective; the last one holds what
    remains, between 1 and ``batch_size`` windows (``batch_size + 1`` where more than one rank cannot share evenly).

    Every batch is an int64 tensor of shape (batch, block_size + 1). LitGPT takes columns ``[:, :-1]`` as inputs and
    ``[:, 1:]`` as targets.

    Args:
        windows: The windows to hand out.
        batch_size: Windows per batch and rank.
        train: See above.
        seed: Seed of the shuffle.
        shuffle: Whether training shuffles.
        corpus: Identifies the data in saved states, so that a resume on other data is noticed.
        rank: Position among the data-parallel replicas; None asks ``torch.distributed`` when an iteration starts, since
            loaders are often built before the process group.
        world_size: Number of data-parallel replicas; None as for `rank`.
        pin_memory: Gather into page-locked memory; None means: if CUDA is available.

    Raises:
        ValueError: A size is not positive, only one of `rank` and `world_size` is given, or the data is too small.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        train: bool,
        seed: int = 42,
        shuffle: bool = True,
        corpus: str = "",
        rank: int | None = None,
        world_size: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"The {windows.name} needs a micro batch size of at least 1, got {batch_size}.")
        if (rank is None) != (world_size is None):
            raise ValueError(f"Give both rank and world_size or neither, got rank={rank}, world_size={world_size}.")
        if world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..world_size-1, got rank={rank}, world_size={world_size}.")
        super().__init__(windows, batch_size=batch_size, drop_last=train, num_workers=0)
        self.windows = windows
        self.train = train
        self.seed = seed
        self.shuffle = shuffle
        self._corpus = corpus
        self._replica = None if world_size is None else (rank, world_size)
        self._pin = pin_memory
        self._epoch = 0
        self._position = 0  # batches of the epoch that were handed out on each rank
        self._count_batches(self._rank_and_world()[1])  # so that too little data is noticed before the run starts

    @property
    def epoch(self) -> int:
        """The epoch, from 0, to which the next batch belongs."""
        return self._epoch

    def __len__(self) -> int:
        """Number of batches of an epoch on each rank."""
        return self._count_batches(self._rank_and_world()[1])

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self._train_batches() if self.train else self._eval_batches()

    def _train_batches(self) -> Iterator[torch.Tensor]:
        rank, world = self._rank_and_world()
        batches = self._count_batches(world)
        epoch = self._epoch
        pin = self._pins()
        order = np.arange(len(self.windows))
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        # Position and epoch are read anew for each batch: of two live iterators, only one hands out each batch.
        while self._epoch == epoch:
            start = (self._position * world + rank) * self.batch_size
            batch = self.windows.gather(order[start : start + self.batch_size], pin)
            self._position += 1
            if self._position == batches:
                self._epoch, self._position = epoch + 1, 0
            yield batch

    def _eval_batches(self) -> Iterator[torch.Tensor]:
        rank, world = self._rank_and_world()
        batches = self._count_batches(world)
        pin = self._pins()
        for index in range(batches - 1):
            start = (index * world + rank) * self.batch_size
            yield self.windows.gather(np.arange(start, start + self.batch_size), pin)
        start = (batches - 1) * world * self.batch_size
        rest = len(self.windows) - start
        yield self.windows.gather(np.arange(start + rest * rank // world, start + rest * (rank + 1) // world), pin)

    def _rank_and_world(self) -> tuple[int, int]:
        if self._replica is not None:
            return self._replica
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _pins(self) -> bool:
        return torch.cuda.is_available() if self._pin is None else self._pin

    def _count_batches(self, world: int) -> int:
        count = len(self.windows)
        if self.train:
            batches = count // (world * self.batch_size)
            needed = world * self.batch_size
        else:
            # Rounded up from the smallest share, not the largest: no rank may come out with an empty batch.
            batches = -(-(count // world) // self.batch_size)
            needed = world
        if batches == 0:
            raise ValueError(
                f"The {self.windows.name} has {count} windows of max_seq_length={self.windows.block_size} "
                f"({len(self.windows.tokens)} tokens), too few for one batch: micro_batch_size={self.batch_size} on "
                f"{world} process(es) needs {needed}. Use a smaller micro_batch_size, a shorter max_seq_length, fewer "
                "processes, or more data."
            )
        return batches

    def _fingerprint(self) -> dict[str, Any]:
        return {
            "corpus": self._corpus,
            "windows": len(self.windows),
            "block_size": self.windows.block_size,
            "batch_size": self.batch_size,
            "world_size": self._rank_and_world()[1],
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns where the training order stands: plain numbers and strings, equal on all ranks.

        After k batches were handed out, a loader that loads this state goes on with batch k + 1.
        """
        return {"epoch": self._epoch, "position": self._position, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            ValueError: The state belongs to other data or settings, under which its position would mean other windows.
        """
        missing = {"epoch", "position", "fingerprint"} - set(state)
        if missing:
            raise ValueError(
                f"The checkpoint's data position lacks {sorted(missing)}: it was saved by another kind of data loader. "
                "Resume with the data module of the original run, or start a new run from its weights with "
                "initial_checkpoint_dir."
            )
        saved, current = state["fingerprint"], self._fingerprint()
        changed = [
            f"{key}: {saved.get(key)!r} in the checkpoint, {value!r} now"
            for key, value in current.items()
            if saved.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"Cannot resume the {self.windows.name} exactly: the saved position is one in another order of windows "
                f"({'; '.join(changed)}). Resume with the original values, or start a new run from the weights with "
                "initial_checkpoint_dir."
            )
        if not (state["epoch"] >= 0 and 0 <= state["position"] < len(self)):
            raise ValueError(
                f"The checkpoint's data position is damaged: epoch {state['epoch']}, batch {state['position']} of "
                f"{len(self)}. Resume from another checkpoint."
            )
        self._epoch, self._position = state["epoch"], state["position"]
