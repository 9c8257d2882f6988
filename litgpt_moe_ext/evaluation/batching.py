"""How many requests go through the model at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from litgpt_moe_ext.errors import SettingsError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Where the search for the largest fitting batch begins, as in lm-eval.
LARGEST_AUTOMATIC = 64
# On a CPU nothing is tried out: running out of memory would kill the process or freeze the machine.
AUTOMATIC_ON_CPU = 8


@dataclass(frozen=True)
class BatchSize:
    """The `batch_size` setting.

    Attributes:
        size: Number of requests per batch, or the first one to try.
        searches: How many times to search for the largest fitting size, at equal distances along the requests; 0 for a
            fixed size. Requests get shorter along the way, so later searches may find a larger size.
    """

    size: int
    searches: int = 0

    @classmethod
    def parse(cls, batch_size: int | str, device: torch.device) -> "BatchSize":
        """Read the setting: a positive integer, "auto", or "auto:N" for N searches.

        Raises:
            SettingsError: If it is something else.
        """
        name, _, searches = str(batch_size).partition(":")
        automatic = name == "auto" and (searches.isdecimal() and int(searches) > 0 or batch_size == "auto")
        if automatic and device.type == "cpu":
            print(f"batch_size: {batch_size} means {AUTOMATIC_ON_CPU} on the CPU.")
            return cls(AUTOMATIC_ON_CPU)
        if automatic:
            return cls(LARGEST_AUTOMATIC, searches=int(searches or 1))
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise SettingsError(
                f"batch_size: {batch_size!r} must be a positive integer, 'auto', or 'auto:N' with N >= 1"
            )
        return cls(int(batch_size))

    def run(self, items: Sequence[Item], function: Callable[[Sequence[Item]], Result]) -> Iterator[Result]:
        """Apply `function` to `items` in batches.

        Args:
            items: Items to process, the most expensive first, so that running out of memory happens early.
            function: Called with consecutive slices; called again with a smaller slice if it runs out of memory and the
                size is automatic.

        Yields:
            What `function` returns, in order.

        Raises:
            RuntimeError: The backend's error when memory runs out, with a note that names the setting.
        """
        start, size = 0, self.size
        # Integer arithmetic puts the first search at item 0 and never two at the same item.
        search_at = {len(items) * i // self.searches for i in range(self.searches)}
        announce = False
        while start < len(items):
            if any(position <= start for position in search_at):
                search_at = {position for position in search_at if position > start}
                size, announce = self.size, True
            batch = items[start : start + size]
            try:
                result = function(batch)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if not self.searches or len(batch) == 1:
                    error.add_note(f"batch_size: {len(batch)} does not fit into memory; take a smaller one, or 'auto'.")
                    raise
                while size >= len(batch):
                    size //= 2
            else:
                if announce:
                    print(f"batch_size: auto chose {size}.")
                    announce = False
                yield result
                start += len(batch)
                continue
            # Outside the `except` block, so the error no longer keeps the tensors of the failed call alive.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    # Only CUDA has an exception class for this.
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def pad_right(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Stack token sequences of different lengths.

    Args:
        sequences: B sequences of token numbers.
        device: Where to put the result.

    Returns:
        (B, length of the longest), int64, padded with token 0 on the right.
    """
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, batch_first=True).to(device)
