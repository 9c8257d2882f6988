"""Blocks that `litgpt-moe tune` has measured, in one file for each kind of card and version of Triton.

Another version may compile a block to something slower, or to something that does not fit.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from litgpt_moe_ext.errors import SettingsError, one_line
from litgpt_moe_ext.files.durable import replacing
from litgpt_moe_ext.moe.kernels.triton.tiling.tiles import RowsWork, Tile, WeightsWork

Work = TypeVar("Work", RowsWork, WeightsWork)


class TunedTiles(NamedTuple):
    """Measured blocks.

    Attributes:
        rows: Those of products of rows.
        weights: Those of gradients of weights.
    """

    rows: dict[RowsWork, Tile]
    weights: dict[WeightsWork, Tile]


def file_of(device: torch.device) -> Path:
    """Return the file for a card, which need not exist."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return Path(caches) / "litgpt_moe_ext" / f"tiles-{card}-triton-{triton.__version__}.json"


def read(device: torch.device) -> TunedTiles:
    """Return what has been measured on this kind of card with this version of Triton.

    Raises:
        SettingsError: If the file cannot be read.
    """
    file = file_of(device)
    if not file.is_file():
        return TunedTiles({}, {})
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return TunedTiles(_entries(content["rows"], RowsWork), _entries(content["weights"], WeightsWork))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingsError(
            f"{file} must hold the blocks that `litgpt-moe tune` measured ({one_line(error)}); delete it, and measure "
            "again if you like"
        ) from None


def keep(work: RowsWork | WeightsWork, tile: Tile | None, device: torch.device) -> Path:
    """Keep the fastest block of a product in the card's file instead of what it had for that, and return the file.

    Args:
        work: The product.
        tile: The block; None if that of the tables is as fast.
        device: The card.
    """
    file, known = file_of(device), read(device)
    tiles: dict[Any, Tile] = known.rows if isinstance(work, RowsWork) else known.weights
    if tile == tiles.get(work):
        return file
    if tile is None:
        del tiles[work]
    else:
        tiles[work] = tile
    content = {
        name: [{"work": work._asdict(), "tile": tile._asdict()} for work, tile in tiles.items()]
        for name, tiles in known._asdict().items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return file


def _entries(entries: list[dict[str, Any]], kind: type[Work]) -> dict[Work, Tile]:
    return {kind(**entry["work"]): Tile(**entry["tile"]) for entry in entries}
