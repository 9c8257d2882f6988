"""Layers of experts for the few tokens of decoding, without gradients."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu_tables.contenders.layers import make_layers, sizes
from gpu_tables.measuring.bench import Bench


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    for T in (1, 8):
        for size in sizes(bench.tiny):
            x = torch.randn(1, T, size.D, device=bench.device, dtype=bench.dtype)
            times = bench.medians(
                {name: partial(_decode, layer, x) for name, layer in make_layers(size, bench).items()}
            )
            yield {"layer": size.title, "tokens": T, **{f"{name}, ms": value for name, value in times.items()}}


@torch.no_grad()
def _decode(layer: nn.Module, x: Tensor) -> None:
    layer(x)
