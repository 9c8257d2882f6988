"""Data that litdata streams, as LitGPT's data modules read it."""

from typing import Any

from litgpt_moe_ext.host.replaced import wrapping


def copy_sequences(item_loader: Any) -> None:
    """Give each sequence memory of its own.

    litdata 0.2 returns views of a chunk's file, and unmaps the file once the next chunk is read, even if the batch that
    is being made still has views of it. Where a worker reads a single sequence of a chunk (the last one of a folder,
    or its share of one), the process crashes, or the sequence becomes one of another chunk.
    """

    @wrapping(item_loader.TokensLoader, "load_item_from_chunk")
    def load_item_from_chunk(original: Any, *args: Any, **kwargs: Any) -> Any:
        from torch import Tensor

        sequence = original(*args, **kwargs)
        return sequence.clone() if isinstance(sequence, Tensor) else sequence.copy()
