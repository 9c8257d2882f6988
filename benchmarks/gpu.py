"""All measurements of this package that need a card, in one command and under eight minutes on any NVIDIA card.

    python benchmarks/gpu.py                      # Markdown on the screen, and gpu-<card>.json
    python benchmarks/gpu.py --only experts steps
    python benchmarks/gpu.py --device cpu --tiny  # the same code at toy sizes, to see that it runs

Each table is a module of `gpu_tables/`, which describes what it measures. Contenders take turns on the same data; a
cell is a median. Measurements that fail, or exceed memory or time, are left out with a message. Each table has its
share of the time, and an error ends only its table; if this process has lost the card, the rest runs in a new one. The
file is rewritten after every row and holds card, versions and clocks; please attach it to reports.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_tables import (
    attention,
    decoding,
    experts,
    gradients,
    loss,
    memory,
    promise,
    router,
    router_product,
    steps,
    validation,
)
from gpu_tables.contenders.warm_up import warm_up
from gpu_tables.measuring.bench import Bench
from gpu_tables.measuring.card import environment, is_lost
from gpu_tables.measuring.report import Report


class Table(NamedTuple):
    """A table, its share of the time, and what measures it."""

    title: str
    share: float
    rows: Callable[[Bench], Iterator[dict[str, Any]]]


TABLES = {
    "experts": Table("Experts, forward and backward", 4.0, experts.rows),
    "gradients": Table("Gradients of weights, added up", 0.4, gradients.rows),
    "router": Table("Routers, forward and backward", 0.5, router.rows),
    "router_product": Table("Routers' products", 0.6, router_product.rows),
    "loss": Table("Output head and loss, forward and backward", 0.5, loss.rows),
    "steps": Table("Whole training steps", 5.0, steps.rows),
    "validation": Table("A batch of a validation", 0.3, validation.rows),
    "attention": Table("Attention against SDPA", 1.0, attention.rows),
    "decoding": Table("Decoding, no gradients", 0.5, decoding.rows),
    "memory": Table("Saved for the backward pass", 0.5, memory.rows),
    "promise": Table("Memory of a training step", 0.5, promise.rows),
    "recomputed": Table("Whole training steps, activations of experts computed again", 1.0, steps.recomputed_rows),
    "compiled": Table("Whole training steps, compiled", 2.0, steps.compiled_rows),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="some of the tables")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, help="file for the figures (default: gpu-<card>.json)")
    parser.add_argument("--resume", action="store_true", help="keep the tables that the file has, and measure the rest")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: cuda must be there, torch finds no card; --device cpu --tiny tries the code")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments.device, arguments.tiny, arguments.minutes)
    found = environment(bench)
    card = "".join(letter if letter.isalnum() else "-" for letter in found.get("card", "cpu"))
    report = Report(arguments.out or Path(f"gpu-{card}.json"), found, arguments.resume)
    if bench.is_cuda and not arguments.resume:
        warm_up()
    names = [name for name in arguments.only if name not in report.names]
    for i, name in enumerate(names):
        table, later = TABLES[name], names[i + 1 :]
        bench.budget.begin_table(table.share / sum(TABLES[other].share for other in names[i:]))
        if not bench.budget.is_spent:
            report.add(name, f"{table.title} ({str(bench.dtype).removeprefix('torch.')})", table.rows(bench), bench)
        if later and is_lost(bench):
            go_on_in_a_new_process(arguments, bench, report.file, later)
    report.save()
    print(f"\nWritten to {report.file}.")


def go_on_in_a_new_process(arguments: argparse.Namespace, bench: Bench, file: Path, names: list[str]) -> None:
    """Measure the tables of these `names` with a new context of the card."""
    rest = ["--resume", "--minutes", f"{bench.budget.minutes_left:.2f}", "--out", str(file)]
    rest += ["--device", arguments.device, *(["--tiny"] if arguments.tiny else []), "--only", *names]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, __file__, *rest])


if __name__ == "__main__":
    main()
