"""Add a router, an auxiliary loss and an activation to litgpt_moe_ext, and train with them.

A recipe says so, here on top of the quickstart:

    model_config:
      mlp_class_name: MoE
      router_type: temperature
      mlp_activation: mishglu
      # What the quickstart's router reads and this one would ignore.
      router_score_function: null
      norm_topk_prob: false
      router_bias_update_rate: null

    uv run python examples/add_a_router.py --config configs/quickstart.yaml --config my_recipe.yaml

This takes every flag of `run_train.py`. Nothing in the package has to be edited: a class or function each, and an entry
in the registry that says what it has or needs. Which settings go together, their checks, and their metrics follow from
that. A package that is installed can register itself in every `litgpt` command, so that `litgpt generate` opens the
checkpoints as well (`litgpt_moe_ext.extend`).
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt_moe_ext.config.fields import Field
from litgpt_moe_ext.extend import register_activation, register_loss, register_router
from litgpt_moe_ext.field_types import PositiveFloat
from litgpt_moe_ext.moe.activations import Pointwise
from litgpt_moe_ext.moe.registry import ActivationType, Loss, RouterType
from litgpt_moe_ext.moe.routing.learned_routers import LearnedRouter
from litgpt_moe_ext.moe.routing.router import Choice


class TemperatureRouter(LearnedRouter):
    """Chooses the highest softmax scores, at a temperature that is learned.

    Args:
        config: The model configuration; uses `router_initial_temperature`.
    """

    def __init__(self, config) -> None:
        super().__init__(config)
        self.initial_temperature = config.router_initial_temperature
        self.log_temperature = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        """Initialise the gate and the temperature."""
        super().reset_parameters()
        nn.init.constant_(self.log_temperature, math.log(self.initial_temperature))

    def choose(self, x_TD: Tensor) -> Choice:
        """Choose the K highest scores; gate values are these scores over their sum."""
        logits_TE = self.logits(x_TD) / self.log_temperature.exp()
        best = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        return Choice(best.values / best.values.sum(dim=-1, keepdim=True), best.indices, logits_TE)


def spread_loss(probabilities_TE: Tensor) -> Tensor:
    """Return E times the sum of the squared mean probabilities: 1 where experts are equally likely, up to E."""
    return probabilities_TE.size(1) * probabilities_TE.mean(dim=0).square().sum()


def register() -> None:
    """Make them known under the names that a configuration uses."""
    register_router(
        "temperature",
        RouterType(
            TemperatureRouter,
            doc="highest scores at a learned temperature",
            features=frozenset({"logits", "temperature", "sums_to_one"}),
            defaults={"router_spread_loss_coef": 0.01},
        ),
        fields={
            "router_initial_temperature": Field(
                PositiveFloat, "temperature before training", owner=("feed_forward", "moe", "temperature"), default=1.0
            )
        },
    )
    register_loss("spread_loss", Loss(spread_loss, inputs=("probabilities_TE",), doc="the spread of probabilities"))
    register_activation("mishglu", ActivationType(Pointwise(F.mish), gated=True))


if __name__ == "__main__":
    register()
    from litgpt_moe_ext.cli.train import main

    sys.exit(main())
