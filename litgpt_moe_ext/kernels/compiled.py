"""Marks for `torch.compile` that do not load the compiler."""

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable)


def assume_constant_result(function: _Function) -> _Function:
    """Mark a function whose result compiled code may treat as a constant.

    Like `torch.compiler.assume_constant_result`, which imports torch's compiler to set this one attribute; that takes
    two thirds as long as importing torch.

    Args:
        function: Returns the same value for the same arguments, and no tensor.

    Returns:
        The function itself.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
