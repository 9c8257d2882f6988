"""Safetensors files written tensor by tensor, so that memory holds one tensor and not the model.

The `safetensors` library needs all tensors of a file in memory. Its format is a length, a JSON header and the tensors'
bytes, so a file can also be written one tensor at a time.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Sketch(NamedTuple):
    """What is known of a tensor before it is computed."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return its size in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(
    sketches: Iterable[Sketch], tensors: Iterator[tuple[str, Tensor]], folder: Path, max_bytes: int = MAX_SHARD_BYTES
) -> int:
    """Write tensors to as few files as their size allows, and an index if there are several.

    Args:
        sketches: All tensors, in the order of `tensors`.
        tensors: Their names and contents, computed one at a time; converted to the type of their sketch.
        folder: An existing directory.
        max_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own.

    Returns:
        Bytes of all tensors.
    """
    shards: list[list[Sketch]] = [[]]
    filled = 0
    for sketch in sketches:
        if shards[-1] and filled + sketch.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(sketch)
        filled += sketch.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, tensors)
        weight_map |= dict.fromkeys((sketch.name for sketch in shard), name)
    total = sum(sketch.nbytes for shard in shards for sketch in shard)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total


def _write_file(path: Path, shard: list[Sketch], tensors: Iterator[tuple[str, Tensor]]) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for sketch in shard:
        header[sketch.name] = {
            "dtype": _DTYPES[sketch.dtype],
            "shape": list(sketch.shape),
            "data_offsets": [offset, offset + sketch.nbytes],
        }
        offset += sketch.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # Tensors must begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for sketch in shard:
            name, tensor = next(tensors)
            assert name == sketch.name, f"{name} came where {sketch.name} was announced"
            assert tuple(tensor.shape) == sketch.shape, f"{name} has the shape {tuple(tensor.shape)}"
            contiguous = tensor.to(sketch.dtype).contiguous()
            file.write(contiguous.reshape(-1).view(torch.uint8).numpy().data)
