"""Everything that needs a card, in order and within a time, into one folder: the tests, then the benchmark.

    python tools/on_a_card.py --minutes 13 --out card

For a card that is there for a short time only. Nothing is downloaded. Each part has a limit of its own, after which
the next begins; what was measured until then is in the folder:

- `report.md`: what ran, for how long and how it ended, and all tables.
- `report.json`: the same, with card, versions and clocks.
- `tests.txt` and `tests.xml`, `benchmark.txt` and `benchmark.json`: what the parts wrote.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the time; the benchmark has what the tests leave.
TESTS_SHARE = 0.5
# Between asking a part to end and killing it, seconds.
PATIENCE = 10


def run(name: str, command: list[str], seconds: float, folder: Path) -> dict[str, object]:
    """Run a part with its output on the screen and in a file, at most for `seconds`; say how it ended."""
    start = time.monotonic()
    log = folder / f"{name}.txt"
    # The package need not be installed.
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    print(f"\n=== {name}, at most {seconds:.0f} s: {' '.join(command)}", flush=True)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": paths},
        )  # fmt: skip
        ended = "ok"
        try:
            code = process.wait(seconds)
            ended = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        finally:
            _end(process)
    print(log.read_text(encoding="utf-8", errors="replace")[-4000:], flush=True)
    return {"part": name, "seconds": round(time.monotonic() - start), "ended": ended, "command": command}


def _end(process: subprocess.Popen) -> None:
    # With its children: workers of the tests hold the card, too.
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)


def cell(value: object) -> str:
    """Return a cell of a Markdown table."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


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


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=13.0, help="for all of it")
    parser.add_argument("--out", type=Path, default=Path("card"), help="folder for what is found")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1), help="of the tests")
    parser.add_argument("--device", default="cuda", help="cpu tries the code at toy sizes")
    parser.add_argument("--only", choices=["tests", "benchmark"], help="one of the parts")
    arguments = parser.parse_args()
    folder = arguments.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["GPU_TESTS_DEVICE"] = arguments.device
    end = time.monotonic() + 60 * arguments.minutes
    parts: list[dict[str, object]] = []
    figures_file = folder / "benchmark.json"

    def save() -> None:
        figures = json.loads(figures_file.read_text(encoding="utf-8")) if figures_file.is_file() else {}
        (folder / "report.md").write_text(report(parts, figures), encoding="utf-8")
        (folder / "report.json").write_text(json.dumps({"parts": parts, **figures}, indent=1), encoding="utf-8")

    if arguments.only != "benchmark":
        command = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-p", "no:cacheprovider", "--durations=15", "-rfE"]
        # Compiling kernels is most of the work, and for a CPU. Kernels before steps, so that time runs out for these.
        command += [f"--junitxml={folder / 'tests.xml'}"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(arguments.processes), "--dist", "load"]
        share = 1.0 if arguments.only else TESTS_SHARE
        part = run("tests", command, share * (end - time.monotonic()), folder)
        last = (folder / "tests.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        parts.append(part | {"summary": "".join(last)})
        save()
    if arguments.only != "tests":
        left = end - time.monotonic()
        command = ["benchmarks/gpu.py", "--out", str(figures_file), "--minutes", f"{(left - 45) / 60:.2f}"]
        command += ["--device", "cpu", "--tiny"] if arguments.device == "cpu" else []
        parts.append(run("benchmark", command, left, folder))
    save()
    print(f"\nWritten to {folder}: report.md and report.json")


if __name__ == "__main__":
    main()
