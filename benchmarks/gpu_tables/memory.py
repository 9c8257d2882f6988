"""Bytes that layers of experts save for their backward pass."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu_tables.contenders.layers import make_layers, sizes
from gpu_tables.measuring.bench import Bench


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    T = 64 if bench.tiny else 16384
    for size in sizes(bench.tiny):
        x = torch.randn(1, T, size.D, device=bench.device, dtype=bench.dtype).requires_grad_()
        row: dict[str, Any] = {"layer": size.title, "tokens": T}
        for name, layer in make_layers(size, bench).items():
            if name in ("triton", "grouped_mm", "LLaMAMoE", "dense"):
                works = bench.works(name, partial(layer, x))
                row[f"{name}, MB"] = saved_bytes(layer, x) / 1e6 if works else None
        yield row


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes kept for the backward pass, each storage once, without parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The graph must live until the sum is taken: freed memory could be handed out twice.
        output = layer(x)
    total = sum(storages.values())
    del output
    return total
