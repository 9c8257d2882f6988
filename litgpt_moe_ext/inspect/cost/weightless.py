"""Tensors that have a device, but no memory, and how much memory they would take.

A `Weightless` tensor has a shape and says that it lies on the CPU, so that autograd, autocast and whoever asks for the
device behave as in a real run.

torch's fake tensors do this as well, but they load torch's compiler and check much that describing a model does not
need. `tests/inspect/test_weightless.py` holds the two against each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt_moe_ext.host.without_compiler import without_compiler
from litgpt_moe_ext.meta.kernels import call
from litgpt_moe_ext.meta.models import META

_CPU = torch.device("cpu")


class Weightless(Tensor):
    """A tensor without memory; `WeightlessMemory`, which must be entered, carries out operators on it.

    Attributes:
        memory: What it would lie in, shared with its views.
    """

    memory: "_Memory"
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override] as torch documents it

    @staticmethod
    def __new__(cls, like: Tensor, memory: "_Memory") -> "Weightless":
        """Return a tensor like one on the meta device."""
        tensor = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=_CPU,
        )
        tensor.memory = memory
        return tensor

    @classmethod
    def __torch_dispatch__(  # pyrefly: ignore[bad-override] as torch calls it
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Refuse: outside the mode nothing knows what to return."""
        raise RuntimeError(f"{func} was called on a tensor without memory")


class _Memory:
    """Memory that counts as alive for as long as a tensor refers to it."""

    def __init__(self, owner: "WeightlessMemory", n_bytes: int) -> None:
        self._owner, self._bytes = owner, n_bytes
        owner.live += n_bytes

    def __del__(self) -> None:
        self._owner.live -= self._bytes


class WeightlessMemory(TorchDispatchMode):
    """Carry out operators without memory while it is entered, and follow what would be alive.

    Attributes:
        live: Bytes that are alive now.
        peak: Most bytes that were alive after any operator since the last `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # What compiled code would do with this mode does not matter, and asking torch's compiler to keep out loads it.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given: list[tuple[Tensor, Tensor]] = []
        result = call(func, *_on_meta(args, given), **_on_meta(kwargs or {}, given))
        made = self._weightless(result, given)
        self.peak = max(self.peak, self.live)
        return made

    def reset(self) -> None:
        """Start looking for a new peak."""
        self.peak = self.live

    def _weightless(self, result: Any, given: list[tuple[Tensor, Tensor]]) -> Any:
        if isinstance(result, (tuple, list)):
            return type(result)([self._weightless(item, given) for item in result])
        if not isinstance(result, Tensor):
            return result
        storage = result.untyped_storage()
        for argument, on_meta in given:
            # Others are constants that somebody made of numbers.
            if isinstance(argument, Weightless) and storage._cdata == on_meta.untyped_storage()._cdata:
                # An operator that changes a tensor returns it.
                return argument if result is on_meta else Weightless(result, argument.memory)
        return Weightless(result, _Memory(self, storage.nbytes()))


def _on_meta(value: Any, given: list[tuple[Tensor, Tensor]]) -> Any:
    """Return arguments on the meta device; `given` gets each tensor among them, and what stands for it."""
    if isinstance(value, Tensor):
        storage = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8, device=META).untyped_storage()
        tensor = torch.empty(0, dtype=value.dtype, device=META)
        tensor.set_(storage, value.storage_offset(), value.shape, value.stride())
        given.append((value, tensor))
        return tensor
    if isinstance(value, (tuple, list)):
        return type(value)([_on_meta(item, given) for item in value])
    if isinstance(value, dict):
        return {name: _on_meta(item, given) for name, item in value.items()}
    return META if isinstance(value, torch.device) else value


@contextmanager
def weightless() -> Iterator[WeightlessMemory]:
    """Make tensors without memory, and follow what would be alive."""
    with without_compiler(), WeightlessMemory() as memory:
        yield memory
