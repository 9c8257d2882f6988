"""Who starts the processes of a run: the run itself, torchrun, SLURM, or variables set by hand."""

from collections.abc import Mapping
from typing import NamedTuple

from lightning.fabric.plugins.environments import TorchElasticEnvironment

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.wording import counted


class Processes(NamedTuple):
    """Who started the processes of a run, and how many there are."""

    started_by: str
    per_node: int
    nodes: int


def started_processes(environment: Mapping[str, str]) -> Processes | None:
    """Return the processes that a launcher has started already, or None if the run starts its own.

    Args:
        environment: As `os.environ`. Known are torchrun's variables (also set by hand) and SLURM's.

    Raises:
        SettingsError: If the variables contradict each other or are incomplete.
    """
    shell = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")  # as Lightning sees it
    if "SLURM_NTASKS" in environment and "RANK" not in environment and not shell:
        tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", 1))
        return _even("SLURM", tasks, int(environment.get("SLURM_NTASKS_PER_NODE", tasks // nodes)))
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environment]
    # Fabric gives LOCAL_RANK and WORLD_SIZE, but no RANK, to the processes that it starts.
    if "RANK" not in given and ("LOCAL_RANK" in given or environment.get("WORLD_SIZE", "1") == "1"):
        return None
    missing = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(environment)
    if missing:
        raise SettingsError(
            f"environment: {', '.join(given)} set but not {', '.join(sorted(missing))}; set all of RANK, LOCAL_RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or none"
        )
    world = int(environment["WORLD_SIZE"])
    port = environment["MASTER_PORT"]
    if world > 1 and not (port.isdecimal() and 1 <= int(port) <= 65535):
        # torch would have the first process listen anywhere, and the others look for it at this number.
        raise SettingsError(
            f"environment: MASTER_PORT: {port!r} is not a port at which {world} processes can meet; give torchrun "
            "--standalone (one node) instead of --master_port, or set a free port from 1 to 65535"
        )
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "RANK and WORLD_SIZE"
    return _even(launcher, world, int(environment.get("LOCAL_WORLD_SIZE", world)))


def _even(launcher: str, world: int, per_node: int) -> Processes:
    if per_node < 1 or world % per_node:
        raise SettingsError(
            f"environment: {launcher} says {counted(world, 'process')}, {per_node} on each node; that is uneven"
        )
    return Processes(launcher, per_node, world // per_node)


def cluster_plugin(processes: Processes | None) -> TorchElasticEnvironment | None:
    """Return Fabric's plugin for variables set by hand, which Fabric does not recognise by itself."""
    if processes is not None and processes.started_by == "RANK and WORLD_SIZE":
        return TorchElasticEnvironment()
    return None
