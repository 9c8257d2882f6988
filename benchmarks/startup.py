"""How long commands take to start, as a multiple of `import torch`: `python benchmarks/startup.py [--before CHECKOUT]`.

Every command runs in its own process, in turns with `import torch`. The table compares the processor time of the
process (user and system), as the minimum over rounds, which a busy machine disturbs least. `--before` names a second
checkout of the repository, with its own environment in `.venv`, to measure in the same turns. Prints a Markdown table.

`--training` first trains the quickstart for one step in each checkout, and then also measures commands that train or
load a model: the same step again, without validation and checkpoint, and `perplexity`.
"""

import argparse
import os
import resource
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# Arguments of the environment's Python, by their name in the table.
COMMANDS = {
    "`import torch`": ["-c", "import torch"],
    "`import litgpt.pretrain`": ["-c", "import litgpt.pretrain"],
    "`litgpt --help`": [".venv/bin/litgpt", "--help"],
    "`run_train.py --help`": ["run_train.py", "--help"],
    "`litgpt-moe --help`": [".venv/bin/litgpt-moe", "--help"],
    "`litgpt-moe model-card`": [".venv/bin/litgpt-moe", "model-card", "configs/quickstart.yaml"],
    "`litgpt-moe model-card configs/code-moe-800m.yaml`": [
        ".venv/bin/litgpt-moe",
        "model-card",
        "configs/code-moe-800m.yaml",
    ],
    "`litgpt-moe model-card`, its experts 4096 wide, `--devices 8`": [
        ".venv/bin/litgpt-moe",
        "model-card",
        "out/startup-wide.yaml",
        "--devices",
        "8",
    ],
    "`litgpt-moe twin`": [".venv/bin/litgpt-moe", "twin", "configs/quickstart.yaml", "out/startup-twin.yaml"],
    "`litgpt-moe schedule`": [
        ".venv/bin/litgpt-moe",
        "schedule",
        "configs/quickstart.yaml",
        "--out",
        "out/startup-schedule.png",
    ],
    "`litgpt-moe doctor`": [".venv/bin/litgpt-moe", "doctor", "configs/quickstart.yaml"],
}

STEP = ["run_train.py", "--train.max_steps=1", "--out_dir", "out/startup", "--eval.final_validation=false"]
TRAINING = {
    "first step of the quickstart": [*STEP, "--train.log_interval=1", "--sample.prompts=[]"],
    "`litgpt-moe perplexity`": [
        ".venv/bin/litgpt-moe", "perplexity", "out/startup/final", "--text", "run_train.py",
    ],
    "`litgpt-moe compare-runs`": [".venv/bin/litgpt-moe", "compare-runs", "out/startup"],
}  # fmt: skip


def checkout_at(name: str) -> Path:
    """Return a checkout of the repository with its own environment."""
    path = Path(name).resolve()
    if not (path / ".venv" / "bin" / "python").exists():
        raise argparse.ArgumentTypeError(f"{path} has no .venv/bin/python; run `uv sync` there")
    return path


def prepare(checkout: Path) -> None:
    """Write the recipe that the header of `code-moe-800m.yaml` describes with flags."""
    recipe = (checkout / "configs" / "code-moe-800m.yaml").read_text(encoding="utf-8")
    wide = recipe.replace("moe_intermediate_size: 512", "moe_intermediate_size: 4096")
    wide = wide.replace("strategy: auto", "strategy: fsdp2")
    (checkout / "out").mkdir(exist_ok=True)
    (checkout / "out" / "startup-wide.yaml").write_text(wide, encoding="utf-8")


def processor_seconds(checkout: Path, arguments: list[str]) -> float:
    """Run the command and return the processor time it took."""
    # Files of an earlier round would be refused, or moved aside.
    (checkout / "out" / "startup-twin.yaml").unlink(missing_ok=True)
    if "--out_dir" in arguments:
        shutil.rmtree(checkout / "out" / "startup", ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    python = checkout / ".venv" / "bin" / "python"
    result = subprocess.run(
        [python, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    # `doctor` exits with 1 if a recipe does not fit this machine.
    if result.returncode not in (0, 1) or "Traceback" in result.stderr:
        raise SystemExit(f"{checkout}: {arguments} failed:\n{result.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=checkout_at, help="another checkout, measured in turns with this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of commands")
    parser.add_argument("--training", action="store_true", help="measure commands that train or load a model as well")
    options = parser.parse_args()
    checkouts = [checkout for checkout in (options.before, REPOSITORY) if checkout]
    commands = {
        name: arguments
        for name, arguments in {**COMMANDS, **(TRAINING if options.training else {})}.items()
        if name == "`import torch`" or not options.only or any(part in name for part in options.only)
    }
    for checkout in checkouts:
        prepare(checkout)
        if options.training:
            processor_seconds(checkout, TRAINING["first step of the quickstart"])  # prepares the data
    seconds: dict[tuple[Path, str], list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, arguments in commands.items():
            for checkout in checkouts:
                seconds[checkout, name].append(processor_seconds(checkout, arguments))
    columns = ["before", "now"][-len(checkouts) :]
    print(f"| command | {' | '.join(f'{column}, s | {column}, ratio' for column in columns)} |")
    print(f"|---|{'---|---|' * len(columns)}")
    for name in commands:
        cells = []
        for checkout in checkouts:
            least = min(seconds[checkout, name])
            torch = min(seconds[checkout, "`import torch`"])
            cells.append(f"{least:.2f} | {least / torch:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
