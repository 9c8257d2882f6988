"""A data loader over a flat array of tokens that resumes exactly.

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
from torch.utils.data import DataLoader, IterableDataset


class TokenWindows(IterableDataset):
    """Windows of ``block_size + 1`` tokens that start every ``block_size`` tokens.

    Neighbours share one token: the last target of one window is the first input of the next, so every token but the
    very first is a target exactly once. A remainder too short for a window is left out.

    Args:
        tokens: Token ids, shape (N,), any integer dtype.
        block_size: Number of inputs (= number of targets) of a window.
        name: What to call the data in error messages.

    Raises:
        ValueError: `block_size` is not positive or N < block_size + 1.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, name: str = "data") -> None:
        if block_size < 1:
            raise ValueError(f"The {name} needs a block size (max_seq_length) of at least 1, got {block_size}.")
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"The {name} has {len(tokens)} tokens, but one window of max_seq_length={block_size} needs "
                f"{block_size + 1}. Use a shorter max_seq_length (at most {max(len(tokens) - 1, 0)}) or more data."
            )
        self.tokens = tokens
        self.block_size = block_size
        # np.asarray drops the memmap subclass, whose per-operation bookkeeping costs more than a small gather.
        self._windows = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), block_size + 1)[::block_size]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._windows)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields every window in file order, int64, shape (block_size + 1,)."""
        for window in self._windows:
            yield torch.from_numpy(window.astype(np.int64))

    def gather(self, indices: np.ndarray, pin_memory: bool = False) -> torch.Tensor:
        """Returns the windows with these indices as a new int64 tensor of shape (len(indices), block_size + 1)."""
        out = torch.empty((len(indices), self.block_size + 1), dtype=torch.int64, pin_memory=pin_memory)
        out.numpy()[...] = self._windows[indices]
        return out


class TokenLoader(DataLoader):
    """Batches of token windows, split over the ranks.

    Training (``train=True``): the windows are shuffled anew in every epoch; each appears exactly once per epoch over
    all ranks, except for the fewer than ``world_size * batch_size`` that do not fill the last global batch.
    ``iter()`` yields the *rest of the current epoch*: it goes on after the batches already handed out, also across
    `load_state_dict`, and moves to the next epoch by itself once the current one is used up. So whoever re-creates
    the iterator at every epoch, as LitGPT's ``CycleIterator`` does, keeps getting new orders.

    Evaluation (``train=False``): file order, always from the start, every window exactly once over all ranks. All ranks
    get the same number of batches, as forward passes under sharded strategies are collective; the last one holds what
    remains, between 1 and ``batch_size`` windows (``batch_size + 1`` where more than one rank cannot share evenly).

    Every batch is an int64 tensor of shape (batch, block_size + 1). LitGPT takes columns ``[:, :-1]`` as inputs and
    ``[:, 1:]`` as targets.

    Args:
        tokens: Token ids, shape (N,), usually from `litgpt_moe_ext.data.shards.open_shard`.
        block_size: Number of inputs of a window.
        batch_size: Windows per batch and rank.
        train: See above.
        seed: Seed of the shuffle.
        name: What to call the data in error messages.
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
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        train: bool,
        seed: int = 42,
        name: str = "data",
        corpus: str = "",
        rank: int | None = None,
        world_size: int | None = None,
        pin_memory: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"The {name} needs a micro batch size of at least 1, got {batch_size}.")
        if (rank is None) != (world_size is None):
            raise ValueError(f"Give both rank and world_size or neither, got rank={rank}, world_size={world_size}.")
        if world_size is not None and not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..world_size-1, got rank={rank}, world_size={world_size}.")
        windows = TokenWindows(tokens, block_size, name)
        super().__init__(windows, batch_size=batch_size, drop_last=train, num_workers=0)
        self.windows = windows
        self.train = train
        self.seed = seed
        self._name = name
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
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))
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
                f"The {self._name} has {count} windows of max_seq_length={self.windows.block_size} "
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
                f"Cannot resume the {self._name} exactly: the saved position is one in another order of windows "
                f"({'; '.join(changed)}). Resume with the original values, or start a new run from the weights with "
                "initial_checkpoint_dir."
            )
        if not (state["epoch"] >= 0 and 0 <= state["position"] < len(self)):
            raise ValueError(
                f"The checkpoint's data position is damaged: epoch {state['epoch']}, batch {state['position']} of "
                f"{len(self)}. Resume from another checkpoint."
            )
        self._epoch, self._position = state["epoch"], state["position"]
