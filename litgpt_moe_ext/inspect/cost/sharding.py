"""The training memory of one of several processes, by strategy.

The rules are those of torch's DDP and FSDP and of DeepSpeed's ZeRO, with the settings of
`litgpt_moe_ext.training.parallel.strategies`:

| strategy             | weights, gradients, optimizer | besides                                                      |
| -------------------- | ----------------------------- | ------------------------------------------------------------ |
| `ddp`                | whole                         | a copy of the gradients, in the buckets that are reduced     |
| `fsdp`, `fsdp2`      | a share                       | the parameters outside the blocks, two blocks, one gradient  |
| `fsdp_shard_grad_op` | a share                       | all parameters, from forward to backward pass, one gradient  |
| `deepspeed_stage_1`  | optimizer: a share            | a bucket of gradients                                        |
| `deepspeed_stage_2`  | and gradients: a share        | the same                                                     |
| `deepspeed_stage_3`  | a share                       | as `fsdp`                                                    |

ZeRO optimizes a float32 copy of the weights, whatever their own type, with a float32 state; both count as optimizer
here. The saving from 16-bit working weights in mixed precision is ignored.

With several nodes, `fsdp` shards within each node, so every node holds everything; the others shard over all nodes.
"""

from typing import TYPE_CHECKING, NamedTuple

from litgpt_moe_ext.inspect.cost.memory import TrainingMemory
from litgpt_moe_ext.training.parallel.facts import STRATEGIES as _STRATEGIES
from litgpt_moe_ext.training.parallel.facts import StrategyFacts, facts_of

if TYPE_CHECKING:
    from litgpt_moe_ext.inspect.cost.layers import ShortModel

STRATEGIES = tuple(name for name in _STRATEGIES if name != "auto")
# Fabric's default: 200 million gradients of 4 bytes.
_BUCKET = 800_000_000


class ProcessMemory(NamedTuple):
    """Bytes that one process takes during a training step.

    Attributes:
        weights: Its part of parameters and buffers.
        gradients: Its part of the gradients.
        optimizer: Its part of the optimizer's state.
        communication: Data gathered from, or about to be sent to, other processes, at the peak.
        activations: As in a single process.
        host: What of these is in the CPU's memory, with `distributed.cpu_offload` or `offload_optimizer`, and not on
            the device.
    """

    weights: int
    gradients: int
    optimizer: int
    communication: int
    activations: int
    host: int = 0

    @property
    def total(self) -> int:
        """All of it, on device and host."""
        return sum(self) - self.host


class BlockSizes(NamedTuple):
    """Bytes of parameters.

    Attributes:
        largest: Of the largest block.
        outside: Outside the blocks: embeddings, last norm, output head.
        itemsize: Of one parameter.
    """

    largest: int
    outside: int
    itemsize: int = 4


def process_memory(
    memory: TrainingMemory,
    sizes: BlockSizes,
    strategy: str,
    per_node: int,
    nodes: int,
    cpu_offload: bool = False,
) -> ProcessMemory:
    """Return what one process takes.

    Args:
        memory: What a single process would take.
        sizes: As from `block_sizes`.
        strategy: One of `STRATEGIES`, or `auto`, which is `ddp`.
        per_node: Processes on each node.
        nodes: Number of nodes.
        cpu_offload: As `distributed.cpu_offload`, or `distributed.offload_optimizer` of DeepSpeed.

    Raises:
        ValueError: If there is no such strategy.
    """
    facts = facts_of(strategy)
    whole = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    if per_node * nodes == 1 and not facts.alone:
        return ProcessMemory(**whole, communication=0, activations=memory.activations)
    if facts.zero_stage is not None:
        # Gradients are as large as the parameters alone; a number in float32 takes 4 bytes.
        whole["optimizer"] = (memory.optimizer + memory.gradients) * 4 // sizes.itemsize
    shares = per_node if facts.within_node else per_node * nodes
    held = {part: -(-size // shares) if part in facts.shards else size for part, size in whole.items()}
    return ProcessMemory(
        **held,
        communication=_communication(facts, memory, sizes),
        activations=memory.activations,
        host=sum(held[part] for part in facts.offloads) if cpu_offload else 0,
    )


def _communication(facts: StrategyFacts, memory: TrainingMemory, sizes: BlockSizes) -> int:
    # The gradient of a block is whole until it is sent.
    gradient = max(sizes.largest, sizes.outside)
    match facts.communication:
        case "gradients":
            return memory.gradients
        case "bucket":
            return min(_BUCKET, memory.gradients)
        case "blocks":  # the next block is gathered while one is computed
            return sizes.outside + 2 * sizes.largest + gradient
        case "model":
            return memory.gradients + gradient


def block_sizes(short: "ShortModel", itemsize: int) -> BlockSizes:
    """Return the sizes of a model in blocks.

    Args:
        short: The model, as `shorten` returns it.
        itemsize: Bytes of a parameter.
    """
    from litgpt_moe_ext.inspect.cost.layers import blocks_of
    from litgpt_moe_ext.meta.models import meta_model

    model = meta_model(short.config)
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks_of(model)]
    total = sum(parameter.numel() for parameter in model.parameters())
    return BlockSizes(itemsize * max(blocks), itemsize * (total - sum(blocks)), itemsize)
