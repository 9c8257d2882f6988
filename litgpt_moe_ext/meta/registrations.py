"""Postpones torch's Python kernels for its meta device.

They take a quarter of `import torch`. Most of them override kernels in C++ that return the same and are faster; some
load sympy first. A process that only describes a model needs just those in C++, and `litgpt_moe_ext.meta.kernels` where
there are none.

Anything else that needs them loads torch's own: access to a name of the module, an import of another part of torch that
uses them, such as the compiler and fake tensors, or an operator without another kernel.
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from litgpt_moe_ext.host import autoload

MODULE = "torch._meta_registrations"
# The parts of torch that they import first. In another order these would import each other half initialised.
_PARTS = ("torch._decomp", "torch._prims", "torch._refs", "torch.utils._content_store")


def postpone() -> None:
    """Let an import of torch skip them; do nothing if torch is loaded."""
    autoload.execute_with(MODULE, _wait)


def load() -> bool:
    """Load them if they were skipped, and return whether they were."""
    module = sys.modules.get(MODULE)
    execute = None if module is None else module.__dict__.pop("_litgpt_moe_ext_execute", None)
    if module is None or execute is None:
        return False
    del module.__dict__["__getattr__"]
    # The caller's modes and default device must not affect the module's own code while it is loaded.
    with importlib.import_module("torch._C").DisableTorchFunction():
        execute(module)
    return True


def asking_again(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that runs operators on meta tensors; if a kernel is missing, load torch's and call it again."""
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
