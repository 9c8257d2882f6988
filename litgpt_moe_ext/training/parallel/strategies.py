"""How several processes share the work: Fabric's strategies under the names that recipes use."""

from collections.abc import Mapping
from dataclasses import fields
from datetime import timedelta
from typing import Any, NamedTuple, get_args

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from litgpt.model import Block
from torch import nn

from litgpt_moe_ext.training.parallel.deepspeed.settings import require_deepspeed, stage_of
from litgpt_moe_ext.training.parallel.deepspeed.strategy import ZeroStrategy
from litgpt_moe_ext.training.settings import DistributedArgs, StrategyName

CUDA_ONLY = ("fsdp", "fsdp_shard_grad_op", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")

_DDP_KNOBS = ("bucket_mb", "gradient_as_bucket_view", "find_unused_parameters")
_FSDP_KNOBS = ("cpu_offload", "forward_prefetch", "limit_all_gathers")
_ZERO_KNOBS = ("overlap_comm", "reduce_bucket_size", "offload_optimizer")
KNOBS: dict[str, tuple[str, ...]] = {
    "auto": _DDP_KNOBS,
    "ddp": _DDP_KNOBS,
    "fsdp": _FSDP_KNOBS,
    "fsdp_shard_grad_op": _FSDP_KNOBS,
    "fsdp2": ("cpu_offload",),
    "deepspeed_stage_1": (*_ZERO_KNOBS, "allgather_bucket_size"),
    "deepspeed_stage_2": (*_ZERO_KNOBS, "allgather_bucket_size"),
    "deepspeed_stage_3": (*_ZERO_KNOBS, "offload_parameters"),
}
"""Which fields of `DistributedArgs` a strategy has, beside those that all have."""

_FOR_ALL = ("timeout_minutes",)


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
    port = environment["MASTER_PORT"]
    if world > 1 and not (port.isdecimal() and 1 <= int(port) <= 65535):
        # torch would have the first process listen anywhere, and the others look for it at this number.
        raise ValueError(
            f"environment: MASTER_PORT: {port!r} is no port that {world} processes can meet at; give torchrun "
            "--standalone (one node) instead of --master_port, or set a free port from 1 to 65535"
        )
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
        ImportError: If a package is missing.
    """
    check_strategy(name, args, accelerator)
    timeout = timedelta(minutes=args.timeout_minutes)
    if (stage := stage_of(name)) is not None:
        # A single process can still keep what it optimizes on the CPU.
        return ZeroStrategy(stage, args)
    if processes == 1:
        return "auto"
    if name in ("auto", "ddp"):
        return DDPStrategy(
            timeout=timeout,
            **_given(
                bucket_cap_mb=args.bucket_mb,
                gradient_as_bucket_view=args.gradient_as_bucket_view,
                find_unused_parameters=args.find_unused_parameters,
            ),
        )
    if name == "fsdp2":
        return ModelParallelStrategy(
            parallelize_fn=lambda model, mesh: _shard(model, mesh, args),
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
        **_given(forward_prefetch=args.forward_prefetch, limit_all_gathers=args.limit_all_gathers),
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def single_process_note(name: StrategyName, processes: int, args: DistributedArgs) -> str | None:
    """Return what to tell a user who asked for a sharded strategy with one process, or None."""
    if processes > 1 or name in ("auto", "ddp") or stage_of(name) is not None:
        return None
    offload = ", and distributed.cpu_offload has no effect" if args.cpu_offload else ""
    return f"strategy: {name} has nothing to share out in a single process: it becomes auto{offload}"


def check_strategy(name: str, args: DistributedArgs, accelerator: str) -> None:
    """Raise an error if a strategy does not work here or lacks a knob that is set.

    Args:
        name: As in recipes.
        args: The knobs.
        accelerator: `cpu` or `cuda`.

    Raises:
        ValueError: If the name, a knob or the device does not fit.
        ImportError: If a package is missing.
    """
    if name not in get_args(StrategyName):
        raise ValueError(f"strategy: {name!r} is unknown; choose from {', '.join(get_args(StrategyName))}")
    for field in fields(args):
        value = getattr(args, field.name)
        if value is not None and field.name not in (*_FOR_ALL, *KNOBS[name]):
            own = ", ".join(f"distributed.{knob}" for knob in KNOBS[name])
            raise ValueError(
                f"distributed.{field.name}: {value} would be ignored because strategy: {name} has no such setting; it "
                f"has {own}"
            )
    if accelerator == "cpu" and name in CUDA_ONLY:
        raise ValueError(f"strategy: {name!r} needs CUDA devices, and there is none; ddp and fsdp2 also work on CPUs")
    if stage_of(name) is not None:
        require_deepspeed(name)


def _shard(model: nn.Module, mesh: Any, args: DistributedArgs) -> nn.Module:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    options = {
        "mesh": mesh["data_parallel"],
        "offload_policy": CPUOffloadPolicy() if args.cpu_offload else OffloadPolicy(),
    }
    for block in model.transformer.h:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def is_sharded(strategy: Any) -> bool:
    """Whether no process holds all weights between two steps."""
    if isinstance(strategy, ZeroStrategy):
        return strategy.zero_stage_3
    return isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def accelerator_here() -> str:
    """Return the device type that training will use."""
    return "cuda" if torch.cuda.is_available() else "cpu"
