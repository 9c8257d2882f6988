"""The settings that a command line gives to a training."""

from collections.abc import Sequence
from pathlib import Path

from litgpt_moe_ext.cli.settings import settings_of
from litgpt_moe_ext.training.settings import Settings
from tests.runs import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def read_settings(arguments: Sequence[str], default_config: Path = QUICKSTART) -> Settings:
    """Return the settings of `settings_of`, without further checks."""
    with settings_of(arguments, default_config) as settings:
        return settings
