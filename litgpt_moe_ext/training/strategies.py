"""How several processes share the work: Fabric's strategies under the names that recipes use."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from litgpt.model import Block
from torch import nn

from litgpt_moe_ext.training.arguments import DistributedArgs

StrategyName = Literal["auto", "ddp", "fsdp", "fsdp_shard_grad_op", "fsdp2"]


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
        ValueError: If the variables contradict each other or are incomplete.
    """
    if "SLURM_NTASKS" in environment and "RANK" not in environment and environment.get("SLURM_JOB_NAME") != "bash":
        tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", 1))
        return _even("SLURM", tasks, int(environment.get("SLURM_NTASKS_PER_NODE", tasks // nodes)))
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in environment]
    if "RANK" not in given:
        return None
    missing = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(environment)
    if missing:
        raise ValueError(
            f"environment: {', '.join(given)} set but not {', '.join(sorted(missing))}; set all of RANK, LOCAL_RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or none"
        )
    world = int(environment["WORLD_SIZE"])
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "RANK and WORLD_SIZE"
    return _even(launcher, world, int(environment.get("LOCAL_WORLD_SIZE", world)))


def _even(launcher: str, world: int, per_node: int) -> Processes:
    if per_node < 1 or world % per_node:
        raise ValueError(f"environment: {launcher} says {world} processes, {per_node} on each node; that is uneven")
    return Processes(launcher, per_node, world // per_node)


def cluster_plugin(processes: Processes | None) -> TorchElasticEnvironment | None:
    """Return Fabric's plugin for variables set by hand, which Fabric does not recognise by itself."""
    if processes is not None and processes.started_by == "RANK and WORLD_SIZE":
        return TorchElasticEnvironment()
    return None


def make_strategy(name: StrategyName, processes: int, nodes: int, args: DistributedArgs, accelerator: str) -> Any:
    """Return what `lightning.Fabric` takes as its strategy.

    Args:
        name: As in recipes; `auto` is ddp where there are several processes.
        processes: Number of processes on all nodes.
        nodes: Number of nodes.
        args: The knobs.
        accelerator: `cpu` or `cuda`.

    Raises:
        ValueError: If the strategy does not work here or lacks a knob that is set.
    """
    if name not in get_args(StrategyName):
        raise ValueError(f"strategy: {name!r} is unknown; choose from {', '.join(get_args(StrategyName))}")
    _check(name, args, accelerator)
    timeout = timedelta(minutes=args.timeout_minutes)
    if processes == 1:
        return "auto"
    if name in ("auto", "ddp"):
        buckets = {} if args.bucket_mb is None else {"bucket_cap_mb": args.bucket_mb}
        return DDPStrategy(timeout=timeout, **buckets)
    if name == "fsdp2":
        return ModelParallelStrategy(
            parallelize_fn=lambda model, mesh: _shard(model, mesh, bool(args.cpu_offload)),
            data_parallel_size=processes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timeout,
        )
    sharding = "SHARD_GRAD_OP" if name == "fsdp_shard_grad_op" else "HYBRID_SHARD" if nodes > 1 else "FULL_SHARD"
    return FSDPStrategy(
        auto_wrap_policy={Block},
        state_dict_type="full",
        sharding_strategy=sharding,
        cpu_offload=bool(args.cpu_offload),
        timeout=timeout,
    )


def single_process_note(name: StrategyName, processes: int, args: DistributedArgs) -> str | None:
    """Return what to tell a user who asked for a sharded strategy with one process, or None."""
    if processes > 1 or name in ("auto", "ddp"):
        return None
    offload = ", and distributed.cpu_offload has no effect" if args.cpu_offload else ""
    return f"strategy: {name} has nothing to share out in a single process: it becomes auto{offload}"


def _check(name: str, args: DistributedArgs, accelerator: str) -> None:
    own, other = ("bucket_mb", "cpu_offload") if name in ("auto", "ddp") else ("cpu_offload", "bucket_mb")
    if getattr(args, other) is not None:
        raise ValueError(
            f"distributed.{other}: {getattr(args, other)} would be ignored because strategy: {name} has no such "
            f"setting; it has distributed.{own}"
        )
    if accelerator == "cpu" and name in ("fsdp", "fsdp_shard_grad_op"):
        raise ValueError(f"strategy: {name!r} needs CUDA devices, and there is none; ddp and fsdp2 also work on CPUs")


def _shard(model: nn.Module, mesh: Any, cpu_offload: bool) -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh["data_parallel"], offload_policy=offload)
    return fully_shard(model, mesh=mesh["data_parallel"], offload_policy=offload)


def is_sharded(strategy: Any) -> bool:
    """Whether no process holds all weights between two steps."""
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def accelerator_here() -> str:
    """Return the device type that training will use."""
    return "cuda" if torch.cuda.is_available() else "cpu"
