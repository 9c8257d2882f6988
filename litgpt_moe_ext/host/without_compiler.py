"""Run torch's reference functions without loading torch's compiler.

On the meta device torch computes shapes with Python functions (`torch._refs`), each in a wrapper that keeps it from
being compiled. The first call of the wrapper loads the compiler, 2 s of processor time, to mark the function. Nothing
compiles while a model or a schedule is only described, so here the functions are presented as marked already.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

# The attribute in which torch keeps the wrapped function once it is marked.
_MARK = "__dynamo_disable"
_PREFIXES = (
    "torch._refs", "torch._decomp", "torch._prims", "torch._meta_registrations", "torch.optim", "torch.utils.checkpoint"
)  # fmt: skip


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Keep torch's reference functions from loading its compiler; do nothing once it is loaded, or when nested."""
    functions = [] if "torch._dynamo" in sys.modules else _wrapped_functions()
    if not functions or hasattr(functions[0], _MARK):
        yield
        return
    for function in functions:
        setattr(function, _MARK, function)
    try:
        yield
    finally:
        # A compiler that is loaded later must mark them itself.
        for function in functions:
            delattr(function, _MARK)


@functools.cache
def _wrapped_functions() -> list[Callable[..., Any]]:
    # A reference function is often another function in several wrappers, or a method of a class.
    found = []
    wrapper = torch._disable_dynamo(_members).__code__  # pyrefly: ignore[missing-attribute] a function
    waiting: list[Any] = [
        value for name in list(sys.modules) if name.startswith(_PREFIXES) for value in _members(sys.modules[name])
    ]
    seen = set[int]()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if function.__code__ is wrapper:
            wrapped = cells["fn"].cell_contents
            if not hasattr(wrapped, _MARK):
                found.append(wrapped)
        for cell in cells.values():
            with contextlib.suppress(ValueError):  # an empty cell
                waiting.append(cell.cell_contents)
    return found


def _members(module: Any) -> Iterator[Any]:
    for value in list(vars(module).values()):
        yield value
        if isinstance(value, type):
            yield from vars(value).values()


def bare_step(optimizer: Optimizer) -> Callable[..., Any]:
    """Return the function that computes an optimizer's step, without torch's hooks around it.

    `Optimizer.step` tells the compiler to break its graph, which loads it even in a process that compiles nothing: for
    torch's own optimizers, unless differentiable, this is left out as well.

    Args:
        optimizer: The optimizer; the function takes it as its argument.
    """
    step: Any = type(optimizer).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    if getattr(step, "__code__", None) is not _BREAKS_GRAPH or optimizer.defaults["differentiable"]:
        return step
    return torch.no_grad()(step.__wrapped__)


def replace_step(optimizer: Optimizer, step: Callable[..., Any]) -> None:
    """Let an optimizer step by another function, between the same hooks.

    Args:
        optimizer: The optimizer.
        step: Takes the arguments of `bare_step`.
    """
    hooked = MethodType(Optimizer.profile_hook_step(step), optimizer)
    optimizer.step = hooked  # pyrefly: ignore[bad-assignment] torch's schedulers do the same


_BREAKS_GRAPH = _use_grad_for_differentiable(lambda: None).__code__  # pyrefly: ignore[missing-attribute] a function
