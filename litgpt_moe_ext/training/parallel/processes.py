"""The processes of a run: who starts them, and how those that the run starts itself end together.

Processes are started by the run itself (through Fabric), by torchrun, by SLURM, or by hand. Fabric's first process
starts the others of its node, and is killed within seconds if one of them fails. But if the first process is killed,
the others wait until `distributed.timeout_minutes` are over, and one that is still importing starts to wait only then.
So here each of them watches its parent. torchrun ends its processes too, unless it is killed itself: they watch it as
well. (SLURM ends whatever a job has left.)
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from litgpt_moe_ext.errors import SettingsError

_LAUNCHER_PID = "LITGPT_MOE_EXT_LAUNCHER_PID"
_LOOK_EVERY = 1.0  # seconds
_TORCHRUN = "torchrun"
_BY_HAND = "the environment (RANK, WORLD_SIZE)"


class Processes(NamedTuple):
    """Who started the processes of a run, and how many there are."""

    started_by: str
    per_node: int
    nodes: int


def started_processes(environment: Mapping[str, str], num_nodes: int = 1) -> Processes | None:
    """Return the processes that a launcher has started already, or None if the run starts its own.

    Args:
        environment: Environment variables; those of torchrun (or set by hand) and of SLURM are recognised.
        num_nodes: The run's number of nodes, for variables set by hand without LOCAL_WORLD_SIZE.

    Raises:
        SettingsError: If the variables contradict each other, are incomplete, or are no numbers.
    """
    shell = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")  # as Lightning sees it
    if "SLURM_NTASKS" in environment and "RANK" not in environment and not shell:
        return _started_by_slurm(environment)
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environment]
    # Fabric sets LOCAL_RANK and WORLD_SIZE, but not RANK, for the processes that it starts.
    if "RANK" not in given and ("LOCAL_RANK" in given or environment.get("WORLD_SIZE", "1") == "1"):
        return None
    _require(environment, given, ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    world = _number(environment, "WORLD_SIZE")
    port = environment["MASTER_PORT"]
    if world > 1 and not (port.isdecimal() and 1 <= int(port) <= 65535):
        # torch's first process would listen on any free port, while the others try this one.
        raise SettingsError(
            f"environment: MASTER_PORT: {port!r} is not a port at which {world} processes can meet; give torchrun "
            "--standalone (one node) instead of --master_port, or set a free port from 1 to 65535"
        )
    if "LOCAL_WORLD_SIZE" in environment:
        per_node = _number(environment, "LOCAL_WORLD_SIZE")
        num_nodes = _quotient("WORLD_SIZE", world, "LOCAL_WORLD_SIZE", per_node)
    else:
        per_node = _quotient("WORLD_SIZE", world, "num_nodes", num_nodes)
    _check_rank(environment, "RANK", world)
    _check_rank(environment, "LOCAL_RANK", per_node)
    return Processes(_TORCHRUN if "TORCHELASTIC_RUN_ID" in environment else _BY_HAND, per_node, num_nodes)


def _started_by_slurm(environment: Mapping[str, str]) -> Processes:
    tasks = _number(environment, "SLURM_NTASKS")
    needed = {"SLURM_PROCID", "SLURM_LOCALID"}
    if tasks > 1:  # a batch script has the other variables of the first task, and would wait for the others
        needed.add("SLURM_STEP_ID")
    if missing := sorted(needed - set(environment)):
        raise SettingsError(
            f"environment: SLURM_NTASKS: {tasks} without {', '.join(missing)}: srun has not started this process; "
            "write srun in front of the command, or `env -u SLURM_NTASKS` to train without SLURM's tasks"
        )
    # A step may have fewer nodes than its job.
    name = "SLURM_STEP_NUM_NODES" if "SLURM_STEP_NUM_NODES" in environment else "SLURM_NNODES"
    nodes = _number(environment, name) if name in environment else 1
    per_node = _quotient("SLURM_NTASKS", tasks, name, nodes)
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in environment:  # Lightning insists on it
        raise SettingsError(
            f"environment: SLURM_NTASKS: {tasks} without SLURM_NTASKS_PER_NODE; give sbatch and srun "
            f"--ntasks-per-node={per_node} instead of --ntasks"
        )
    _check_rank(environment, "SLURM_PROCID", tasks)
    _check_rank(environment, "SLURM_LOCALID", per_node)
    return Processes("SLURM", per_node, nodes)


def _require(environment: Mapping[str, str], given: list[str], needed: tuple[str, ...]) -> None:
    if missing := sorted(set(needed) - set(environment)):
        *first, last = dict.fromkeys((*given, *needed))
        raise SettingsError(
            f"environment: {', '.join(given)} set but not {', '.join(missing)}; set all of {', '.join(first)} and "
            f"{last}, or none"
        )


def _number(environment: Mapping[str, str], name: str, least: int = 1) -> int:
    value = environment[name]
    if not (value.isascii() and value.isdecimal() and int(value) >= least):
        raise SettingsError(f"environment: {name}: {value!r} must be a whole number from {least}")
    return int(value)


def _quotient(name: str, processes: int, by: str, divisor: int) -> int:
    quotient, rest = divmod(processes, divisor)
    if rest:
        raise SettingsError(
            f"environment: {name}: {processes} is not a multiple of {by}: {divisor}; every node needs the same number "
            "of processes"
        )
    return quotient


def _check_rank(environment: Mapping[str, str], name: str, ranks: int) -> None:
    # The other processes would wait for the right one until the timeout.
    if (rank := _number(environment, name, least=0)) >= ranks:
        raise SettingsError(f"environment: {name}: {rank} must be from 0 to {ranks - 1}")


def cluster_plugins(processes: Processes | None) -> list[Any]:
    """Return Fabric's plugin for variables set by hand, which Fabric does not detect."""
    if processes is None or processes.started_by != _BY_HAND:
        return []
    from lightning.fabric.plugins.environments import TorchElasticEnvironment

    return [TorchElasticEnvironment()]


def started_by_fabric() -> bool:
    """Return whether this process was started by the first process of its run."""
    # A launcher's processes have a RANK, but may have inherited the variables of an earlier run.
    by_fabric = _LAUNCHER_PID in os.environ and "RANK" not in os.environ
    return by_fabric and os.environ.get("LOCAL_RANK", "0") != "0"


def end_together(started: Processes | None) -> None:
    """Make child processes end soon after this one, or this one soon after its parent.

    Call it in every process before Fabric launches. It has no effect on Windows, where a process keeps its parent's id
    after the parent has ended.

    Args:
        started: The processes that a launcher has started already.
    """
    if started is None and not started_by_fabric():
        os.environ[_LAUNCHER_PID] = str(os.getpid())
    elif started is None or started.started_by == _TORCHRUN:
        parent = int(os.environ[_LAUNCHER_PID]) if started is None else os.getppid()
        die_with_parent(parent)
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="launcher-watch").start()


def die_with_parent(parent: int) -> None:
    """Have Linux end this process when the thread that started it ends; no effect elsewhere.

    A process that is stopped (SIGSTOP, a debugger) cannot watch its parent.

    Args:
        parent: The process that started this one; if it has ended already, this one ends now.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    print(f"error: the parent process {parent} is gone; this process ends too", file=sys.stderr, flush=True)
    # The main thread may hang in a collective operation, where no exception reaches it.
    os._exit(1)
