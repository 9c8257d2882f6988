"""The runs of a study as processes: a few at a time, each finished exactly once, even across interruptions.

A run has a folder named by the hash of its settings. It is continued there by `--resume auto`, and a file written last
marks it as finished, so a killed study continues where it was.
"""

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from litgpt_moe_ext.cli.output import write_json
from litgpt_moe_ext.errors import SettingsError, refuse_first
from litgpt_moe_ext.files.lock import ProcessLock
from litgpt_moe_ext.study.place import Places, TrainedOn
from litgpt_moe_ext.study.plan import Run
from litgpt_moe_ext.training.control import StopRequests
from litgpt_moe_ext.training.parallel.processes import die_with_parent
from litgpt_moe_ext.wording import counted

if TYPE_CHECKING:
    from litgpt_moe_ext.training.phases.plan import Plan

FINISHED = "finished.json"
_OUTPUT = "output.txt"
_LOCK = ".study.lock"  # the run itself has another
_LOOK_EVERY = 0.5  # seconds
_LAST_BYTES = 4000  # bytes at the end of a run's output that contain its last line
# As a module, so that a run can start further processes as it was started.
_TRAIN = ("-m", "litgpt_moe_ext.cli.main", "train")


def is_finished(runs_dir: Path, run: Run) -> bool:
    """Return whether a run was trained to its end."""
    return (runs_dir / run.key / FINISHED).is_file()


def unfinished(runs: Iterable[Run], runs_dir: Path) -> list[str]:
    """Return a line for each of some runs that are not finished, with the last line that it wrote."""
    outputs = {run.title: runs_dir / run.key / _OUTPUT for run in runs}
    return [
        f"{title}: not finished, {_last_words(output, 0)}" if output.is_file() else f"{title}: not begun"
        for title, output in outputs.items()
    ]


def check(runs: Iterable[Run]) -> None:
    """Raise SettingsError, with the run's name, if the settings of an arm or of a place in the grid are wrong.

    They are also wrong if the run would leave nothing to compare: no line in its log, or no validation loss.
    """
    from litgpt_moe_ext.cli.settings import settings_of
    from litgpt_moe_ext.training.phases.plan import check_plan

    seen: set[str] = set()
    for run in runs:
        # Not every combination: with hundreds of points that would take minutes.
        new = {run.arm, str(run.point)} - seen
        if new:
            try:
                with settings_of(run.flags(Path("out")), run.recipe) as settings:
                    refuse_first(_nothing_to_compare(check_plan(settings)))
            except SettingsError as error:
                raise SettingsError(f"{run.label}: {error}") from error
            seen |= new


def _nothing_to_compare(plan: "Plan") -> Iterator[str]:
    train, judge = plan.settings.train, plan.settings.eval
    if train.epochs is not None:
        return  # the number of steps depends on the data
    if plan.total_steps < train.log_interval:
        yield (
            f"train.log_interval: {train.log_interval} must be at most the {counted(plan.total_steps, 'step')} of the "
            "run, or it logs nothing; set it lower, or train.max_tokens to at least "
            f"{train.log_interval * plan.tokens_per_step}"
        )
    if not judge.final_validation and plan.total_steps < judge.interval:
        yield (
            "eval.final_validation: false must be true in a study, which compares validation losses; or set "
            f"eval.interval to at most the {counted(plan.total_steps, 'step')} of the run"
        )


class Outcome(NamedTuple):
    """How the training of runs ended.

    Attributes:
        problems: What went wrong, a line each.
        signal: The signal that stopped it, or 0.
    """

    problems: list[str]
    signal: int


def train(
    runs: Iterable[Run],
    runs_dir: Path,
    places: Places,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Train the runs that are not finished.

    After SIGINT, SIGTERM or SIGUSR1 no further run begins, and running ones save and end.

    Args:
        runs: The runs.
        runs_dir: Folder of the runs' folders.
        places: Where they are trained, and how many at a time.
        seconds: Time after which they are stopped; the next call continues them. None for no limit.
        say: Called with a line whenever a run ends.
    """
    waiting = [run for run in runs if not is_finished(runs_dir, run)]
    end = None if seconds is None else time.monotonic() + seconds
    places = replace(places, jobs=max(1, min(places.jobs, len(waiting))))
    requests = StopRequests(say)

    def stopped() -> str:
        if requests.received:
            return signal.Signals(requests.received).name
        return "out of time" if end is not None and time.monotonic() >= end else ""

    trainer = _Trainer(runs_dir, places, stopped, say)
    if waiting:
        say(f"Training {counted(len(waiting), 'run')}, {places.jobs} at a time, in {runs_dir}")
    with requests.listening(), ThreadPoolExecutor(places.jobs) as pool:
        ends = list(pool.map(trainer.train, waiting))
    problems = [problem for problem in ends if problem]
    if late := ends.count(None):
        problems.append(f"Not begun, {stopped()}: {counted(late, 'run')}; the same command goes on")
    return Outcome(problems, requests.received)


class _Trainer:
    """Trains runs, as many at a time as there are places.

    Args:
        runs_dir: Folder of the runs' folders.
        places: Where they are trained.
        stopped: Returns why runs must end and none may begin; empty to continue.
        say: Called with a line whenever a run is finished.
    """

    def __init__(self, runs_dir: Path, places: Places, stopped: Callable[[], str], say: Callable[[str], None]) -> None:
        self._runs_dir, self._places, self._stopped, self._say = runs_dir, places, stopped, say
        self._free: queue.Queue[int] = queue.Queue()
        for place in range(places.jobs):
            self._free.put(place)

    def train(self, run: Run) -> str | None:
        """Train a run and return what went wrong, empty if nothing; None if it was not begun."""
        if self._stopped():
            return None
        out_dir = self._runs_dir / run.key
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = ProcessLock(out_dir / _LOCK)
        place = self._free.get()
        try:
            if (owner := lock.take()) is not None:
                return f"{run.title}: is trained by another study, {owner}"
            if is_finished(self._runs_dir, run):  # by another study, meanwhile
                return ""
            return self._train_in(place, run, out_dir)
        finally:
            lock.release()
            self._free.put(place)

    def _train_in(self, place: int, run: Run, out_dir: Path) -> str:
        output = out_dir / _OUTPUT
        earlier = output.stat().st_size if output.exists() else 0
        trained_on = TrainedOn.here(self._places, place)  # now, as the code may change during the run
        command = [sys.executable, *_TRAIN, *run.flags(out_dir)]
        status = _process(command, output, self._places.environment(place), self._stopped)
        if status == 0:
            what = {"arm": run.arm, "point": run.point, "seed": run.seed, "settings": run.settings}
            write_json(out_dir / FINISHED, what | {"trained_on": asdict(trained_on)})
            self._say(f"{run.title}: finished, {out_dir}")
            return ""
        if why := self._stopped():
            return f"{run.title}: stopped, {why}; the same command goes on"
        ended = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
        return f"{run.title}: {ended}, {_last_words(output, earlier)}; see {output}"


def _last_words(output: Path, earlier: int) -> str:
    with output.open("rb") as file:
        file.seek(max(earlier, output.stat().st_size - _LAST_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    if not said:
        space = shutil.disk_usage(output.parent).free
        return f"having said nothing, with {space / 1e6:.3g} MB of disk left"
    return f"saying {said[-1]!r}"


def _process(command: Sequence[str], log: Path, environment: dict[str, str], stopped: Callable[[], str]) -> int:
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            # A killed study must not leave runs behind that the next study would find in their folders. The signal
            # comes when the starting thread ends, but the pool's threads outlive their runs.
            preexec_fn=partial(die_with_parent, os.getpid()) if sys.platform == "linux" else None,
        )
        while not stopped():
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_LOOK_EVERY)
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
    # The signal reaches only processes that srun starts.
    return "\n".join((*lines, "#SBATCH --signal=SIGUSR1@300", f'srun {command} --only "$SLURM_ARRAY_TASK_ID"', ""))
