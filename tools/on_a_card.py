"""Runs all that needs a card within a time limit, into one folder: tests, then the benchmark, then `litgpt-moe tune`.

    python tools/on_a_card.py --minutes 20 --out card

For a card that is available only for a short time. Nothing is downloaded. Each part has its own time limit, after which
the next begins; the folder keeps everything measured by then:

- `report.md`: what ran, for how long and how it ended, and all tables.
- `report.json`: the same, with card, versions and clocks.
- `tests.txt` and `tests.xml`, `benchmark.txt` and `benchmark.json`, `blocks-RECIPE.txt` and `blocks-RECIPE.json`: what
  the parts wrote.

The blocks that are found stay in the folder, so that trainings compute as before.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Shares of the time that is left when a part begins. Each of the last parts gets what the others leave.
TESTS_SHARE, BENCHMARK_SHARE = 0.4, 0.7
# Whose products are searched for faster blocks: wide experts, and few and narrow ones.
TUNED = ("moe-200m-tinystories", "code-moe-60m")
# Seconds between asking a part to end and killing it.
PATIENCE = 10
OUT_OF_TIME = "out of time"
# Of what cannot be measured on this card, such as blocks where another backend computes the experts.
REFUSED = "refused"
# Result of a part until it ends in another way.
BEGUN = {"seconds": 0, "ended": "interrupted"}


def run(part: dict[str, object], command: list[str], seconds: float, folder: Path, **environment: str) -> None:
    """Run a part for at most `seconds`, with its output on the screen and in a file, and record in it how it ended."""
    start, name = time.monotonic(), part["part"]
    part["command"] = command
    log = folder / f"{name}.txt"
    # The package need not be installed.
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    print(f"\n=== {name}, at most {seconds:.0f} s: {' '.join(command)}", flush=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, **environment},
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            part["ended"] = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            part["ended"] = OUT_OF_TIME
        finally:
            _end(process)
            part["seconds"] = round(time.monotonic() - start)
    print(log.read_text(encoding="utf-8", errors="replace")[-4000:], flush=True)


def _end(process: subprocess.Popen) -> None:
    # With its children, as the tests' workers also hold the card.
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)


def cell(value: object) -> str:
    """Return a cell of a Markdown table."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def read(file: Path) -> dict:
    """Return what a part has written by now."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def last_line(file: Path) -> str:
    """Return the last line of a part's output."""
    return "".join(file.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:])


def blocks(folder: Path, recipe: str) -> dict | None:
    """Return the table of the blocks of a recipe, as far as they have been measured."""
    if not (figures := read(folder / f"blocks-{recipe}.json")):
        return None
    rows = [
        {
            "product": product["name"],
            "block": "x".join(map(str, product["table"][:3])),
            "us": product["table_us"],
            "fastest": "x".join(map(str, product["best"][:3])),
            "fastest, us": product["best_us"],
        }
        for product in figures["products"]
    ]
    sequences, tokens = figures["micro_batch"]
    return {"title": f"Blocks of {recipe}, micro-batches of {sequences} x {tokens} tokens", "rows": rows, "notes": []}


def report(parts: list[dict[str, object]], figures: dict) -> str:
    """Return everything as Markdown."""
    lines = ["# What a card said", ""]
    lines += [f"- {name}: {value}" for name, value in figures.get("environment", {}).items()]
    lines += ["", "| part | seconds | ended |", "| --- | --- | --- |"]
    lines += [f"| {part['part']} | {part['seconds']} | {part['ended']} |" for part in parts]
    lines += [f"\n{part['part']}: {part['summary']}" for part in parts if part.get("summary")]
    for table in figures.get("tables", []):
        lines += ["", f"## {table['title']}", ""]
        if rows := table["rows"]:
            lines += ["| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
            lines += ["| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows]
        lines += [f"\n({note})" for note in table["notes"]]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all parts and return the exit status: 1 if one failed, but not if time ran out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="for all of it")
    parser.add_argument("--out", type=Path, default=Path("card"), help="folder for what is found")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="of the tests")
    parser.add_argument("--device", default="cuda", help="cpu tries the code at toy sizes, without blocks")
    parser.add_argument("--only", choices=["tests", "benchmark", "blocks"], help="one of the parts")
    arguments = parser.parse_args()
    folder = arguments.out = arguments.out.resolve()
    figures_file = folder / "benchmark.json"
    if earlier := [file.name for file in (folder / "report.json", figures_file) if file.exists()]:
        parser.error(f"--out: {folder} has the {earlier[0]} of an earlier call; name another folder")
    parts: list[dict[str, object]] = []

    def save() -> None:
        figures = read(figures_file)
        figures["tables"] = [*figures.get("tables", []), *filter(None, (blocks(folder, name) for name in TUNED))]
        (folder / "report.md").write_text(report(parts, figures), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps({"parts": parts, **figures}, indent=1), encoding="utf-8")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save()
    except OSError as error:
        parser.error(f"--out: {folder} cannot be written to ({error.strerror}); name another folder")
    # As the end of a job sends it. The parts, which are in sessions of their own, would go on.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_parts(arguments, parts, save)
    except KeyboardInterrupt:
        return 130
    finally:
        save()
        print(f"\nWritten to {folder}: report.md and report.json")
    return int(any(part["ended"] not in ("ok", OUT_OF_TIME, REFUSED) for part in parts))


def run_parts(arguments: argparse.Namespace, parts: list[dict[str, object]], save: Callable[[], None]) -> None:
    """Run what is asked for, and add each part to `parts` when it begins."""
    end = time.monotonic() + 60 * arguments.minutes
    os.environ["GPU_TESTS_DEVICE"] = arguments.device

    def share(part: float) -> float:
        return (1.0 if arguments.only else part) * (end - time.monotonic())

    if arguments.only in (None, "tests"):
        command = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-p", "no:cacheprovider", "--durations=15", "-rfE"]
        # Compiling kernels is most of the work, and for a CPU. Kernels before steps, so that time runs out for these.
        command += [f"--junitxml={arguments.out / 'tests.xml'}"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(arguments.processes), "--dist", "load"]
        parts.append({"part": "tests", **BEGUN})
        run(parts[-1], command, share(TESTS_SHARE), arguments.out)
        parts[-1]["summary"] = last_line(arguments.out / "tests.txt")
        save()
    if arguments.only in (None, "benchmark"):
        seconds = share(1.0 if arguments.device == "cpu" else BENCHMARK_SHARE)
        figures_file = arguments.out / "benchmark.json"
        command = ["benchmarks/gpu.py", "--out", str(figures_file), "--minutes", f"{(seconds - 45) / 60:.2f}"]
        command += ["--device", "cpu", "--tiny"] if arguments.device == "cpu" else []
        parts.append({"part": "benchmark", **BEGUN})
        run(parts[-1], command, seconds, arguments.out)
        save()
    if arguments.only in (None, "blocks") and arguments.device != "cpu":
        for i, recipe in enumerate(TUNED):
            seconds, name = (end - time.monotonic()) / (len(TUNED) - i), f"blocks-{recipe}"
            command = ["-m", "litgpt_moe_ext", "tune", f"configs/{recipe}.yaml"]
            command += ["--json", str(arguments.out / f"{name}.json")]
            parts.append({"part": name, **BEGUN})
            run(parts[-1], command, seconds, arguments.out, XDG_CACHE_HOME=str(arguments.out / "cache"))
            if parts[-1]["ended"] == "exit code 2":
                parts[-1] |= {"ended": REFUSED, "summary": last_line(arguments.out / f"{name}.txt")}
            save()


if __name__ == "__main__":
    sys.exit(main())
