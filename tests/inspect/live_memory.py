"""Following the tensors that are alive while a model runs, by their storages."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """Follow the storages that operators return, while it is entered.

    Attributes:
        peak: Most bytes that were alive after any operator since the last `reset`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes: dict[int, int] = {}
        self._references: dict[int, StorageWeakRef] = {}
        # Bytes including those that have died since `live` last looked.
        self._seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "litgpt_moe_ext":
            with self:  # what an operator of the package allocates within, too
                result = func._op_dk(torch._C.DispatchKey.CPU, *args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        if self._seen > self.peak:  # `live` takes a while
            self.peak = max(self.peak, self.live)
        return result

    @property
    def live(self) -> int:
        """Return the bytes that are alive now."""
        for key in [key for key, reference in self._references.items() if reference.expired()]:
            del self._references[key]
            self._seen -= self._bytes.pop(key)
        return self._seen

    def reset(self) -> None:
        """Start looking for a new peak."""
        self.peak = self.live

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._references:  # an address with a reference to it is not used again
            self._references[key] = StorageWeakRef(storage)
            self._bytes[key] = storage.nbytes()
            self._seen += self._bytes[key]
