"""How a run of a recipe would be on this machine."""

from typing import TYPE_CHECKING

from litgpt_moe_ext.inspect.recipes import Recipe

if TYPE_CHECKING:
    import torch


def compiles(recipe: Recipe, device_type: str) -> bool:
    """Return whether a run on a type of device would be compiled."""
    from litgpt_moe_ext.training.compilation import decide

    return decide(recipe.settings.compile, recipe.config, device_type).enabled


def computing(recipe: Recipe) -> "tuple[torch.device, torch.dtype, torch.autocast]":
    """Return where a run of the recipe computes, the type of its weights, and its autocast."""
    import torch

    from litgpt_moe_ext.inspect.cost.memory import PRECISIONS
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here, default_precision

    accelerator = accelerator_here()
    usual = default_precision(accelerator)
    # The check of settings reports an unknown precision.
    dtype, autocast = PRECISIONS.get(recipe.settings.precision or usual, PRECISIONS[usual])
    return torch.device(accelerator), dtype, torch.autocast(accelerator, autocast, enabled=autocast is not None)


def processes(recipe: Recipe) -> int:
    """Return the processes of a run on each node."""
    import torch

    return recipe.devices or torch.cuda.device_count() or 1


def holds_whole_model(recipe: Recipe) -> bool:
    """Return whether every process of a run has all weights."""
    from litgpt_moe_ext.training.parallel.facts import facts_of

    return facts_of(recipe.settings.strategy).holds_whole_model(processes(recipe) * recipe.settings.num_nodes)
