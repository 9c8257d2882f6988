"""The processes of a run that Fabric starts by itself end together.

The first process starts the others of its node. When one of those ends with an error, Fabric kills the first, within
seconds. Nothing does so the other way round: others would wait for a first process that was killed until
`distributed.timeout_minutes` are over, and one that is still importing would start waiting then. Here each of them
looks after its parent. (torchrun and SLURM look after the processes that they start.)
"""

import ctypes
import os
import signal
import sys
import threading
import time

_LAUNCHER_PID = "LITGPT_MOE_EXT_LAUNCHER_PID"
_LOOK_EVERY = 1.0  # seconds


def started_by_fabric() -> bool:
    """Whether this process was started by the first process of its run."""
    return _LAUNCHER_PID in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def end_together() -> None:
    """Have the processes that this one will start end soon after it, or this one after the process that started it.

    Call it in every process before Fabric launches. Without effect on Windows, which keeps the parent's number of a
    process although the parent is gone.
    """
    if started_by_fabric():
        parent = int(os.environ[_LAUNCHER_PID])
        die_with_parent()
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="launcher-watch").start()
    else:
        os.environ[_LAUNCHER_PID] = str(os.getpid())


def die_with_parent() -> None:
    """Have Linux end this process when the thread that started it ends; without effect elsewhere.

    A process that was stopped (SIGSTOP, a debugger) looks after nobody.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    print(f"error: the process {parent} that started this one is gone; it ends as well", file=sys.stderr, flush=True)
    # The main thread may hang in a collective operation, which no exception reaches.
    os._exit(1)
