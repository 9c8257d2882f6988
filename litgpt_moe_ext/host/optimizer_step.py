"""Let torch's optimizers step without loading torch's compiler.

`Optimizer.step` tells the compiler to break its graph, which imports it, 2 s of processor time, also in a process that
compiles nothing.
"""

import sys
from types import MethodType
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable


def step_without_compiler(optimizer: Optimizer) -> None:
    """Let `optimizer` do its step alone, with its hooks; does nothing where the compiler is loaded.

    Steps that are not written as torch writes its own, or that are to be differentiated, stay as they are.
    """
    wrapped: Any = getattr(type(optimizer).step, "__wrapped__", None)
    if "torch._dynamo" in sys.modules or getattr(wrapped, "__code__", None) is not _WRAPPER:
        return
    if not optimizer.defaults["differentiable"]:
        step = Optimizer.profile_hook_step(torch.no_grad()(wrapped.__wrapped__))
        optimizer.step = MethodType(step, optimizer)  # pyrefly: ignore[bad-assignment] torch's schedulers do the same


_WRAPPER = _use_grad_for_differentiable(lambda: None).__code__  # pyrefly: ignore[missing-attribute] a function
