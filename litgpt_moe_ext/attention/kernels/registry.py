"""The kernels that can compute attention, by name.

`register_kernel` adds one from outside this package, as in `examples/add_an_attention_kernel.py`. The choice between
kernels, the setting `attention_backend`, the announcement before training, `litgpt-moe doctor` and the FLOP counter
read this table. Nothing here imports torch, so that reading a configuration stays cheap.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from litgpt_moe_ext.attention.kernels.kernel import DTYPES, EVERY_ABILITY, AttentionKernel, KernelFunctions
from litgpt_moe_ext.attention.kernels.own import EAGER, OWN_KERNELS
from litgpt_moe_ext.entries import require

# By name, in the order of preference.
KERNELS: dict[str, AttentionKernel] = {kernel.name: kernel for kernel in OWN_KERNELS}
OWN = frozenset(KERNELS)
"""Names of this package's kernels; the results of others are checked."""
_loaded: dict[str, Any] = {}


def register_kernel(kernel: AttentionKernel, before: str = EAGER) -> None:
    """Add an attention kernel, which `attention_backend` can then name and which is chosen where it works.

    Call it before creating a model; `litgpt_moe_ext.extend` says how an installed package does so in every command. A
    kernel that is chosen by default must give correct results for everything that its fields allow.

    Args:
        kernel: What it can do, and its functions.
        before: The kernel over which it takes precedence: `flash_cpu`, the first, to precede all.

    Raises:
        ValueError: If the name is taken, `before` is unknown, or `kernel` is malformed.
    """
    require(kernel.name if isinstance(kernel, AttentionKernel) else "kernel", kernel, AttentionKernel)
    if KERNELS.get(kernel.name) == kernel:
        return  # a script and the entry point of its package may both call this
    if kernel.name in KERNELS:
        raise ValueError(f"attention kernel {kernel.name!r}: a kernel of this name is registered; choose another name")
    if before not in KERNELS:
        raise ValueError(f"before: {before!r} must be one of {', '.join(KERNELS)}")
    _refuse_unusable(kernel)
    others = dict(KERNELS)
    KERNELS.clear()
    for name, other in others.items():
        if name == before:
            KERNELS[kernel.name] = kernel
        KERNELS[name] = other


def _refuse_unusable(kernel: AttentionKernel) -> None:
    # A kernel with a misspelt ability would never be chosen.
    if not isinstance(kernel.dtypes, Mapping) or not isinstance(kernel.abilities, frozenset):
        raise ValueError(f"{kernel.name!r}: dtypes must be a mapping to the lowest capability, abilities a frozenset")
    known = {"dtypes": DTYPES, "abilities": EVERY_ABILITY}
    for field, names in known.items():
        if unknown := [name for name in getattr(kernel, field) if name not in names]:
            raise ValueError(f"{kernel.name!r}: {field} has {unknown[0]!r}; known are {', '.join(sorted(names))}")
    functions = ("forward", "backward") if "gradient" in kernel.abilities else ("forward",)
    for function in () if isinstance(kernel.functions, str) else functions:
        if not callable(getattr(kernel.functions, function, None)):
            raise ValueError(f"{kernel.name!r}: functions is {kernel.functions!r}, which has no {function}")


def functions_of(name: str) -> KernelFunctions:
    """Return the functions of a kernel, importing their module on first use."""
    if name not in _loaded:
        functions = KERNELS[name].functions
        if functions is None:
            raise ValueError(f"attention kernel {name!r} has no functions of its own")
        _loaded[name] = importlib.import_module(functions) if isinstance(functions, str) else functions
    return _loaded[name]


def load_functions() -> None:
    """Import the modules of all kernels, which a compiler that traces attention could not do."""
    for name, kernel in KERNELS.items():
        if kernel.functions is not None:
            functions_of(name)
