"""A table of what each strategy shards and requires, used by launch, checks, the model card and `doctor`.

Imports neither torch nor Lightning, so that commands that only describe a recipe can use it.
"""

from dataclasses import dataclass, field
from typing import Literal

from litgpt_moe_ext.errors import SettingsError

Part = Literal["weights", "gradients", "optimizer"]

_ALL: tuple[Part, ...] = ("weights", "gradients", "optimizer")


@dataclass(frozen=True)
class StrategyFacts:
    """One strategy as plain data.

    Attributes:
        options: Fields of `DistributedArgs` that it supports, besides those common to all strategies.
        shards: What is sharded over the ranks between two optimizer steps.
        within_node: Whether it shards only within a node, so that every node holds everything.
        communication: What a rank holds at the worst moment for exchange with other ranks: a copy of all `gradients`,
            one `bucket` of them, the parameters of two `blocks`, or those of the whole `model`.
        offloads: What `cpu_offload` or `offload_optimizer` moves to CPU memory.
        cuda_only: Whether it needs CUDA devices.
        alone: Whether it has an effect in a single process; others become `auto` there.
        requires: Requirement of its extra, beyond those of this package, or None.
        zero_stage: Stage of DeepSpeed's ZeRO, or None for torch's own strategies. ZeRO gives the optimizer flat shards
            of several weights, keeps a float32 copy of them, and clips gradients inside the optimizer step.
    """

    options: tuple[str, ...]
    shards: tuple[Part, ...] = ()
    within_node: bool = False
    communication: Literal["gradients", "bucket", "blocks", "model"] = "gradients"
    offloads: tuple[Part, ...] = field(default=())
    cuda_only: bool = False
    alone: bool = False
    requires: str | None = None
    zero_stage: int | None = None

    def holds_whole_model(self, processes: int) -> bool:
        """Return whether every one of `processes` ranks has all weights between two steps."""
        return "weights" not in self.shards or (processes == 1 and not self.alone)

    def graph_obstacle(self, processes: int) -> str | None:
        """Return why passes of one of `processes` ranks cannot be captured as CUDA graphs, or None."""
        if self.zero_stage is not None:
            return "DeepSpeed collects gradients while the backward pass goes on"
        if "weights" in self.shards and processes > 1:
            return "processes that share weights exchange them while the passes go on"
        return None


_DDP = StrategyFacts(options=("bucket_mb", "gradient_as_bucket_view", "find_unused_parameters"))


def _fully_sharded(communication: Literal["blocks", "model"], within_node: bool = False) -> StrategyFacts:
    options = ("cpu_offload", "forward_prefetch")
    return StrategyFacts(options, _ALL, within_node, communication, offloads=_ALL)


def _zero(stage: int) -> StrategyFacts:
    own = "offload_parameters" if stage == 3 else "allgather_bucket_size"
    return StrategyFacts(
        options=("overlap_comm", "reduce_bucket_size", "offload_optimizer", own),
        shards=_ALL[3 - stage :],
        communication="blocks" if stage == 3 else "bucket",
        offloads=("optimizer",),
        cuda_only=True,
        alone=True,
        # Outside float16, earlier versions do not skip steps with non-finite gradients: they combine the groups' norms
        # of -1 into a finite one.
        requires="deepspeed>=0.19.8",
        zero_stage=stage,
    )


STRATEGIES: dict[str, StrategyFacts] = {
    "auto": _DDP,
    "ddp": _DDP,
    "fsdp": _fully_sharded("blocks", within_node=True),
    "fsdp_shard_grad_op": _fully_sharded("model"),
    "fsdp2": _fully_sharded("blocks"),
    "deepspeed_stage_1": _zero(1),
    "deepspeed_stage_2": _zero(2),
    "deepspeed_stage_3": _zero(3),
}
"""Facts by the strategy's name in recipes. `auto` means ddp if there are several processes."""


def facts_of(name: str) -> StrategyFacts:
    """Return the facts of a strategy.

    Raises:
        SettingsError: If there is no strategy of that name.
    """
    if name not in STRATEGIES:
        raise SettingsError(f"strategy: {name!r} is unknown; choose from {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
