"""Settings of the strategy that distributes training over several processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from litgpt_moe_ext.field_types import Minutes, PositiveFloat, PositiveInt
from litgpt_moe_ext.training.settings.section import Section

StrategyName = Literal[
    "auto",
    "ddp",
    "fsdp",
    "fsdp_shard_grad_op",
    "fsdp2",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
]
"""Names of the strategies, which `training.parallel.facts` describes."""


@dataclass
class DistributedArgs(Section, key="distributed"):
    """Options of the strategy; an option that the chosen strategy does not have is refused."""

    bucket_mb: PositiveFloat | None = None
    """ddp: size of the buckets in which gradients are reduced during the backward pass, in MiB; null: 25."""
    gradient_as_bucket_view: bool | None = None
    """ddp: let gradients share the memory of the buckets, which saves a copy of all gradients; null: false."""
    find_unused_parameters: bool | None = None
    """ddp: look for weights without a gradient after a backward pass, which costs time; null: false."""
    cpu_offload: bool | None = None
    """fsdp, fsdp_shard_grad_op, fsdp2: keep weights and optimizer states in CPU memory; null: false."""
    forward_prefetch: bool | None = None
    """fsdp, fsdp_shard_grad_op, fsdp2: gather the next block's weights before this one is computed; null: false."""
    overlap_comm: bool | None = None
    """deepspeed: reduce gradients during the backward pass; null: true."""
    reduce_bucket_size: PositiveInt | None = None
    """deepspeed: number of gradients reduced at once; null: 200000000."""
    allgather_bucket_size: PositiveInt | None = None
    """deepspeed_stage_1, deepspeed_stage_2: number of updated weights gathered at once, even; null: 200000000."""
    offload_optimizer: bool | None = None
    """deepspeed: keep the optimizer's states and run its steps on the CPU; null: false."""
    offload_parameters: bool | None = None
    """deepspeed_stage_3: keep the weights on the CPU as well; null: false."""
    timeout_minutes: Minutes = 10.0
    """Minutes that a process waits for the others before it gives up."""

    def problems(self) -> Iterator[str]:
        """See `Section.problems`."""
        if self.allgather_bucket_size is not None and self.allgather_bucket_size % 2:
            yield f"distributed.allgather_bucket_size: {self.allgather_bucket_size} must be even"
