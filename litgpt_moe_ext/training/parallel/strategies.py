"""How several processes share the work: a strategy of Fabric's for each name that recipes use."""

from typing import Any

from litgpt_moe_ext.training.checks import check_strategy
from litgpt_moe_ext.training.parallel.facts import facts_of
from litgpt_moe_ext.training.parallel.whole_model import ReplicatedStrategy, SingleProcessStrategy
from litgpt_moe_ext.training.settings import DistributedArgs, StrategyName


def make_strategy(name: StrategyName, processes: int, nodes: int, args: DistributedArgs, accelerator: str) -> Any:
    """Return what `lightning.Fabric` takes as its strategy, which has a `Behaviour` as well.

    Args:
        name: As in recipes.
        processes: Number of processes on all nodes.
        nodes: Number of nodes.
        args: The knobs.
        accelerator: Device type.

    Raises:
        SettingsError: If the strategy does not work here or lacks a knob that is set.
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

        return FullyShardedStrategy(facts, processes, nodes, args)
    return ReplicatedStrategy(accelerator, args)
