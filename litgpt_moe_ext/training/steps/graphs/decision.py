"""The decision whether to run forward and backward passes as CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.parallel.facts import StrategyFacts

if TYPE_CHECKING:
    import litgpt


@dataclass(frozen=True)
class GraphDecision:
    """Whether CUDA graphs are tried, and why not.

    Attributes:
        obstacle: Why they are not tried; None if they are.
        asked: Whether the settings require them.
    """

    obstacle: str | None
    asked: bool

    def __str__(self) -> str:
        if self.obstacle is not None:
            return f"CUDA graphs: off ({self.obstacle})"
        return "CUDA graphs: tried in the third step"


def decide(
    asked: bool | Literal["auto"],
    device_type: str,
    facts: StrategyFacts,
    processes: int,
    compiled: bool,
    config: litgpt.Config,
) -> GraphDecision:
    """Choose whether to try CUDA graphs.

    Args:
        asked: As `cuda_graphs` in a recipe.
        device_type: Type of the device, such as `cuda`.
        facts: Facts about the strategy.
        processes: Number of processes on all nodes.
        compiled: Whether the model is compiled.
        config: The model's configuration.

    Raises:
        SettingsError: If `cuda_graphs: true` cannot work.
    """
    if asked is False:
        return GraphDecision("as asked", False)
    # Obstacles that a setting can remove come last: following their advice then leaves none.
    obstacle = _obstacle_of_device(device_type) or facts.graph_obstacle(processes) or _obstacle_of(config, processes)
    if obstacle is None and compiled:
        obstacle = "torch.compile is on; --compile false makes room for them"
    if asked is True and obstacle is not None:
        raise SettingsError(f"cuda_graphs: true cannot work here ({obstacle}); set cuda_graphs: auto")
    if asked == "auto" and obstacle is None and processes > 1:
        # Whether that costs more than graphs save depends on the model and the interconnect; not measured yet.
        obstacle = "gradients would be exchanged after the backward pass, not while it runs; --cuda_graphs true does so"
    return GraphDecision(obstacle, asked is True)


def _obstacle_of_device(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"they are for NVIDIA GPUs, this is {device_type}"
    if torch.version.hip is not None:
        return "they are for NVIDIA GPUs, this is AMD's; nobody has tried them there"
    return None


def _obstacle_of(config: Any, processes: int) -> str | None:
    if config.mlp_class_name == "LLaMAMoE":
        return "LLaMAMoE waits for the device in every layer"
    if processes > 1 and config.router_load_balancing_loss_scope == "global_batch":
        return "router_load_balancing_loss_scope: global_batch sums over the processes in every backward pass"
    return None
