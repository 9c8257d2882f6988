"""What one of several processes takes in training, by strategy.

The rules are those of torch's DDP and FSDP, and DeepSpeed's ZeRO, with the settings that
`litgpt_moe_ext.training.parallel.strategies` gives them:

| strategy             | weights, gradients, optimizer | besides                                                      |
| -------------------- | ----------------------------- | ------------------------------------------------------------ |
| `ddp`                | whole                         | a copy of the gradients, in the buckets that are reduced     |
| `fsdp`, `fsdp2`      | a share                       | the parameters outside the blocks, two blocks, one gradient  |
| `fsdp_shard_grad_op` | a share                       | all parameters, from forward to backward pass, one gradient  |
| `deepspeed_stage_1`  | optimizer: a share            | a bucket of gradients                                        |
| `deepspeed_stage_2`  | and gradients: a share        | the same                                                     |
| `deepspeed_stage_3`  | a share                       | as `fsdp`                                                    |

ZeRO optimizes a float32 copy of the weights, which counts as part of the optimizer here; that the other copy is half as
wide in mixed precision is left out.

With several nodes `fsdp` shares the work within a node, each of which has all of it; the others share among all.
"""

from typing import Any, NamedTuple, get_args

from litgpt_moe_ext.inspect.cost.memory import TrainingMemory
from litgpt_moe_ext.training.parallel.deepspeed.settings import stage_of
from litgpt_moe_ext.training.settings import StrategyName

STRATEGIES = tuple(name for name in get_args(StrategyName) if name != "auto")
# Fabric's default: 200 million gradients of 4 bytes.
_BUCKET = 800_000_000


class ProcessMemory(NamedTuple):
    """Bytes that one process takes during a training step.

    Attributes:
        weights: Its part of parameters and buffers.
        gradients: Its part of the gradients.
        optimizer: Its part of the optimizer's state.
        communication: What is gathered from other processes or about to be sent to them, at the worst moment.
        activations: As without other processes.
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


def process_memory(
    memory: TrainingMemory,
    block: int,
    outside: int,
    strategy: str,
    per_node: int,
    nodes: int,
    cpu_offload: bool = False,
) -> ProcessMemory:
    """Return what one process takes.

    Args:
        memory: What a single process would take.
        block: Bytes of the parameters of the largest block.
        outside: Bytes of the parameters outside the blocks: embeddings, last norm, output head.
        strategy: One of `STRATEGIES`, or `auto`, which is `ddp`.
        per_node: Processes on each node.
        nodes: Number of nodes.
        cpu_offload: As `distributed.cpu_offload`, or `distributed.offload_optimizer` of DeepSpeed.

    Raises:
        ValueError: If there is no such strategy.
    """
    if strategy not in (*STRATEGIES, "auto"):
        raise ValueError(f"strategy: {strategy!r} is unknown; choose from auto, {', '.join(STRATEGIES)}")
    if (stage := stage_of(strategy)) is not None:
        return _zero_memory(memory, block, outside, stage, per_node * nodes, cpu_offload)
    if per_node * nodes == 1:
        return ProcessMemory(memory.weights, memory.gradients, memory.optimizer, 0, memory.activations)
    if strategy in ("auto", "ddp"):
        whole = memory.weights, memory.gradients, memory.optimizer
        return ProcessMemory(*whole, communication=memory.gradients, activations=memory.activations)
    shares = per_node if strategy == "fsdp" else per_node * nodes
    parts = [-(-size // shares) for size in (memory.weights, memory.gradients, memory.optimizer)]
    # The next block is gathered while one is computed; the gradient of a block is whole until it is sent.
    gathered = memory.gradients if strategy == "fsdp_shard_grad_op" else outside + 2 * block
    communication = gathered + max(block, outside)
    return ProcessMemory(*parts, communication, memory.activations, host=sum(parts) if cpu_offload else 0)


def _zero_memory(
    memory: TrainingMemory, block: int, outside: int, stage: int, shares: int, offload: bool
) -> ProcessMemory:
    optimizer = -(-(memory.optimizer + memory.weights) // shares)
    gradients = memory.gradients if stage == 1 else -(-memory.gradients // shares)
    if stage < 3:
        weights, communication = memory.weights, min(_BUCKET, memory.gradients)
    else:
        weights, communication = -(-memory.weights // shares), outside + 2 * block + max(block, outside)
    host = optimizer if offload else 0
    return ProcessMemory(weights, gradients, optimizer, communication, memory.activations, host)


def block_sizes(config: Any, itemsize: int) -> tuple[int, int]:
    """Return the bytes of the parameters of the largest block, and of those outside the blocks.

    Args:
        config: A `litgpt.Config`.
        itemsize: Bytes of a parameter.
    """
    import torch
    from litgpt.model import GPT

    with torch.device("meta"):
        model = GPT(config)
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.transformer.h]
    total = sum(parameter.numel() for parameter in model.parameters())
    return itemsize * max(blocks), itemsize * (total - sum(blocks))
