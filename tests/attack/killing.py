"""Whole runs that are killed again and again, and in the end must be the undisturbed one, bit for bit.

`python -m tests.attack.killing --kills 700` attacks for longer than a test may take, and prints a table.
"""

import argparse
import collections
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from litgpt_moe_ext.training.checkpoint.progress import newest_first, read_progress
from litgpt_moe_ext.training.checkpoint.resume import problem_with
from tests.attack.faults import FAULTS
from tests.attack.runs import Blow, Ended, Server, random_blow
from tests.runs import corpus_in, logged, recipe_writer

COLUMNS = ("loss", "val_loss", "grad_norm", "learning_rate")
STATE = ("model", "optimizer", "train_dataloader", "iter_num", "step_count", "rng")
CHANGES = {
    "model_config": {"n_layer": 1, "router_jitter_noise": 0.05},
    "train": {"max_tokens": 8 * 128, "save_interval": 2, "micro_batch_size": 2},
    "eval": {"interval": 3, "max_iters": 1},
    "ema": {"decay": 0.9},
    "checkpoint": {"keep_last": 2},
}
"""Of the small recipe: one layer, noise, an average, checkpoints at even steps and of the best, the last two kept."""


@dataclass
class Tally:
    """What an attack has found.

    Attributes:
        finished: Runs that were left to end, each after some kills.
        kills: How often runs were ended, by the way and the place.
    """

    finished: int = 0
    kills: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def total(self) -> int:
        """All kills."""
        return self.kills.total()

    def count(self, blow: Blow, ended: Ended) -> None:
        """Count a run that was ended."""
        self.kills[f"{blow.kind} at {'any moment' if blow.at_event is None else ended.last_event}"] += 1


class Attack:
    """One recipe, the undisturbed run, and runs of it that are killed.

    Args:
        recipe: Writes a recipe, as the fixture of the training tests.
        folder: For everything.
        processes: Number of ranks.
        seed: Of the blows.
        fault: What is done to the code before a run, to see whether the attack finds it.
    """

    def __init__(
        self, recipe: Any, folder: Path, processes: int, seed: int, fault: Callable[[], None] | None = None
    ) -> None:
        changes = {**CHANGES, "train": {**CHANGES["train"], "micro_batch_size": 2 // processes}}
        self._out_dir, self._reference = folder / "out", folder / "reference"
        self._server = Server(recipe("attacked", **changes), self._out_dir, processes, fault)
        self._processes, self._chance = processes, random.Random(seed)
        self.tally = Tally()

    def __enter__(self) -> "Attack":
        # The first run prepares the data as well; the second takes the time that all others take.
        for _ in range(2):
            shutil.rmtree(self._out_dir, ignore_errors=True)
            self._whole = self._server.run()
        self._out_dir.rename(self._reference)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def go_on(self, kills: int, longest_chain: int = 12) -> None:
        """Kill a run several times, let it end, and hold it against the undisturbed one; then the next.

        Args:
            kills: How often in all.
            longest_chain: Kills of one run until it is left to end.
        """
        until = self.tally.total + kills
        while self.tally.total < until:
            self._kill(min(self._chance.randint(1, longest_chain), until - self.tally.total))
            self.tally.finished += 1
            shutil.rmtree(self._out_dir)

    def _kill(self, times: int) -> None:
        newest, blows = (0, 0), []
        for _ in range(times):
            blow = random_blow(self._chance, self._whole, self._processes)
            ended = self._server.run(blow)
            if ended.finished:
                break
            blows.append(blow)
            self.tally.count(blow, ended)
            newest = check_after_a_kill(self._out_dir, newest)
        else:
            assert self._server.run().finished, blows
        check_the_end(self._out_dir, self._reference, blows)


def check_after_a_kill(out_dir: Path, before: tuple[int, int]) -> tuple[int, int]:
    """Check that what has a checkpoint's name is whole, and that the newest is no older than before.

    Args:
        out_dir: The run's directory.
        before: Attempt and step of the newest checkpoint when the killed run began.

    Returns:
        The same now.
    """
    for directory in newest_first(out_dir):
        assert problem_with(directory) is None, directory
    # Killed between the two renames of a replacement, a checkpoint has another name until the next run begins.
    hidden = [path for path in out_dir.glob(".*.replaced") if path.is_dir()]
    found = [read_progress(path) for path in (*newest_first(out_dir), *hidden)]
    newest = max(((state.attempt, state.step) for state in found if state is not None), default=(0, 0))
    assert newest >= before, f"{newest} after {before}: a checkpoint was lost"
    return newest


def check_the_end(out_dir: Path, reference: Path, blows: list[Blow]) -> None:
    """Check that a finished run is the undisturbed one, bit for bit, and has its best.

    Args:
        out_dir: The run's directory.
        reference: Of the undisturbed run.
        blows: What it has survived.
    """
    for column in COLUMNS:
        ours, theirs = logged(out_dir, column), logged(reference, column)
        assert {step: theirs.get(step) for step in ours} == ours, column
        # The line of a step that was saved, but killed before it was logged, is missing.
        missing = sorted(set(theirs) - set(ours))
        assert len(missing) <= len(blows) or any(blow.kind == "power cut" for blow in blows), (column, missing, blows)
    for name in ("final", "final/ema", "best", "best/ema"):
        ours, theirs = (
            torch.load(folder / name / "lit_model.pth", weights_only=True) for folder in (out_dir, reference)
        )
        different = [key for key in STATE if key in theirs and not same(ours[key], theirs[key])]
        assert not different, (name, different)
    for directory in newest_first(out_dir):
        assert problem_with(directory) is None, directory
    best = json.loads((out_dir / "best" / "training_state.json").read_text())["step"]
    losses = {step: float(loss) for step, loss in logged(reference, "val_loss").items()}
    assert losses[best] == min(losses.values())
    assert len(list(out_dir.glob("step-*"))) <= 2
    left = [path.name for path in out_dir.iterdir() if path.name.startswith(".")]
    assert left == [], left


def same(ours: Any, theirs: Any) -> bool:
    """Return whether two parts of checkpoints are equal, bit for bit."""
    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS, help="something to break in the code, which must be found")
    given = parser.parse_args()
    folder, begun = Path(tempfile.mkdtemp(prefix="attack-")), time.monotonic()
    print(f"What fails stays in {folder}", flush=True)
    recipe = recipe_writer(folder, corpus_in(folder))
    with Attack(recipe, folder, given.processes, given.seed, FAULTS.get(given.fault)) as attack:
        tally = attack.tally
        try:
            while (left := given.kills - tally.total) > 0:
                attack.go_on(min(20, left))
                print(f"{tally.total} kills, {tally.finished} runs, {time.monotonic() - begun:.0f} s", flush=True)
        finally:
            for what, count in sorted(tally.kills.items()):
                print(f"| {what} | {count} |")
    shutil.rmtree(folder)


if __name__ == "__main__":
    _main()
