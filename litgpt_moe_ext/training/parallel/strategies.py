"""The Fabric strategy for each strategy name of recipes."""

import dataclasses
from typing import Any

import torch
from lightning.fabric.strategies import SingleDeviceStrategy

from litgpt_moe_ext.training.checkpoint.io import DirectCheckpointIO
from litgpt_moe_ext.training.parallel.behaviour import Behaviour
from litgpt_moe_ext.training.parallel.facts import STRATEGIES, facts_of
from litgpt_moe_ext.training.parallel.replicated import ReplicatedStrategy
from litgpt_moe_ext.training.phases.checks import check_strategy
from litgpt_moe_ext.training.settings import DistributedArgs, StrategyName


def make_strategy(name: StrategyName, processes: int, nodes: int, args: DistributedArgs, accelerator: str) -> Any:
    """Return the strategy for `lightning.Fabric`, which also has a `Behaviour`.

    Args:
        name: Name of the strategy, as in recipes.
        processes: Number of processes on all nodes.
        nodes: Number of nodes.
        args: The options.
        accelerator: Device type.

    Raises:
        SettingsError: If the strategy does not work here or lacks an option that is set.
    """
    check_strategy(name, args, accelerator)
    facts = facts_of(name)
    if facts.zero_stage is not None:
        from litgpt_moe_ext.training.parallel.deepspeed.strategy import ZeroStrategy

        return ZeroStrategy(facts, args)
    if processes == 1:
        return SingleProcessStrategy(accelerator)
    if "weights" in facts.shards:
        from litgpt_moe_ext.training.parallel.fully_sharded import FullyShardedStrategy

        if accelerator == "cpu":  # where torch would still lock pages for copies to a GPU
            args = dataclasses.replace(args, cpu_offload=None)
        return FullyShardedStrategy(facts, processes, nodes, args)
    return ReplicatedStrategy(accelerator, args)


class SingleProcessStrategy(Behaviour, SingleDeviceStrategy):
    """Training in one process.

    Args:
        accelerator: Device type; the first of several devices is used.
    """

    facts = STRATEGIES["auto"]

    def __init__(self, accelerator: str) -> None:
        device = torch.device("cpu") if accelerator == "cpu" else torch.device(accelerator, 0)
        super().__init__(device, checkpoint_io=DirectCheckpointIO(mmap=accelerator != "cpu"))
