"""How tokens are cut into the rows of a batch.

There are two ways: a token stream in equal pieces (`StreamWindows`), or whole documents together (`DocumentWindows`).
A row has `block_size + 1` tokens, of which LitGPT takes `[:-1]` as inputs and `[1:]` as targets.
"""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from litgpt_moe_ext.data.packing import Packing
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.tokens.padding import PADDING, PaddedRows
from litgpt_moe_ext.tokens.rows import Rows


class TokenStream:
    """Several token arrays as one, in order.

    Args:
        shards: At least one array of token ids, each of shape (N_i,), of any integer types.
    """

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        # np.asarray drops the memmap subclass, whose per-operation bookkeeping costs more than a small copy.
        self.shards = [np.asarray(shard) for shard in shards]
        self.starts = np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)])
        self._starts = self.starts.tolist()  # Python finds one number in a list faster than NumPy in an array

    def __len__(self) -> int:
        return int(self.starts[-1])

    def copy_to(self, out: np.ndarray, start: int) -> None:
        """Copy the tokens from position `start` on into `out`, across shard borders."""
        shard = bisect_right(self._starts, start) - 1
        while len(out):
            offset = start - self._starts[shard]
            piece = self.shards[shard][offset : offset + len(out)]
            out[: len(piece)] = piece
            out = out[len(piece) :]
            start += len(piece)
            shard += 1


class Windows(IterableDataset):
    """Rows of `block_size + 1` tokens, addressed by number.

    Args:
        tokens: Where the tokens come from.
        block_size: Number of inputs (= number of targets) of a row.
        name: Name of the data in error messages.

    Attributes:
        pads: Whether rows may contain `PADDING`; batches are then `litgpt_moe_ext.tokens.padding.PaddedRows`.

    Raises:
        ValueError: `block_size` is not positive.
    """

    pads = False

    def __init__(self, tokens: TokenStream, block_size: int, name: str) -> None:
        if block_size < 1:
            raise ValueError(f"max_seq_length: {block_size} must be at least 1 (the {name})")
        self.tokens = tokens
        self.block_size = block_size
        self.name = name

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of windows."""

    @property
    @abstractmethod
    def targets(self) -> int:
        """Number of predicted tokens in all windows, without padding."""

    @abstractmethod
    def fill(self, out: np.ndarray, indices: np.ndarray) -> None:
        """Write the windows with these indices into `out`, int64, shape (len(indices), block_size + 1)."""

    def gather(self, indices: np.ndarray, pin_memory: bool = False) -> Tensor:
        """Return the windows with these indices as new rows, int64, (len(indices), block_size + 1).

        Args:
            indices: Indices of the windows.
            pin_memory: Whether the rows go to a GPU: then their memory is page-locked, and they are `Rows`.
        """
        out = torch.empty((len(indices), self.block_size + 1), dtype=torch.int64, pin_memory=pin_memory)
        self.fill(out.numpy(), indices)
        if self.pads:
            return out.as_subclass(PaddedRows)
        return out.as_subclass(Rows) if pin_memory else out

    def __iter__(self) -> Iterator[Tensor]:
        """Yield every window in order, int64, shape (block_size + 1,)."""
        for index in range(len(self)):
            yield self.gather(np.array([index]))[0]


class StreamWindows(Windows):
    """Windows that start every `block_size` tokens of the stream, regardless of documents.

    Neighbours share one token: the last target of one window is the first input of the next. So every token but the
    very first is a target exactly once, also across shard borders. A remainder too short for a window is left out.

    Args:
        shards: The token stream, as in `TokenStream`.
        block_size: As in `Windows`.
        name: As in `Windows`.

    Raises:
        ValueError: `block_size` is not positive.
        SettingsError: There are fewer than block_size + 1 tokens.
    """

    def __init__(self, shards: Sequence[np.ndarray], block_size: int, name: str = "data") -> None:
        super().__init__(TokenStream(shards), block_size, name)
        count = len(self.tokens)
        if count < block_size + 1:
            remedy = (
                f"use a shorter max_seq_length (at most {count - 1}) or more data" if count > 1 else "give more data"
            )
            raise SettingsError(
                f"train.max_seq_length: {block_size} needs windows of {block_size + 1} tokens, but the {name} has "
                f"{count}; {remedy}"
            )
        self._count = (count - 1) // block_size
        starts = self.tokens.starts
        # Per shard: its first whole window, the end of its whole windows, and a view of them.
        self._first = -(-starts[:-1] // block_size)
        self._end = (starts[1:] - 1) // block_size
        self._views = [
            np.lib.stride_tricks.sliding_window_view(shard[first * block_size - start :], block_size + 1)[::block_size]
            if end > first
            else None
            for shard, start, first, end in zip(self.tokens.shards, starts, self._first, self._end, strict=False)
        ]

    def __len__(self) -> int:
        return self._count

    @property
    def targets(self) -> int:
        """See `Windows.targets`."""
        return self._count * self.block_size

    def fill(self, out: np.ndarray, indices: np.ndarray) -> None:
        """See `Windows.fill`."""
        if len(self._views) == 1 and (views := self._views[0]) is not None:
            out[...] = views[indices]
            return
        shard_of = np.searchsorted(self.tokens.starts, indices * self.block_size, side="right") - 1
        whole = indices < self._end[shard_of]
        for shard in np.unique(shard_of[whole]):
            rows = np.flatnonzero(whole & (shard_of == shard))
            out[rows] = self._views[shard][indices[rows] - self._first[shard]]
        for row in np.flatnonzero(~whole):
            self.tokens.copy_to(out[row], int(indices[row]) * self.block_size)


class DocumentWindows(Windows):
    """Windows of whole documents (or of pieces of a document that is longer than a window), filled up with padding.

    Args:
        shards: The token stream, as in `TokenStream`.
        packing: Which pieces of the stream share a window, as from `litgpt_moe_ext.data.packing.pack`.
        block_size: As in `Windows`.
        name: As in `Windows`.
    """

    pads = True

    def __init__(self, shards: Sequence[np.ndarray], packing: Packing, block_size: int, name: str = "data") -> None:
        super().__init__(TokenStream(shards), block_size, name)
        self.packing = packing

    def __len__(self) -> int:
        return len(self.packing.window_starts) - 1

    @property
    def targets(self) -> int:
        """See `Windows.targets`; the first token of a piece is not a target."""
        return int(self.packing.lengths.sum()) - len(self)

    def fill(self, out: np.ndarray, indices: np.ndarray) -> None:
        """See `Windows.fill`."""
        out.fill(PADDING)
        windows, starts, lengths = self.packing.window_starts, self.packing.starts, self.packing.lengths
        borders = zip(windows[indices].tolist(), windows[indices + 1].tolist(), strict=True)
        for row, (first, end) in zip(out, borders, strict=True):
            filled = 0
            for start, length in zip(starts[first:end].tolist(), lengths[first:end].tolist(), strict=True):
                self.tokens.copy_to(row[filled : filled + length], start)
                filled += length
