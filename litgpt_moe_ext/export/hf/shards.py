"""Safetensors files written one at a time, so that memory holds one of them and not the model."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_BYTES = 5 * 10**9
INDEX_FILE = "model.safetensors.index.json"


def write_shards(
    announced: Mapping[str, Tensor],
    tensors: Iterator[tuple[str, Tensor]],
    folder: Path,
    max_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write tensors to as few files as their size allows, and an index if there are several.

    Args:
        announced: All tensors on the meta device, in the order of `tensors`.
        tensors: Their names and contents, computed one at a time; converted to the announced type.
        folder: An existing directory.
        max_bytes: Most bytes of tensors in a file; a larger tensor gets a file of its own.

    Returns:
        Bytes of all tensors.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in announced.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        several = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{several}.safetensors"
        content = {}
        for expected in shard:
            name, tensor = next(tensors)
            assert name == expected, f"{name} came where {expected} was announced"
            # A copy, as tied weights and experts are views of one storage, which the library refuses.
            content[name] = tensor.to(announced[name].dtype).clone(memory_format=torch.contiguous_format)
        (folder / file).touch()
        mode = (folder / file).stat().st_mode
        try:
            save_file(content, folder / file, {"format": "pt"})
            (folder / file).chmod(mode)  # the library, since 0.8, lets only the owner read it
        except SafetensorError as error:  # such as of a full disk
            raise OSError(str(error)) from error
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in announced.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return total
