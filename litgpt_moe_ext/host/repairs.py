"""Repairs of defects in the libraries the plugin stands on: one file each, with the reason and when it switches
itself off.

None of them changes what a model computes.
"""

import importlib.metadata

from litgpt_moe_ext.host import autoload


def install_patches() -> None:
    """Install every repair that the installed versions need."""
    from litgpt_moe_ext.host import compile, flops, token_rate

    flops.install()
    if not litgpt_newer_than("0.5.13"):
        autoload.when_imported("litgpt.pretrain", token_rate.install)
    autoload.when_imported("litgpt.pretrain", compile.install)


def litgpt_newer_than(version: str) -> bool:
    """Whether the installed LitGPT is newer than `version`, the last one in which a defect was seen."""
    from packaging.version import Version

    return Version(importlib.metadata.version("litgpt")) > Version(version)
