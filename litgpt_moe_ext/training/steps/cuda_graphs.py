"""Whether the passes of a micro-batch run as CUDA graphs, and how LitGPT's loop comes to use them.

The loop calls the model for logits, and then another function for their loss. Graphs hold both, so the model only
passes its input on, and the loss function does all the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.parallel.facts import StrategyFacts
from litgpt_moe_ext.training.steps.graphed_loss import GraphedLoss
from litgpt_moe_ext.training.steps.room import NoRoom, Room

if TYPE_CHECKING:
    from litgpt_moe_ext.config.types import Config
    from litgpt_moe_ext.training.compilation import CompileDecision
    from litgpt_moe_ext.training.launch import Launched
    from litgpt_moe_ext.training.parallel.behaviour import Behaviour


@dataclass(frozen=True)
class GraphDecision:
    """Whether CUDA graphs are tried, and why not.

    Attributes:
        obstacle: Why not; None if they are.
        asked: Whether the settings insist on them.
    """

    obstacle: str | None
    asked: bool

    def __str__(self) -> str:
        if self.obstacle is not None:
            return f"CUDA graphs: off ({self.obstacle})"
        return "CUDA graphs: tried in the third step"


class Conditions(NamedTuple):
    """What decides whether passes can be captured.

    Attributes:
        device_type: Type of the device, such as `cuda`.
        strategy: What the strategy shards.
        processes: Number of processes on all nodes.
        compiled: Whether the model is compiled.
        activation_checkpointing: As in a recipe.
        config: The model's configuration.
    """

    device_type: str
    strategy: StrategyFacts
    processes: int
    compiled: bool
    activation_checkpointing: str
    config: Config

    @classmethod
    def of(cls, launched: Launched, compiled: CompileDecision) -> Conditions:
        """Return those of a run."""
        fabric, plan = launched.fabric, launched.plan
        checkpointing, config = plan.settings.activation_checkpointing, cast("Config", plan.config)
        facts = fabric.strategy.facts
        return cls(fabric.device.type, facts, fabric.world_size, compiled.enabled, checkpointing, config)

    def obstacle(self) -> str | None:
        """Return what keeps passes from being captured, or None."""
        if self.device_type != "cuda":
            return f"they are for NVIDIA GPUs, this is {self.device_type}"
        if torch.version.hip is not None:
            return "they are for NVIDIA GPUs, this is AMD's; nobody has tried them there"
        # Obstacles that a setting removes come last, so that following the advice helps.
        lasting = self.strategy.graph_obstacle(self.processes) or _obstacle_of(self.config, self.processes)
        if lasting is not None:
            return lasting
        if self.compiled:
            return "torch.compile is on; --compile false makes room for them"
        if self.activation_checkpointing != "none":
            return "activation_checkpointing runs layers again in the backward pass, with random states of the host"
        return None


def decide(asked: bool | Literal["auto"], conditions: Conditions) -> GraphDecision:
    """Choose whether to try CUDA graphs.

    Args:
        asked: As `cuda_graphs` in a recipe.
        conditions: What can keep them from working.

    Raises:
        SettingsError: If `cuda_graphs: true` cannot work.
    """
    if asked is False:
        return GraphDecision("as asked", False)
    obstacle = conditions.obstacle()
    if asked is True and obstacle is not None:
        raise SettingsError(f"cuda_graphs: true cannot work here ({obstacle}); set cuda_graphs: auto")
    if asked == "auto" and obstacle is None and conditions.processes > 1:
        # Whether that costs more than launches do depends on the model and what connects the cards; not measured yet.
        obstacle = "gradients would be exchanged after the backward pass, not while it runs; --cuda_graphs true does so"
    return GraphDecision(obstacle, asked is True)


def _obstacle_of(config: Config, processes: int) -> str | None:
    if config.mlp_class_name == "LLaMAMoE":
        return "LLaMAMoE waits for the device in every layer"
    is_global = config.router_load_balancing_loss_scope == "global_batch"
    if processes > 1 and is_global and config.router_load_balancing_loss_coef:
        return "router_load_balancing_loss_scope: global_batch sums over the processes in every backward pass"
    return None


class _Deferred(NamedTuple):
    """What stands for the logits of a batch that is not computed yet."""

    ids_BT: Tensor


class CudaGraphs:
    """Put between LitGPT's loop, its model and its loss function.

    Args:
        decision: Whether to try.
        say: Told about it.
        room: What passes must have room for.
    """

    def __init__(self, decision: GraphDecision, say: Callable[[str], None], room: Room | None = None) -> None:
        self._decision, self._say, self._room = decision, say, room or NoRoom()
        self._graphed: Callable[[Tensor, Tensor], Tensor] | None = None
        self._expects = False
        self._cross_entropy: Callable[[Any, Tensor], Tensor]

    def expect_batch(self) -> None:
        """Note that the loop has a batch: its next call of the model, and no other, can be left to the loss."""
        self._expects = True

    def wrap(self, cross_entropy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a loss function that also computes the logits where they are left to it.

        Args:
            cross_entropy: Takes logits and targets.
        """
        self._cross_entropy = cross_entropy

        def loss(logits: Any, targets: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if isinstance(logits, _Deferred) and self._graphed is not None:
                return self._graphed(logits.ids_BT, targets)
            return cross_entropy(logits, targets, *args, **kwargs)

        return loss

    @contextlib.contextmanager
    def deferring(self, model: Any, strategy: Behaviour) -> Iterator[None]:
        """Have a model leave the loop's batches to the loss function while it trains, for the time of the scope.

        Callbacks that call the model get what it computes.

        Args:
            model: Fabric's wrapper.
            strategy: Fabric's, under whose precision the model computes.
        """
        if self._decision.obstacle is not None:
            yield
            return

        precision = strategy.precision

        def loss(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            # As Fabric's wrapper does it, but for the hook that wants `fabric.backward` to have been called.
            with precision.forward_context():
                logits = model.module(ids_BT)
            return self._cross_entropy(precision.convert_output(logits), targets_BT)

        compute = model.forward
        careful, exchange = not self._decision.asked, strategy.exchange_gradients
        graphed = GraphedLoss(loss, model, careful=careful, say=self._say, exchange=exchange)
        graphed.room = self._room
        self._graphed = partial(strategy.in_place_of_forward, graphed)

        def forward(ids_BT: Tensor, *args: Any, **kwargs: Any) -> Any:
            expected, self._expects = self._expects, False
            if expected and model.training and torch.is_grad_enabled() and not (args or kwargs):
                return _Deferred(ids_BT)
            return compute(ids_BT, *args, **kwargs)

        # Fabric's wrapper would hand an ordinary assignment on to the model inside.
        object.__setattr__(model, "forward", forward)
        try:
            yield
        finally:
            object.__delattr__(model, "forward")
            self._graphed = None
