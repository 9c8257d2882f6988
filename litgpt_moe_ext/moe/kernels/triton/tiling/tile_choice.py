"""Which block a product of the experts gets: the one measured on this card for it, otherwise the tables'."""

import contextlib
import functools
from collections.abc import Iterator

import torch

from litgpt_moe_ext.moe.kernels.triton.common import capability_of
from litgpt_moe_ext.moe.kernels.triton.tiling.tiles import RowsWork, Tile, WeightsWork, card_for
from litgpt_moe_ext.moe.kernels.triton.tiling.tuned_tiles import TunedTiles, read

_TUNED: dict[torch.device, TunedTiles] = {}


@functools.cache
def processors_of(device: torch.device) -> int:
    """Return how many multiprocessors a card has; for the interpreter few, so that small tests have all blocks."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def rows_tile(work: RowsWork, device: torch.device) -> Tile:
    """Return the block of a product of rows."""
    tables = card_for(capability_of(device)).tiles[work.precision]
    return _tuned(device).rows.get(work) or tables.for_rows(work, processors_of(device))


def weights_tile(work: WeightsWork, device: torch.device) -> Tile:
    """Return the block of a gradient of weights."""
    tables = card_for(capability_of(device)).tiles[work.precision]
    return _tuned(device).weights.get(work) or tables.for_weights(work, processors_of(device))


@contextlib.contextmanager
def tuned_as(tuned: TunedTiles, device: torch.device) -> Iterator[None]:
    """Within the scope, products on `device` have these blocks, and those of the tables where there is none."""
    before = _tuned(device)
    try:
        _TUNED[device] = tuned
        yield
    finally:
        _TUNED[device] = before


def _tuned(device: torch.device) -> TunedTiles:
    if device not in _TUNED:
        _TUNED[device] = read(device) if device.type == "cuda" else TunedTiles({}, {})
    return _TUNED[device]
