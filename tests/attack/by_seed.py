"""Attacks that are chosen by a seed, tried for longer than a test may."""

import argparse
import collections
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def try_seeds(description: str, count: int, attack: Callable[[int, Path], Iterator[str]]) -> None:
    """Read a command line, attack with one seed after the other, and print what failed and what could be checked.

    Args:
        description: Of the command, for its help.
        count: How many seeds, unless the command line says otherwise.
        attack: Called with a seed and a directory that is not there yet; yields what could be checked.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: collections.Counter[str] = collections.Counter()
    try:
        for seed in range(given.seed, given.seed + given.count):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found.update(attack(seed, Path(folder) / "attack"))
                except Exception as error:
                    found["FAILED"] += 1
                    print(f"{seed}: {type(error).__name__}: {str(error)[-3000:]}", flush=True)
    finally:  # also after Ctrl-C
        for what, number in sorted(found.items()):
            print(f"| {what} | {number} |")
