"""The time to gather rows of packed documents: `uv run python benchmarks/packing.py [--before CHECKOUT]`.

Processor time per batch of 8 rows, documents of random lengths, one thread. `--before` names a second checkout of the
repository, with its own environment in `.venv`; both then take turns, each turn in its own process, and the table shows
the median of the ratios. Prints a Markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# Row length and mean length of documents, tokens.
SHAPES = ((256, 80), (256, 400), (2048, 400))
N_DOCUMENT, BATCH, N_BATCH = 20_000, 8, 100


def measure() -> dict[str, float]:
    """Return microseconds of processor time per batch by packing and shape, the best of three passes."""
    import numpy as np
    import torch

    from litgpt_moe_ext.data.packing import pack
    from litgpt_moe_ext.data.windows import DocumentWindows

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    times = {}
    for length, mean in SHAPES:
        lengths = random.integers(2, 2 * mean, N_DOCUMENT)
        tokens = random.integers(0, 4096, lengths.sum()).astype(np.uint16)
        for packing in ("best_fit", "pad"):
            windows = DocumentWindows([tokens], pack(lengths, length, packing == "best_fit"), length)
            batches = random.permutation(len(windows))[: BATCH * N_BATCH].reshape(-1, BATCH)
            passes = []
            for _ in range(3):
                start = time.process_time()
                for rows in batches:
                    windows.gather(rows, False)
                passes.append((time.process_time() - start) / len(batches) * 1e6)
            times[f"{packing} | {length} | {mean}"] = min(passes)
    return times


def measured_in(checkout: Path) -> dict[str, float]:
    """Return the same for the package of a checkout."""
    # Python looks for packages first in the script's folder, not in the working directory.
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import runpy; runpy.run_path(sys.argv[1], run_name='turn')"
    command = [str(checkout / ".venv/bin/python"), "-c", code, str(checkout), __file__]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main() -> None:
    """Measure in turns, and print the table."""
    from startup import checkout_at

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--before", type=checkout_at, help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    checkouts = [REPOSITORY, *([arguments.before] if arguments.before else [])]
    rounds = [
        dict(zip(order, map(measured_in, order), strict=True))
        for turn in range(arguments.rounds)
        for order in [checkouts[:: -1 if turn % 2 else 1]]
    ]
    print(
        "| packing | row, tokens | documents, mean tokens | batch of 8, us |" + (" / before |" * (len(checkouts) - 1))
    )
    print("| --- " * (3 + len(checkouts)) + "|")
    for name in rounds[0][REPOSITORY]:
        now = statistics.median(times[REPOSITORY][name] for times in rounds)
        row = f"| {name} | {now:.0f} |"
        if arguments.before:
            ratios = [times[REPOSITORY][name] / times[checkouts[1]][name] for times in rounds]
            row += f" {statistics.median(ratios):.2f} |"
        print(row)


if __name__ == "__main__":
    main()
elif __name__ == "turn":
    json.dump(measure(), sys.stdout)
