"""Times of the experts' products by block size, to fill the tables of `moe/kernels/triton/tiles.py`.

    python benchmarks/blocks.py                       # on a card, some minutes; blocks.json and Markdown
    python benchmarks/blocks.py --tokens 2048 --only weights

For each product of five layers: the tables' block and the fastest blocks tried, in microseconds of a launch out of
twenty in a CUDA graph. Gradients of weights are written, or added to others. Please send results for cards that the
tables lack.

Shape legend: T tokens, D model width, F hidden width of one expert, E experts, K chosen experts per token.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_tables.contenders.layers import SIZES, Size
from torch import Tensor

from litgpt_moe_ext.moe.kernels.plan import Outer, Plan, Product, plan_of, sort_rows
from litgpt_moe_ext.moe.kernels.triton import rows, weights
from litgpt_moe_ext.moe.kernels.triton.tiles import Tile

LAYERS = {size.name: size for size in (Size("quickstart", 128, 64, 16, 4), *SIZES)}
_STAGES = (2, 3, 4)
TRIED = {
    "rows": [
        Tile(r, o, 64, w, s)
        for r, o, w, s in itertools.product((32, 64, 128), (64, 128, 256), (4, 8), _STAGES)
        if 32 * w * 32 <= r * o <= 32 * w * 128
    ],
    "weights": [
        Tile(r, o, i, w, s)
        for r, (o, i), w, s in itertools.product(
            (32, 64, 128), ((64, 64), (64, 128), (128, 64), (128, 128)), (4, 8), _STAGES
        )
        if 32 * w * 32 <= o * i <= 32 * w * 128
    ],
}


class Fixed:
    """Replaces the tables, and records what they would have chosen.

    Args:
        tiles: The tables' entry.
        tile: The block for everything; None for the tables' own.
    """

    def __init__(self, tiles: Any, tile: Tile | None) -> None:
        self.tiles, self.tile = tiles, tile
        self.chosen: Tile | None = None

    def for_rows(self, *work: Any) -> Tile:
        self.chosen = self.tile or self.tiles.for_rows(*work)
        return self.chosen

    def for_weights(self, *work: Any) -> Tile:
        self.chosen = self.tile or self.tiles.for_weights(*work)
        return self.chosen


@contextlib.contextmanager
def blocks(module: Any, tile: Tile | None) -> Iterator[list[Fixed]]:
    """Within the scope, have a module's launches use one block; yield the blocks used."""
    original, taken = module.tiles_for, []

    def tiles_for(*arguments: Any) -> tuple[Fixed, str]:
        tiles, precision = original(*arguments)
        taken.append(Fixed(tiles, tile))
        return taken[-1], precision

    module.tiles_for = tiles_for
    try:
        yield taken
    finally:
        module.tiles_for = original


def make_plan(T: int, E: int, K: int, device: str) -> Plan:
    """Return an uneven routing: the fullest expert has about three times the tokens of the emptiest."""
    generator = torch.Generator().manual_seed(0)
    chances_E = torch.rand(E, generator=generator) + 0.5
    experts_TK = torch.multinomial(chances_E.expand(T, E), K, generator=generator).to(device)
    rows_R, ends_E = sort_rows(experts_TK, torch.bincount(experts_TK.flatten(), minlength=E))
    return plan_of(rows_R, ends_E, T)


def products(layer: str, T: int, device: str, dtype: torch.dtype) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    """Return the products of a layer, forward and backward: the kind of their blocks, and what computes them."""
    _, D, F, E, K = dataclasses.astuple(LAYERS[layer])
    plan = make_plan(T, E, K, device)
    make = partial(torch.randn, device=device, dtype=dtype)
    x_TD, y_TD, h_RG, a_RF = make(T, D), make(T, D), make(T * K, 2 * F), make(T * K, F)
    up_EGD, down_EDF = make(E, 2 * F, D), make(E, D, F)
    of_rows = {
        "up": Product(x_TD, up_EGD, None, plan, gather=True),
        "down": Product(a_RF, down_EDF, None, plan, scatter=True),
        "down, backward": Product(y_TD, down_EDF.transpose(1, 2), None, plan, gather=True),
        "up, backward": Product(h_RG, up_EGD.transpose(1, 2), None, plan, scatter=True),
    }
    of_weights = {
        "up": Outer(h_RG, x_TD, plan, gather_right=True),
        "down": Outer(y_TD, a_RF, plan, gather_left=True),
    }
    made = {name: ("rows", partial(rows.multiply_rows, product)) for name, product in of_rows.items()}
    for name, outer in of_weights.items():
        total_EOI = torch.zeros(E, outer.left.size(1), outer.right.size(1), device=device)
        add = partial(weights.sum_outer_products, outer, torch.float32)
        made[f"gradient of {name}"] = ("weights", add)
        made[f"gradient of {name}, added"] = ("weights", partial(add, total_EOI))
    return made


def microseconds(call: Callable[[], object], calls: int = 20) -> float:
    """Return the median time of a call in a CUDA graph of several."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def compile_block(job: tuple[str, int, torch.dtype, str, Tile]) -> None:
    """Compile what a block needs for a layer, for the cache on the disk."""
    layer, T, dtype, kind, tile = job
    module = {"rows": rows, "weights": weights}[kind]
    for of_kind, call in products(layer, T, "cuda", dtype).values():
        if of_kind == kind:
            # A block that does not fit is skipped when measuring.
            with contextlib.suppress(Exception), blocks(module, tile):
                call()
    torch.cuda.synchronize()


def measure(kind: str, call: Callable[[], Tensor]) -> dict[str, Any]:
    """Return the time with the tables' block and with each block that fits, the fastest first."""
    module = {"rows": rows, "weights": weights}[kind]
    with blocks(module, None) as taken:
        ours = microseconds(call)
    times = []
    for tile in TRIED[kind]:
        with contextlib.suppress(Exception), blocks(module, tile):
            times.append((microseconds(call), tuple(tile)))
    return {"chosen": tuple(taken[-1].chosen), "us": ours, "tried": sorted(times)}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--only", choices=list(TRIED), help="products of rows, or gradients of weights")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("blocks.json"))
    arguments = parser.parse_args()
    if not arguments.out.absolute().parent.is_dir():
        parser.error(f"--out: {arguments.out.parent} must be a folder")
    if not torch.cuda.is_available():
        parser.error("torch finds no card")
    dtype = getattr(torch, arguments.dtype)
    kinds = [arguments.only] if arguments.only else list(TRIED)
    jobs = [(layer, 256, dtype, kind, tile) for kind in kinds for tile in TRIED[kind] for layer in arguments.layers]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        pool.map(compile_block, jobs, chunksize=1)
    found = []
    print("| layer | tokens | product | block | us | fastest | us |\n" + "| --- " * 7 + "|")
    for layer, T in itertools.product(arguments.layers, arguments.tokens):
        for name, (kind, call) in products(layer, T, "cuda", dtype).items():
            if kind in kinds:
                row = measure(kind, call)
                found.append({"layer": layer, "tokens": T, "product": name, **row})
                best_us, best = row["tried"][0] if row["tried"] else (row["us"], row["chosen"])
                cells = (layer, T, name, row["chosen"], f"{row['us']:.1f}", best, f"{best_us:.1f}")
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    card = torch.cuda.get_device_name()
    arguments.out.write_text(json.dumps({"card": card, "dtype": arguments.dtype, "rows": found}, indent=1), "utf-8")
    print(f"\n{card}, {arguments.dtype}; every time is in {arguments.out}.")


if __name__ == "__main__":
    main()
