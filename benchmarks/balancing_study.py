"""What balancing does: the quickstart model without any, and with each method, three seeds each.

    python benchmarks/balancing_study.py            # all of it, about 20 minutes on two cores

Every run is an ordinary `run_train.py` on the quickstart recipe with other router settings and fewer steps. A table of
the final balance and validation loss goes to the standard output, the curves to `benchmarks/balancing_study.png`, and
all logged values stay in the output directory, from which a second call continues.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"

NOISY = {"mlp_class_name": "NoisyTopKMoE", "norm_topk_prob": None, "router_score_function": None}
METHODS: dict[str, dict] = {
    "none": {"router_bias_update_rate": 0.0},
    "bias (auxiliary-loss-free)": {"router_bias_update_rate": 0.01},
    "load-balancing loss 0.01": {"router_bias_update_rate": 0.0, "router_load_balancing_loss_coef": 0.01},
    "sequence loss 0.01": {"router_bias_update_rate": 0.0, "router_sequence_balancing_loss_coef": 0.01},
    "noisy top-k, CV² losses 0.1": {**NOISY, "router_bias_update_rate": None},
}


def write_recipe(path: Path, method: str, seed: int, steps: int, out_dir: Path) -> None:
    """Write the quickstart recipe with the settings of one run."""
    recipe = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    model = recipe["model_config"] | METHODS[method]
    recipe["model_config"] = {name: value for name, value in model.items() if value is not None}
    train = recipe["train"]
    train |= {
        "max_tokens": steps * train["global_batch_size"] * recipe["model_config"]["block_size"],
        "save_interval": steps,
        "log_interval": 5,
    }
    recipe["eval"] |= {"interval": steps + 1, "max_iters": 40, "final_validation": True}
    recipe |= {"out_dir": str(out_dir), "seed": seed}
    recipe.pop("sample")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def run(method: str, seed: int, steps: int, out_dir: Path) -> list[dict[str, str]]:
    """Train unless that was done before, and return the rows of the log."""
    slug = "".join(c if c.isalnum() else "-" for c in method)
    directory = out_dir / f"{slug}-{seed}-{steps}"
    if not (directory / "final" / "lit_model.pth").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        recipe = directory / "recipe.yaml"
        write_recipe(recipe, method, seed, steps, directory)
        command = [sys.executable, str(ROOT / "run_train.py"), "--config", str(recipe)]
        # One thread each: two runs at a time are faster than one with two threads.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
    with (directory / "metrics-wide.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def series(rows: list[dict[str, str]], name: str) -> list[float]:
    """Return the logged values of a metric."""
    return [float(row[name]) for row in rows if row.get(name)]


def print_table(results: dict[str, list[list[dict[str, str]]]]) -> None:
    print("| balancing | validation loss | MaxVio, last 20 % | worst layer's dead experts | load CV |")
    print("|---|---|---|---|---|")
    for method, runs in results.items():
        losses = [series(rows, "val_loss")[-1] for rows in runs]

        def late(name: str, runs: list = runs) -> list[float]:
            return [statistics.mean(values[-len(values) // 5 :]) for values in (series(rows, name) for rows in runs)]

        cells = [spread(losses, 3), spread(late("moe/max_vio"), 2), spread(late("moe/dead_experts"), 1)]
        print("| " + " | ".join([method, *cells, spread(late("moe/load_cv"), 2)]) + " |")


def spread(values: list[float], digits: int) -> str:
    """Write the mean of several seeds, and their range."""
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def plot(results: dict[str, list[list[dict[str, str]]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for i, (method, runs) in enumerate(results.items()):
        for axis, name in zip(axes, ("moe/max_vio", "loss"), strict=True):
            curves = [series(rows, name) for rows in runs]
            length = min(map(len, curves))
            steps = [5 * (k + 1) for k in range(length)]
            columns = list(zip(*(curve[:length] for curve in curves), strict=True))
            axis.plot(steps, [statistics.mean(c) for c in columns], color=f"C{i}", label=method)
            axis.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color=f"C{i}", alpha=0.15)
    axes[0].set(
        title="Imbalance: MaxVio of the worst layer", xlabel="optimizer step", ylabel="max load / mean load - 1"
    )
    axes[0].set_ylim(bottom=0)
    axes[1].set(title="Training loss", xlabel="optimizer step", ylabel="cross-entropy, nats")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out-dir", type=Path, default=ROOT / "out" / "balancing_study")
    parser.add_argument("--plot", type=Path, default=ROOT / "benchmarks" / "balancing_study.png")
    arguments = parser.parse_args()
    tasks = [(method, seed) for seed in range(1, arguments.seeds + 1) for method in METHODS]
    # The first run prepares the corpus, which the others then find.
    first = run(*tasks[0], arguments.steps, arguments.out_dir)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rest = pool.map(lambda task: run(*task, arguments.steps, arguments.out_dir), tasks[1:])
        results: dict[str, list] = {method: [] for method in METHODS}
        for (method, seed), rows in zip(tasks, [first, *rest], strict=True):
            results[method].append(rows)
            print(f"{method}, seed {seed}: validation loss {series(rows, 'val_loss')[-1]:.3f}", file=sys.stderr)
    print_table(results)
    plot(results, arguments.plot)


if __name__ == "__main__":
    main()
