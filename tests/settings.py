"""The settings that a command line gives to a training."""

from collections.abc import Sequence
from pathlib import Path

from litgpt_moe_ext.cli.settings import settings_of
from litgpt_moe_ext.inspect.recipes import Recipe, known_settings
from litgpt_moe_ext.training.settings import Settings
from tests.runs import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def read_settings(arguments: Sequence[str], default_config: Path = QUICKSTART) -> Settings:
    """Return the settings of `settings_of`, without further checks."""
    with settings_of(arguments, default_config) as settings:
        return settings


def recipe_with(config, settings=None, checkpoint=None) -> Recipe:
    """Return a recipe of a model and some settings, given as in a file."""
    return Recipe(config, known_settings(settings or {}), checkpoint)
