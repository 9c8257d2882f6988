"""The runs of a study as processes: a few at a time, each once, whatever happens in between.

A run lives in a folder named by the hash of its settings. It is continued there by `--resume auto`, and marked as
finished by a file that is written last, so a study that was killed goes on where it was.
"""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from litgpt_moe_ext.cli.output import write_json
from litgpt_moe_ext.study.plan import Run
from litgpt_moe_ext.training.parallel.lost_processes import die_with_parent

FINISHED = "finished.json"
_TRAIN = "import sys; from litgpt_moe_ext.cli.main import main; sys.exit(main(['train', *sys.argv[1:]]))"


@dataclass(frozen=True)
class Limits:
    """What a study may take.

    Attributes:
        jobs: Runs at a time.
        seconds: Time after which runs are stopped; the next call continues them. None for no end.
        gpus: Number of GPUs, each of which takes one run at a time.
    """

    jobs: int = 1
    seconds: float | None = None
    gpus: int = 0


def is_finished(runs_dir: Path, run: Run) -> bool:
    """Return whether a run was trained to its end."""
    return (runs_dir / run.key / FINISHED).is_file()


def train(runs: Iterable[Run], runs_dir: Path, limits: Limits, say: Callable[[str], None] = print) -> list[str]:
    """Train the runs that are not finished.

    The first one begins alone, so that the others find the corpus prepared.

    Args:
        runs: The runs.
        runs_dir: Where each has its folder.
        limits: What they may take.
        say: Takes a line whenever a run ends.

    Returns:
        What went wrong, a line each.
    """
    waiting = list({run.key: run for run in runs if not is_finished(runs_dir, run)}.values())
    end = None if limits.seconds is None else time.monotonic() + limits.seconds
    places: queue.Queue[int] = queue.Queue()
    for place in range(limits.jobs):
        places.put(place)
    work = partial(_train, runs_dir=runs_dir, limits=limits, places=places, end=end, say=say)
    with ThreadPoolExecutor(limits.jobs) as pool:
        first = [pool.submit(work, run).result() for run in waiting[:1]]
        results = [*first, *pool.map(work, waiting[1:])]
    return [problem for problem in results if problem]


def _train(
    run: Run, runs_dir: Path, limits: Limits, places: queue.Queue, end: float | None, say: Callable[[str], None]
) -> str:
    if end is not None and time.monotonic() >= end:
        return f"{run.title}: not begun, out of time; the same command goes on"
    out_dir = runs_dir / run.key
    out_dir.mkdir(parents=True, exist_ok=True)
    place = places.get()
    try:
        status = _process(
            [sys.executable, "-c", _TRAIN, *run.flags(out_dir)], out_dir, _environment(limits, place), end
        )
    finally:
        places.put(place)
    if status == 0:
        write_json(out_dir / FINISHED, {"arm": run.arm, "point": run.point, "seed": run.seed, "settings": run.settings})
        say(f"{run.title}: finished, {out_dir}")
        return ""
    if end is not None and time.monotonic() >= end:
        return f"{run.title}: stopped, out of time; the same command goes on"
    return f"{run.title}: ended with status {status}; see {out_dir / 'output.txt'}"


def _environment(limits: Limits, place: int) -> dict[str, str]:
    environment = dict(os.environ)
    if limits.gpus:
        return environment | {"CUDA_VISIBLE_DEVICES": str(place % limits.gpus)}
    # Several processes with one thread each are faster than one process with several.
    threads = max(1, (os.cpu_count() or 1) // limits.jobs)
    return {"OMP_NUM_THREADS": str(threads)} | environment


def _process(command: Sequence[str], out_dir: Path, environment: dict[str, str], end: float | None) -> int:
    with (out_dir / "output.txt").open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # A study that is killed must not leave runs behind that the next one would meet in their folders. The
            # pool's threads, which start the runs, outlive them.
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )
        try:
            return process.wait(None if end is None else max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # it saves a checkpoint
            return process.wait()


def slurm_script(command: str, runs: int, gpus: int) -> str:
    """Return a SLURM array job with one run in each task.

    Args:
        command: The `litgpt-moe study` command, to which the number of the run is added.
        runs: Number of runs.
        gpus: GPUs of a task.
    """
    lines = ["#!/bin/bash", f"#SBATCH --array=0-{runs - 1}", "#SBATCH --output=slurm-%A-%a.out"]
    lines += [f"#SBATCH --gres=gpu:{gpus}"] if gpus else []
    return "\n".join((*lines, "#SBATCH --signal=SIGUSR1@300", f'{command} --only "$SLURM_ARRAY_TASK_ID"', ""))
