"""How the model file of a checkpoint is written and read."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to its file.

    Lightning's own first makes a copy of all of it in memory, and another in a temporary file that may lie on another
    file system; the directory that `store.save_whole` writes into is temporary already.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write to `path`."""
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: str | Path, *_args: Any, **_options: Any) -> dict[str, Any]:
        """Read from `path` into memory, tensors and plain data only."""
        return torch.load(path, map_location="cpu", weights_only=True)


class MappedCheckpointIO(DirectCheckpointIO):
    """Reads a checkpoint through the file system's cache, which the processes of a node share.

    For training that copies what it reads, to a GPU or into a shard: what it keeps would stay part of the file.
    """

    def load_checkpoint(self, path: str | Path, *_args: Any, **_options: Any) -> dict[str, Any]:
        """Map `path` into memory, tensors and plain data only."""
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def checkpoint_io(accelerator: str) -> DirectCheckpointIO:
    """Return how a rank that holds whole tensors on an accelerator reads and writes."""
    return DirectCheckpointIO() if accelerator == "cpu" else MappedCheckpointIO()
