"""Runs that are killed at the n-th time they touch a file of their directory.

Python reports every opening, renaming, linking and deleting of a file before it happens (audit events), so a run can be
killed between any two of them: in saving, linking, retention and recovery. Between them lie the training steps. Runs
are forks of a server that has everything imported, so that a killed run costs a second.

`python -m tests.attack.killing --kills 1000 --processes 1` attacks for longer than a test may take, and prints a table.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litgpt_moe_ext.training.checkpoint.progress import newest_first, read_progress
from litgpt_moe_ext.training.checkpoint.resume import problem_with
from tests.training.conftest import logged
from tests.training.processes import CONTEXT, free_port

COLUMNS = ("loss", "val_loss", "grad_norm", "learning_rate")
_PATIENCE = 600  # seconds for a run that takes two on an idle machine
EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"}
CHANGES = {
    "train": {"max_tokens": 10 * 128, "save_interval": 2, "micro_batch_size": 2},
    "eval": {"interval": 3, "max_iters": 2},
    "ema": {"decay": 0.9},
    "checkpoint": {"keep_last": 2},
}
"""Of the small recipe: checkpoints at even steps and where the best changes, deleted beyond two, with an average."""


@dataclass
class Tally:
    """What an attack has found.

    Attributes:
        kills: Runs that were killed.
        finished: Runs that were left to end, each after some kills.
        places: How often each kind of event was where a run was killed.
    """

    kills: int
    finished: int
    places: dict[str, int]


def run(file: Path, out_dir: Path, processes: int = 1, kill_at: int | None = None) -> tuple[int, int, str]:
    """Train, continuing what is in `out_dir`.

    Args:
        file: The recipe.
        out_dir: Its directory.
        processes: Number of ranks.
        kill_at: Kill the first rank when it touches a file of `out_dir` for this time.

    Returns:
        Exit status of the first rank, how many times it touched a file, and the last of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            CONTEXT.Process(target=_train, args=(str(file), str(out_dir), rank, processes, port, kill_at, folder))
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        ranks[0].join(_PATIENCE)
        stuck = ranks[0].is_alive()
        for rank in ranks:
            if rank.is_alive() and (rank is ranks[0] or ranks[0].exitcode != 0):
                rank.kill()  # what a launcher does when the first is gone
            rank.join(60)
        events = (Path(folder) / "events").read_text().splitlines()
        status = ranks[0].exitcode
        assert not stuck, f"still running after {_PATIENCE} s: {(Path(folder) / 'output-0').read_text()[-3000:]}"
        assert status in (0, -signal.SIGKILL), (Path(folder) / "output-0").read_text()[-3000:]
        return status, len(events), events[-1] if events else ""


def changes(event: str, arguments: tuple[Any, ...], out_dir: str) -> bool:
    """Return whether an audit event is about to change something below a directory."""
    if event not in EVENTS:
        return False
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return True  # relative to an open directory, as `shutil.rmtree` deletes
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return False
    return str(arguments[0]).startswith(out_dir)


def _train(file: str, out_dir: str, rank: int, processes: int, port: int, kill_at: int | None, folder: str) -> None:
    output = os.open(f"{folder}/output-{rank}", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    torch.set_num_threads(1)
    if processes > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
    if rank == 0:
        _watch(out_dir, f"{folder}/events", kill_at)
    from litgpt_moe_ext.cli.train import main

    sys.exit(main(["--config", file, "--out_dir", out_dir, "--resume", "auto", "--devices", str(processes)]))


def _watch(out_dir: str, log: str, kill_at: int | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    count = 0

    def touched(event: str) -> None:
        nonlocal count
        count += 1
        os.write(descriptor, f"{event}\n".encode())
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if changes(event, arguments, out_dir):
            touched(event)

    save = torch.save

    def save_in_two_halves(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(content, path, *args, **kwargs)
        if str(path).startswith(out_dir):
            whole = Path(path).read_bytes()
            os.truncate(path, len(whole) // 2)
            touched("torch.save")
            Path(path).write_bytes(whole)

    torch.save = save_in_two_halves
    sys.addaudithook(hook)


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


def check_the_end(out_dir: Path, reference: Path) -> None:
    """Check that a finished run is the uninterrupted one, bit for bit, and has its best."""
    for column in COLUMNS:
        ours, theirs = logged(out_dir, column), logged(reference, column)
        assert {step: theirs.get(step) for step in ours} == ours, column
        # The line of a step that was saved, but killed before it was logged, is missing.
        assert set(theirs) >= set(ours)
    for name in ("final", "final/ema", "best"):
        ours, theirs = (
            torch.load(folder / name / "lit_model.pth", weights_only=True)["model"] for folder in (out_dir, reference)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    for directory in newest_first(out_dir):
        assert problem_with(directory) is None, directory
    best = json.loads((out_dir / "best" / "training_state.json").read_text())["step"]
    losses = {step: float(loss) for step, loss in logged(reference, "val_loss").items()}
    assert losses[best] == min(losses.values())
    assert len(list(out_dir.glob("step-*"))) <= 2
    left = [path.name for path in out_dir.iterdir() if path.name.startswith(".")]
    assert left == [], left


def attack(recipe: Any, folder: Path, kills: int, processes: int, seed: int, longest_chain: int = 12) -> Tally:
    """Kill runs again and again; let one of several end, and hold it against the uninterrupted one.

    Args:
        recipe: Writes a recipe, as the fixture of the training tests.
        folder: For everything.
        kills: How often.
        processes: Number of ranks.
        seed: Of the random places.
        longest_chain: Kills of one run until it is left to end.
    """
    generator = random.Random(seed)
    changes = {**CHANGES, "train": {**CHANGES["train"], "micro_batch_size": 2 // processes}}
    file, reference = recipe("attacked", **changes), folder / "reference"
    status, events, _ = run(file, reference, processes)
    assert status == 0
    tally = Tally(0, 0, {})
    while tally.kills < kills:
        out_dir = folder / f"run-{tally.finished}"
        newest = (0, 0)
        for _ in range(min(generator.randint(1, longest_chain), kills - tally.kills)):
            status, _, place = run(file, out_dir, processes, generator.randint(1, events))
            if status == 0:
                break
            tally.kills += 1
            tally.places[place] = tally.places.get(place, 0) + 1
            newest = check_after_a_kill(out_dir, newest)
        assert run(file, out_dir, processes)[0] == 0
        check_the_end(out_dir, reference)
        tally.finished += 1
    return tally


def _main() -> None:
    import shutil
    import sysconfig

    from tests.training.conftest import FILES, recipe_writer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "source").mkdir()
        for module in FILES:
            shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{module}.py", folder / "source")
        corpus = {"data_path": str(folder / "prepared"), "source_path": str(folder / "source"), "vocab_size": 300}
        recipe = recipe_writer(folder, {**corpus, "val_fraction": 0.2})
        begun, done, seed = time.monotonic(), 0, given.seed
        while done < given.kills:
            (folder / f"attack-{seed}").mkdir()
            batch = min(10, given.kills - done)
            tally = attack(recipe, folder / f"attack-{seed}", batch, given.processes, seed)
            shutil.rmtree(folder / f"attack-{seed}")
            done, seed = done + tally.kills, seed + 1
            print(done, "kills", tally, round(time.monotonic() - begun), "s", flush=True)


if __name__ == "__main__":
    multiprocessing.freeze_support()
    _main()
