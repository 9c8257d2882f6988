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
from litgpt_moe_ext.meta.operators import OPERATORS, New, View

_CPU = torch.device("cpu")


class Weightless(Tensor):
    """A tensor without memory; `WeightlessMemory`, which must be entered, carries out operators on it.

    Attributes:
        memory: What it would lie in, shared with its views.
    """

    memory: "_Memory"
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyrefly: ignore[bad-override] as torch documents it

    @staticmethod
    def __new__(cls, note: New | View, memory: "_Memory") -> "Weightless":
        """Return a tensor of the kind that is noted."""
        offset = note.offset if isinstance(note, View) else 0
        tensor = Tensor._make_wrapper_subclass(
            cls, note.size, strides=note.stride, storage_offset=offset, dtype=note.dtype, device=_CPU
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
        result = OPERATORS(func, args, kwargs or {}, self._make)
        self.peak = max(self.peak, self.live)
        return result

    def reset(self) -> None:
        """Start looking for a new peak."""
        self.peak = self.live

    def _make(self, note: New | View, base: Tensor | None) -> Tensor:
        if isinstance(note, New):
            return Weightless(note, _Memory(self, note.n_bytes))
        assert base is not None, "a view has a base"
        # What has memory is a constant that somebody made of numbers.
        known = isinstance(base, Weightless)
        return Weightless(note, base.memory if known else _Memory(self, base.untyped_storage().nbytes()))


@contextmanager
def weightless() -> Iterator[WeightlessMemory]:
    """Make tensors without memory, and follow what would be alive."""
    with without_compiler(), WeightlessMemory() as memory:
        yield memory
