"""Marks for `torch.compile` that do not load the compiler."""

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable)


def assume_constant_result(function: _Function) -> _Function:
    """Mark a function whose result compiled code may take as a constant.

    As `torch.compiler.assume_constant_result`, which imports torch's compiler, two thirds of the time that torch
    itself takes, to set this one attribute.

    Args:
        function: Returns the same for the same arguments, and no tensor.

    Returns:
        The function itself.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function
