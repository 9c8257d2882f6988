"""All checks of the doctor, in the order of its page."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from litgpt_moe_ext.inspect.doctor import computing, installation, places, room
from litgpt_moe_ext.inspect.doctor.finding import Finding
from litgpt_moe_ext.inspect.doctor.settings import settings_together, unread
from litgpt_moe_ext.inspect.recipes import Recipe

if TYPE_CHECKING:
    from litgpt_moe_ext.training.settings import Settings


def examine(recipe: Recipe | None, settings: "AbstractContextManager[Settings] | None" = None) -> list[Finding]:
    """Check the installation, and whether it meets the needs of a recipe.

    Args:
        recipe: The recipe; None checks only the installation.
        settings: Yields the recipe's settings as a run reads them, for the run's first checks.
    """
    findings = [*installation.versions(), *installation.devices(), *installation.links_here()]
    if recipe is None:
        return [*findings, installation.compiler(), *installation.kernels(), computing.precision(None)]
    of_recipe: list[Finding] = []
    for finding in _of_recipe(recipe, settings):
        # Report once: a missing kernel also prevents counting memory, and findings on settings also give their place.
        if not any(f"{other.text} (".startswith(f"{finding.text} (") for other in of_recipe):
            of_recipe.append(finding)
    return [*findings, *of_recipe]


def _of_recipe(recipe: Recipe, settings: "AbstractContextManager[Settings] | None") -> Iterator[Finding]:
    from litgpt_moe_ext.training.parallel.accelerator import accelerator_here

    yield computing.compiling(recipe)
    yield from computing.kernels(recipe)
    yield computing.precision(recipe.settings.precision)
    if recipe.checkpoint:
        yield unread(recipe.checkpoint)
    of_settings = [] if settings is None else list(settings_together(recipe, settings))
    yield from of_settings
    yield computing.strategy(recipe)
    yield computing.graphs(recipe, accelerator_here())
    yield from room.memory(recipe)
    of_data = list(places.data(recipe, of_settings))
    yield from of_data
    yield from places.tokenizer(recipe, [*of_settings, *of_data])
    if not recipe.checkpoint:
        yield from places.out_dir(recipe)
    yield room.disk(recipe)
