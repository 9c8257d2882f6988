"""Postpone the kernels in Python that torch has for its meta device.

They are a quarter of `import torch`. Most of them stand in front of kernels in C++ that return the same and are quicker
to ask; in front of some it is sympy that is loaded first. A process that describes a model, and ends, does with those
in C++, and with `litgpt_moe_ext.meta.kernels` where there are none.

Whatever else needs them (names of the module, what else it imports of torch, as torch's compiler and its fake tensors
do, or an operator without another kernel) loads them then, and they are torch's own.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from litgpt_moe_ext.host import autoload

MODULE = "torch._meta_registrations"
# What they import first of torch; the rest is in these. In another order they would meet each other half done.
_PARTS = ("torch._decomp", "torch._prims", "torch._refs", "torch.utils._content_store")


def postpone() -> None:
    """Let an import of torch leave them out; where torch is loaded, they stay."""
    autoload.execute_with(MODULE, _wait)


def load() -> bool:
    """Load them if they were left out, and return whether they were."""
    module = sys.modules.get(MODULE)
    execute = None if module is None else module.__dict__.pop("_litgpt_moe_ext_execute", None)
    if module is None or execute is None:
        return False
    del module.__dict__["__getattr__"]
    # The caller's modes and default device must not affect what the module does when it is loaded.
    with importlib.import_module("torch._C").DisableTorchFunction():
        execute(module)
    return True


def asking_again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that runs operators on meta tensors, again with all of torch's kernels if one was missing."""
    try:
        return function(*args, **kwargs)
    except NotImplementedError:
        if not load():
            raise
    return function(*args, **kwargs)


def _wait(module: ModuleType, loader: Any) -> None:
    def getattr_(name: str) -> Any:
        if not (name.startswith("__") and name.endswith("__")) and load():
            return getattr(module, name)
        raise AttributeError(f"module {MODULE!r} has no attribute {name!r}")

    module.__dict__.update(_litgpt_moe_ext_execute=loader.exec_module, __getattr__=getattr_)
    for name in _PARTS:
        autoload.before_import(name, load)
