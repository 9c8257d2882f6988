"""Activation checkpointing for tensors without memory.

`torch.utils.checkpoint.checkpoint` reads an option of torch's compiler, which loads the compiler. This has the same
effect on memory, for one backward pass, without what does not affect memory (random numbers, checks).
"""

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Stop(Exception):  # noqa: N818 - not an error
    """Everything that the backward pass needs has been recomputed."""


class _Place:
    """A placeholder that autograd keeps instead of a tensor; it dies with the operator that saved it."""


class _Recomputation:
    # One call of a function whose tensors are computed again when the backward pass asks for the first of them.

    def __init__(self, again: Callable[[], Any]) -> None:
        self._again = again
        self._places: list[ref[_Place]] = []
        self._tensors: WeakKeyDictionary[_Place, Tensor] = WeakKeyDictionary()
        self._done = False

    def drop(self, _tensor: Tensor) -> _Place:
        place = _Place()
        self._places.append(ref(place))
        return place

    def restore(self, place: _Place) -> Tensor:
        if not self._done:
            self._done = True
            saved = 0

            def keep(tensor: Tensor) -> Tensor:
                nonlocal saved
                tensor = tensor.detach()
                if (kept := self._places[saved]()) is not None:
                    self._tensors[kept] = tensor
                saved += 1
                if saved == len(self._places):
                    raise _Stop
                return tensor

            with contextlib.suppress(_Stop), saved_tensors_hooks(keep, lambda tensor: tensor), torch.enable_grad():
                self._again()
        return self._tensors.pop(place)


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that keeps nothing for its backward pass, which calls it again."""

    @wraps(function)
    def function_recomputed(*args: Any) -> Tensor:
        autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

        def again() -> None:
            with torch.autocast("cpu", *autocast):
                function(*args)

        recomputation = _Recomputation(again)
        with saved_tensors_hooks(recomputation.drop, recomputation.restore):
            return function(*args)

    return function_recomputed
