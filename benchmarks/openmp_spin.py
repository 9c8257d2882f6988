"""The cost of spinning OpenMP threads when another program uses a core.

    uv run python benchmarks/openmp_spin.py

Trains the quickstart's model for a few steps in fresh processes, with the OpenMP runtime's default, with the spin count
of `run_train.py`, and with threads that never spin, each with and without busy processes on half of the cores. The
measurements are interleaved. Prints milliseconds per step (median) and the ratio to the default without busy processes.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from pathlib import Path

SETTINGS = {"default": {}, "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}

STEPS = """
import statistics, time, torch, yaml
import torch.nn.functional as F
from litgpt import GPT, Config
model = GPT(Config(**yaml.safe_load(open("configs/quickstart.yaml"))["model_config"]))
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.02)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(0, 2048, (16, 257))
seconds = []
for _ in range(7):
    started = time.perf_counter()
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
    seconds.append(time.perf_counter() - started)
print(statistics.median(seconds[2:]))
"""


def milliseconds_per_step(environment: dict[str, str]) -> float:
    result = subprocess.run(
        [sys.executable, "-c", STEPS], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return 1000 * float(result.stdout)


@contextlib.contextmanager
def neighbours(count: int):
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each setting")
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error(f"--rounds: {rounds} must be at least 1")
    os.chdir(Path(__file__).resolve().parents[1])
    busy = max(1, (os.cpu_count() or 1) // 2)
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(rounds):
        for count in (0, busy):
            for name, environment in SETTINGS.items():
                with neighbours(count):
                    times.setdefault((count, name), []).append(milliseconds_per_step(environment))
    reference = statistics.median(times[0, "default"])
    print(f"{'busy neighbours':>15}  {'setting':<20}  {'ms/step':>8}  {'ratio':>6}")
    for (count, name), values in times.items():
        median = statistics.median(values)
        print(f"{count:>15}  {name:<20}  {median:>8.0f}  {median / reference:>6.2f}")


if __name__ == "__main__":
    main()
