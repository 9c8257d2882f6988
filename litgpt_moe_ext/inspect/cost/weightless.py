"""Tensors that have a device, but no memory.

A `Weightless` tensor wraps a meta tensor and says that it lies on the CPU, so that autograd, autocast and whoever asks
for the device behave as in a real run.

torch's fake tensors do this as well, but they load torch's compiler and check much that describing a model does not
need. `tests/inspect/test_weightless.py` holds the two against each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.inspect.cost.live_memory import LiveMemory
from litgpt_moe_ext.meta.models import uninitialized
from litgpt_moe_ext.meta.operators import META, Operators

_OPERATORS = Operators()


class Weightless(Tensor):
    """A tensor without memory; `WeightlessMemory`, which must be entered, carries out operators on it.

    Attributes:
        meta: The meta tensor of the same shape.
    """

    meta: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override] as torch documents it

    @staticmethod
    def __new__(cls, meta: Tensor) -> "Weightless":
        """Return a tensor that wraps `meta`."""
        tensor = Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            layout=meta.layout,
            device=torch.device("cpu"),
        )
        tensor.meta = meta
        return tensor

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override] as torch calls it
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Refuse: outside the mode nothing knows what to return."""
        raise RuntimeError(f"{func} was called on a tensor without memory")


class WeightlessMemory(LiveMemory):
    """Carry out operators without memory while it is entered, and follow what would be alive."""

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        wrappers: dict[int, Tensor] = {}
        args, kwargs = _unwrap(args, wrappers), _unwrap(kwargs, wrappers)
        if kwargs.get("device") is not None:
            kwargs["device"] = META
        return _wrap(_OPERATORS(func, args, kwargs), wrappers)

    def _storage(self, tensor: Tensor) -> torch.UntypedStorage:
        return tensor.meta.untyped_storage() if isinstance(tensor, Weightless) else tensor.untyped_storage()


@contextmanager
def weightless() -> Iterator[WeightlessMemory]:
    """Make tensors without memory, and follow what would be alive."""
    with uninitialized(), WeightlessMemory() as memory:
        yield memory


def _unwrap(value: Any, wrappers: dict[int, Tensor]) -> Any:
    if isinstance(value, Weightless):
        wrappers[id(value.meta)] = value
        return value.meta
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, (tuple, list)):
        return type(value)([_unwrap(item, wrappers) for item in value])
    if isinstance(value, dict):
        return {name: _unwrap(item, wrappers) for name, item in value.items()}
    return value


def _wrap(value: Any, wrappers: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # An operator that changes a tensor returns it.
        known = wrappers.get(id(value))
        return Weightless(value) if known is None else known
    return type(value)([_wrap(item, wrappers) for item in value]) if isinstance(value, (tuple, list)) else value
