"""Models of many equal layers, measured on a short model with the same layers.

From the second on, the cost of a model grows linearly with the number of its periods: a layer, a dense and an MoE layer
in turns, or whatever repeats. So two periods are built, and the others are extrapolated.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from litgpt_moe_ext.meta.models import meta_model

if TYPE_CHECKING:
    from litgpt import Config
    from torch import nn

PERIODS = 2


@dataclass(frozen=True)
class ShortModel:
    """A model with fewer layers that stands for another.

    Attributes:
        config: The short model.
        lead: Layers before the first period.
        period: Layers of a period.
        left_out: Periods that the whole model has beyond the short one.
    """

    config: "Config"
    lead: int
    period: int
    left_out: int

    def total(self, model: "nn.Module", size: "Callable[[nn.Module], int]") -> int:
        """Return the size of the whole model.

        Args:
            model: The short model.
            size: Returns the size of a module, the sum of the sizes of its parts.
        """
        return size(model) + self.left_out * sum(map(size, self.sample(model)))

    def sample(self, model: "nn.Module") -> "list[nn.Module]":
        """Return the blocks of one period."""
        return blocks_of(model)[self.lead : self.lead + self.period]

    def starts(self, model: "nn.Module") -> "list[nn.Module]":
        """Return the first blocks of both periods."""
        return [blocks_of(model)[self.lead + number * self.period] for number in (0, 1)]

    def extrapolate(self, measure: "Callable[[Config], int]") -> int:
        """Return a measure of the whole model, if the measure grows by the same amount with every period."""
        (total,) = self.extrapolate_each(lambda config: (measure(config),))
        return total

    def extrapolate_each(self, measures: "Callable[[Config], Sequence[int]]") -> list[int]:
        """Return several such measures, which are taken together."""
        whole = measures(self.config)
        if not self.left_out:
            return list(whole)
        shorter = measures(_with_layers(self.config, self.config.n_layer - self.period))
        return [long + self.left_out * (long - less) for long, less in zip(whole, shorter, strict=True)]


def blocks_of(model: "nn.Module") -> "list[nn.Module]":
    """Return the blocks of a `litgpt.GPT`, in order of depth."""
    return list(model.get_submodule("transformer.h").children())


def shorten(config: "Config") -> ShortModel:
    """Return the short model for a configuration, or the model itself if it has few or irregular layers."""
    blocks = blocks_of(meta_model(config))
    # LitGPT has a list for each property that differs between layers (windows, rotary frequencies).
    lists = [value for value in vars(config).values() if isinstance(value, list) and len(value) >= config.n_layer]
    kinds = [
        (tuple((name, p.shape) for name, p in block.named_parameters()), tuple(str(value[i]) for value in lists))
        for i, block in enumerate(blocks)
    ]
    lead, period = _find_period(kinds)
    periods = (config.n_layer - lead) // period
    if periods <= PERIODS:
        return ShortModel(config, lead, period, left_out=0)
    short = _with_layers(config, lead + PERIODS * period)
    return ShortModel(short, lead, period, left_out=periods - PERIODS)


def _find_period(kinds: Sequence[object]) -> tuple[int, int]:
    # The fewest layers in lead and period together; the periods must fill the model.
    n = len(kinds)
    candidates = (
        (lead, period)
        for total in range(1, n + 1)
        for lead in range(total)
        if (n - lead) % (period := total - lead) == 0
        and all(kinds[i] == kinds[i + period] for i in range(lead, n - period))
    )
    return next(candidates)


def _with_layers(config: "Config", n_layer: int) -> "Config":
    # Not by `replace`, which would check and derive fields anew.
    short = copy.copy(config)
    short.n_layer = n_layer
    return short
