"""Applies the seams to imported modules, if the installed LitGPT has the names that they change."""

import importlib
import importlib.metadata
import sys
import warnings
from functools import partial
from types import ModuleType
from typing import Any

from litgpt_moe_ext import __version__
from litgpt_moe_ext.host import autoload
from litgpt_moe_ext.host.seams import SEAMS, TESTED_LITGPT, Seam

_registered = False


def register() -> None:
    """Apply the seams. Safe to call more than once.

    Raises:
        RuntimeError: If the installed LitGPT lacks a name that the plugin needs; the message gives it.
    """
    global _registered
    if _registered:
        return
    # Set first: the imports below may import LitGPT's model definition, whose import hook calls this again.
    _registered = True
    try:
        _apply_all()
    except BaseException:
        _registered = False
        raise


_AT_ONCE = ("litgpt.config", "litgpt.model", "torch.optim.optimizer")


def _apply_all() -> None:
    # `litgpt` may still be in the middle of its import, without attributes; `import_module` reads `sys.modules`, and
    # does not need them.
    modules = {name: importlib.import_module(name) for name in _AT_ONCE}
    check_version()
    check_names([seam for seam in SEAMS if seam.module in modules])
    for seam in SEAMS:
        if seam.apply is None:
            continue
        if seam.module in modules:
            seam.apply(modules[seam.module])
        else:
            autoload.when_imported(seam.module, partial(_apply_later, seam))
    for name in {seam.module for seam in SEAMS if seam.apply is not None and seam.kind != "call"}:
        autoload.when_executed_again(name, partial(_apply_again, name))
    # Last, because they may use all of LitGPT with this package in it.
    from litgpt_moe_ext.extend import load_extensions

    autoload.when_whole("litgpt", load_extensions)


def _apply_later(seam: Seam, module: ModuleType) -> None:
    assert seam.apply is not None
    try:
        check_names([seam])
    except RuntimeError as error:
        # LitGPT's imports must not fail for programs that only share an environment with the plugin.
        warnings.warn(f"{error} Without it: {seam.reason}", RuntimeWarning, stacklevel=2)
    else:
        seam.apply(module)


def _apply_again(name: str, module: ModuleType) -> None:
    # A reloaded module, as in a notebook, has LitGPT's own functions and classes again.
    for seam in SEAMS:
        if seam.module == name and seam.apply is not None and seam.kind != "call":
            _apply_later(seam, module)


def check_version() -> None:
    """Warn if another minor version of LitGPT is installed than the plugin was tested with."""
    version = importlib.metadata.version("litgpt")
    if version.split(".")[:2] != TESTED_LITGPT.split(".")[:2]:
        warnings.warn(
            f"litgpt_moe_ext {__version__} is tested with litgpt {TESTED_LITGPT}, but {version} is installed. "
            f"If something misbehaves, `pip install litgpt=={TESTED_LITGPT}`.",
            RuntimeWarning,
            stacklevel=2,
        )


def check_names(seams: list[Seam]) -> None:
    """Check that the names exist in their modules, which must be imported.

    Args:
        seams: The seams to be applied. Names to be added need not exist.

    Raises:
        RuntimeError: If names are missing; the message lists them all.
    """
    missing = [str(seam) for seam in seams if seam.kind != "add" and not _exists(sys.modules[seam.module], seam.name)]
    if missing:
        raise RuntimeError(
            f"litgpt {importlib.metadata.version('litgpt')} lacks {', '.join(dict.fromkeys(missing))}, which "
            f"litgpt_moe_ext {__version__} builds on. Install litgpt=={TESTED_LITGPT}."
        )


def _exists(owner: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    return hasattr(owner, first) and (not rest or _exists(getattr(owner, first), rest))
