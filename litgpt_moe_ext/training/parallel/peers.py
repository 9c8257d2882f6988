"""What a process says when another process of its run is gone, instead of the backend's words for a broken connection.

Under NCCL, or between two collective operations, nothing reaches a process whose peer has ended, until torch aborts it.
Whoever has started the others, as Fabric's first process has, therefore looks at them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from litgpt_moe_ext.errors import CANNOT, one_line
from litgpt_moe_ext.training.checkpoint.progress import newest_first
from litgpt_moe_ext.training.control import TrainingStopped
from litgpt_moe_ext.training.parallel.processes import started_by_fabric
from litgpt_moe_ext.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from litgpt_moe_ext.training.phases.launch import Launched

_PATIENCE = 2.0  # seconds from a broken connection to the end of the process behind it
_ENDED = "has ended, see its output"
_LOOK_EVERY = 0.2  # seconds
_HEARS_ITSELF = 0.3  # seconds in which a broken connection reaches a process that waits for another
# Of gloo, of NCCL, and of the store where the processes meet, unless torch has a type for it. Their other errors, as of
# two messages that differ in length, are faults of the program.
_BROKEN = re.compile(
    "gloo.*(connection (reset|closed|refused)|broken pipe|socket closed)|ncclRemoteError|"
    "connection was likely closed|failed on SocketImpl.*(connection reset|broken pipe)",
    re.IGNORECASE | re.DOTALL,
)
_SILENT = re.compile("gloo.*timed out", re.IGNORECASE | re.DOTALL)


class Peer(NamedTuple):
    """Another process of the run.

    Attributes:
        rank: Its rank.
        machine: Where its id has a meaning.
        pid: Its id.
    """

    rank: int
    machine: str
    pid: int


class End(NamedTuple):
    """How a process has ended.

    Attributes:
        words: What to say about it.
        failed: Whether it is known to have failed.
    """

    words: str
    failed: bool


@contextlib.contextmanager
def explaining_lost_peers(launched: Launched) -> Iterator[None]:
    """In the scope, stop with one line that says which process is gone and how to continue.

    Raises:
        TrainingStopped: If the connection to another process is lost, or it does not answer in time.
    """
    fabric = launched.fabric
    if fabric.world_size == 1:
        yield
        return
    own = Peer(fabric.global_rank, _machine(), os.getpid())
    here: list[Peer] = []
    over = threading.Event()
    try:
        everyone: list[Peer] = [own] * fabric.world_size
        torch.distributed.all_gather_object(everyone, own)
        here = [peer for peer in everyone if peer.machine == own.machine and peer != own]
        if children := [peer for peer in here if _is_child(peer.pid)]:
            threading.Thread(target=_watch, args=(launched, children, over), daemon=True, name="peer-watch").start()
        yield
    except RuntimeError as error:
        over.set()
        text = str(error)
        if isinstance(error, torch.distributed.DistNetworkError) or _BROKEN.search(text):
            problem = _who(here) or f"the connection to another process is lost ({_reason(text)}); see its output"
        elif isinstance(error, torch.distributed.DistStoreError) or _SILENT.search(text):
            minutes = launched.plan.settings.distributed.timeout_minutes
            problem = (
                _who(here, patience=0)
                or f"another process has not answered for {minutes:g} minutes (distributed.timeout_minutes)"
            )
        else:
            raise
        stopped = TrainingStopped(f"{problem}{_remedy(launched)}")
        if own.rank != 0 and not started_by_fabric():  # the first rank's error is printed by the command
            print(f"Stopped on rank {own.rank}: {stopped}", file=sys.stderr, flush=True)
        raise stopped from error
    finally:
        over.set()


def _machine() -> str:
    """Return a name of the space of process ids here; containers of one host may share its name."""
    with contextlib.suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _is_child(pid: int) -> bool:
    if not hasattr(os, "waitid"):
        return False
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def end_of(pid: int) -> End | None:
    """Return how a process of this machine has ended, or None if it has not, or nobody knows.

    A child remains to be waited for.
    """
    if os.name != "posix":
        return None
    if _is_child(pid):
        if (ended := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is None:
            return None
        if ended.si_code == os.CLD_EXITED:
            status = ended.si_status
            # Above 128 it was interrupted, as this process is, which may have more to do: it alone has loggers.
            return End(f"has ended with status {status}, see its output", 0 < status <= 128)
        killed = signal.Signals(ended.si_status)
        memory = ", as by the system when memory runs out" if killed == signal.SIGKILL else ""
        return End(f"was ended by {killed.name}{memory}", True)
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return End(_ENDED, False)
    except OSError:  # of another user, or not Linux
        return None
    return End(_ENDED, False) if state in "ZX" else None  # nobody has waited for it yet


def _who(here: Sequence[Peer], patience: float = _PATIENCE) -> str:
    """Return which processes of this machine have ended, as soon as one has; empty if none does in time."""
    until = time.monotonic() + patience
    while True:
        ends = [(peer, end) for peer in here if (end := end_of(peer.pid)) is not None]
        if ends or not here or time.monotonic() >= until:
            return _words(ends)
        time.sleep(_LOOK_EVERY)


def _words(ends: Sequence[tuple[Peer, End]]) -> str:
    # Those that are known to have failed come first: others may have ended because of them.
    failed = [(peer, end) for peer, end in ends if end.failed] or ends
    words = [f"rank {peer.rank} (process {peer.pid}) {end.words}" for peer, end in failed[:3]]
    if more := len(failed) - len(words):
        words.append(f"{counted(more, 'other')} as well")
    return "; ".join(words)


def _reason(text: str) -> str:
    return one_line(text).partition(". This is typically")[0][-120:]


def _remedy(launched: Launched) -> str:
    found = newest_first(launched.plan.out_dir)
    if not found:
        return ". There is no checkpoint to continue from yet."
    return f". The newest checkpoint is {found[0]}; --resume auto continues."


def _watch(launched: Launched, children: Sequence[Peer], over: threading.Event) -> None:
    """End this process when one of its children has failed, unless it hears of that by itself."""
    while not over.wait(_LOOK_EVERY):
        ends = [(peer, end) for peer in children if (end := end_of(peer.pid)) is not None and end.failed]
        if ends and not over.wait(_HEARS_ITSELF):
            stopped = TrainingStopped(f"{_words(ends)}{_remedy(launched)}")
            launched.reporter.close(launched.fabric.step, stopped)
            print(f"Stopped: {stopped}", file=sys.stderr, flush=True)
            # The main thread may hang in a collective operation, where no exception reaches it.
            os._exit(CANNOT)
