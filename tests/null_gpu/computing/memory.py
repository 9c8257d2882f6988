"""Tensors of the CPU in the memory of the GPU, which is the host's."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor of the CPU that is the same numbers in the same memory; one that is not on the GPU as it is."""
    if tensor.device.type != "cuda":
        return tensor
    storage = tensor.untyped_storage()
    shape = (tensor.size(), tensor.stride())
    if storage.nbytes() == 0:
        return torch.empty_strided(*shape, dtype=tensor.dtype, device="cpu")
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(flat, tensor.storage_offset(), *shape)


def each(function: Callable[[Any], Any], values: Any) -> Any:
    """Return `values`, in tuples and lists of any depth, after `function`."""
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*(each(function, value) for value in values))
    if isinstance(values, list | tuple):
        return type(values)(each(function, value) for value in values)
    return function(values)


def flat(values: Any) -> list[Any]:
    """Return them without tuples and lists."""
    return [one for value in values for one in flat(value)] if isinstance(values, list | tuple) else [values]
