"""Writing and reading the model file of a checkpoint."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint directly to its file.

    Lightning first copies it in memory and then to a temporary file, possibly on another file system. That is not
    needed here: `store.save_whole` already writes to a temporary directory.

    Args:
        mmap: Whether to map the file through the page cache, which the processes of a node share, instead of reading
            it. Only for training that copies what it reads, to a GPU or into a shard: tensors kept would stay mapped to
            the file.
    """

    def __init__(self, mmap: bool) -> None:
        super().__init__()
        self.mmap = mmap

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write to `path`."""
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: str | Path, *_args: Any, **_options: Any) -> dict[str, Any]:
        """Return the content of `path`; tensors and plain data only."""
        return torch.load(path, map_location="cpu", mmap=self.mmap, weights_only=True)
