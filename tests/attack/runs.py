"""Runs that end before their time: at the n-th change of their directory, or at any moment of their CPU time.

Python reports every opening, renaming, linking and deleting of a file before it happens (audit events), so a run can be
killed between any two of them: in saving, linking, retention and recovery. Between them lie the training steps.

Importing what a run needs takes ten seconds, and reading its recipe half of one. So a server does both, in the very
`main` of `run_train.py`, and every rank of every run is a fork of it that goes on from there.
"""

import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.training.processes import CONTEXT, free_port

EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"}
_PATIENCE = 600  # seconds for a run that takes one on an idle machine
_GRACE = 0.3  # seconds at most between a signal that asks and one that kills
_LOOK = 0.01  # seconds of CPU time are counted by this

SIGNALS = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGTERM, then SIGKILL": (signal.SIGTERM, signal.SIGKILL),
    "power cut": (signal.SIGKILL,),
}
"""How runs end. After a power cut, files that were not flushed have lost their end, or everything."""


@dataclass(frozen=True)
class Blow:
    """What ends a run before its time.

    Attributes:
        kind: A key of `SIGNALS`.
        at_event: The change of a file by the first rank before which it comes, or None.
        after: CPU seconds of the struck rank after which it comes, where `at_event` is None.
        rank: Which is struck by what cannot be caught; what can goes to all of them, as from a terminal or a cluster.
        gap: Seconds between two signals.
    """

    kind: str
    at_event: int | None = None
    after: float = 0.0
    rank: int = 0
    gap: float = 0.0

    @property
    def kills(self) -> bool:
        """Whether the first signal cannot be caught."""
        return SIGNALS[self.kind][0] == signal.SIGKILL

    def may_end_with(self, status: int) -> bool:
        """Return whether a struck rank may end so: as the signals say, or because it was through already."""
        return status in (0, *(-number for number in SIGNALS[self.kind]), *(128 + n for n in SIGNALS[self.kind]))


@dataclass(frozen=True)
class Ended:
    """How a run has ended.

    Attributes:
        finished: Whether it was through.
        events: How often the first rank has changed a file.
        last_event: The last of them.
        seconds: CPU time of a rank.
    """

    finished: bool
    events: int
    last_event: str
    seconds: float


def random_blow(chance: random.Random, whole: Ended, processes: int) -> Blow:
    """Return a blow for a run that ends as `whole` if nothing happens.

    Early ones are likelier: a run that goes on from a checkpoint is shorter.
    """
    kind, rank = chance.choice(("SIGKILL",) * 4 + tuple(SIGNALS)[1:]), chance.randrange(processes)
    part = chance.uniform(0, chance.uniform(0.2, 1))
    if kind in ("SIGKILL", "power cut") and rank == 0 and chance.random() < 0.7:
        return Blow(kind, at_event=1 + int(part * whole.events))
    return Blow(kind, after=part * whole.seconds, rank=rank, gap=chance.uniform(0, _GRACE))


class Server:
    """Has everything imported and a recipe read, and forks for every run.

    Args:
        file: The recipe.
        out_dir: Directory of all runs.
        processes: Number of ranks.
        fault: Called in every rank before it begins.
    """

    def __init__(self, file: Path, out_dir: Path, processes: int, fault: Callable[[], None] | None = None) -> None:
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, file, out_dir, processes, fault))
        self._process.start()
        theirs.close()

    def run(self, blow: Blow | None = None) -> Ended:
        """Train, continuing what is in the directory.

        Args:
            blow: What ends the run before its time.
        """
        self._connection.send(blow)
        outcome = self._connection.recv()
        assert isinstance(outcome, Ended), outcome
        return outcome

    def close(self) -> None:
        """End it."""
        self._connection.close()
        self._process.join()


def _serve(connection: Any, file: Path, out_dir: Path, processes: int, fault: Callable[[], None] | None) -> None:
    from litgpt_moe_ext.cli import train

    go_on = train._train
    torch.set_num_threads(1)

    def serve(settings: Any) -> int:
        while True:
            try:
                blow = connection.recv()
            except EOFError:
                os._exit(0)
            folder = Path(tempfile.mkdtemp())
            ranks = _fork(processes, folder)
            if isinstance(ranks, int):
                connection.close()
                _begin(ranks, folder, out_dir, blow)
                if fault is not None:
                    fault()
                return go_on(settings)
            try:
                connection.send(_attend(ranks, folder, out_dir, blow))
            except Exception:
                connection.send(traceback.format_exc())
            shutil.rmtree(folder)

    train._train = serve
    try:
        status = train.main(
            ["--config", str(file), "--out_dir", str(out_dir), "--resume", "auto", "--devices", str(processes)]
        )
    except KeyboardInterrupt:
        status = 130  # as `run_train.py`
    except BaseException:
        traceback.print_exc()
        status = 1
    os._exit(status)


class _Rank:
    """A rank as its parent sees it.

    Attributes:
        pid: Of the process.
        status: Exit status, minus the number of the signal that ended it, or None.
    """

    def __init__(self, pid: int) -> None:
        self.pid, self.status = pid, None

    def is_alive(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def send(self, number: int) -> None:
        if self.is_alive():
            os.kill(self.pid, number)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fork(processes: int, folder: Path) -> list[_Rank] | int:
    """Return the ranks, or in each of them its number."""
    ranks, port = [], free_port()
    for rank in range(processes):
        if not (pid := os.fork()):
            output = os.open(folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(output, stream)
            if processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"})
            return rank
        ranks.append(_Rank(pid))
    return ranks


def _attend(ranks: list[_Rank], folder: Path, out_dir: Path, blow: Blow | None) -> Ended:
    """Strike, wait for the end, and look whether it is as it should be."""
    before = os.times()
    on_disk = {_mark(path.stat()) for path in out_dir.rglob("*") if path.is_file()}
    if blow is not None and blow.at_event is None:
        _strike(ranks, blow)
    _wait(ranks)
    said = [file.read_text(errors="replace")[-3000:] for file in sorted(folder.glob("output-*"))]
    statuses = [rank.status for rank in ranks]
    if blow is None:
        assert not any(statuses), (statuses, said)
    else:  # what a rank says that lost another does not matter
        assert any(blow.may_end_with(rank.status) for rank in _struck(ranks, blow)), (blow, statuses, said)
    finished = not any(statuses)
    if blow is not None and blow.kind == "power cut" and not finished:
        on_disk.update(line for log in folder.glob("flushed-*") for line in log.read_text().splitlines())
        _cut_power(out_dir, on_disk, random.Random(str(blow)))
    events = (folder / "events").read_text().splitlines() if (folder / "events").exists() else []
    last, after = events[-1] if events else "before the first file", os.times()
    seconds = (after.children_user - before.children_user + after.children_system - before.children_system) / len(ranks)
    return Ended(finished, len(events), last, seconds)


def _struck(ranks: list[_Rank], blow: Blow) -> list[_Rank]:
    return [ranks[blow.rank]] if blow.kills else ranks


def _strike(ranks: list[_Rank], blow: Blow) -> None:
    struck = _struck(ranks, blow)
    while all(rank.is_alive() for rank in ranks) and struck[0].cpu_seconds() < blow.after:
        time.sleep(_LOOK)
    first, *others = SIGNALS[blow.kind]
    for rank in struck:
        rank.send(first)
    for number in others:
        time.sleep(blow.gap)
        for rank in struck:
            rank.send(number)


def _wait(ranks: list[_Rank]) -> None:
    # As a launcher: when one has failed, the others have a while if they were asked to end, none if it crashed.
    began = time.monotonic()
    deadline = began + _PATIENCE
    while sum(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        if failed := [rank.status for rank in ranks if rank.status]:
            deadline = min(deadline, began + _PATIENCE / 2) if max(failed) >= 128 else 0.0
        time.sleep(_LOOK)
    for rank in ranks:
        rank.send(signal.SIGKILL)
        while rank.is_alive():
            time.sleep(_LOOK)


def _mark(status: os.stat_result) -> str:
    return f"{status.st_ino} {status.st_mtime_ns} {status.st_size}"


def _cut_power(out_dir: Path, on_disk: set[str], chance: random.Random) -> None:
    for path in sorted(out_dir.rglob("*")):
        if path.is_file() and _mark(path.stat()) not in on_disk:
            os.truncate(path, chance.choice((0, chance.randint(0, path.stat().st_size))))


def _begin(rank: int, folder: Path, out_dir: Path, blow: Blow | None) -> None:
    """Prepare a rank: what it does to files is written down, and may end it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    # What a process has written outlives its kill without a flush; only a power cut, which is played, needs to know.
    descriptor = os.open(folder / f"flushed-{rank}", os.O_WRONLY | os.O_CREAT)
    os.fsync = lambda file: os.write(descriptor, f"{_mark(os.fstat(file))}\n".encode())
    if rank == 0:
        die_at = None if blow is None else blow.at_event
        log, count = os.open(folder / "events", os.O_WRONLY | os.O_CREAT), itertools.count(1)

        def touched(event: str) -> None:
            os.write(log, f"{event}\n".encode())
            if next(count) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        watch(str(out_dir), touched)


def watch(out_dir: str, touched: Callable[[str], None]) -> None:
    """Call a function before every change of a file below a directory, and between the halves of what torch saves.

    Args:
        out_dir: The directory. There is no end to the watching.
        touched: Called with the kind of event.
    """

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _changes(event, arguments, out_dir):
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


def _changes(event: str, arguments: tuple[Any, ...], out_dir: str) -> bool:
    if event not in EVENTS:
        return False
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return True  # relative to an open directory, as `shutil.rmtree` deletes
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        return False
    return str(arguments[0]).startswith(out_dir)
