"""Rows of token ids from a loader, which on a device keep a copy in host memory.

Decisions that depend on the values of a batch thus need not wait for the device. The copy is stored on the very tensor
that it copies, so batches cannot be mixed up.

Shape legend: B batch, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rows(Tensor):
    """Rows of token ids, integers, (B, T + 1), the last column a target only.

    A slice of columns from the first to before the last gives the inputs, an ordinary contiguous tensor with a host
    copy. All other results are ordinary tensors, except that copies and moves to a device stay rows.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what `func` returns for ordinary tensors, with the two exceptions of the class."""
        if func is Tensor.__getitem__ and (end := _end_of_inputs(*args)) is not None:
            rows, (some, _) = args
            return rows._inputs_with_copy(some, end)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            if func in _COPIES and isinstance(args[0], Rows):
                rows = args[0]
                return _remember(result.as_subclass(type(rows)), rows if rows.device.type == "cpu" else host_copy(rows))
            return result.as_subclass(Tensor) if isinstance(result, Rows) else result

    def inputs(self, rows: slice, end: int) -> Tensor:
        """Return the inputs of some rows, an ordinary tensor: the columns before `end`."""
        return self.as_subclass(Tensor)[rows, :end]

    def _inputs_with_copy(self, rows: slice, end: int) -> Tensor:
        source = host_copy(self)
        # LitGPT calls `contiguous`, which returns the same object only for a contiguous tensor.
        inputs_BT = self.inputs(rows, end).contiguous()
        return _remember(inputs_BT, source.inputs(rows, end) if isinstance(source, Rows) else None)


_COPIES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.pin_memory, Tensor.clone, Tensor.contiguous, Tensor.long}


def host_copy(ids: Tensor) -> Tensor | None:
    """Return the same ids in host memory; None if there is no copy, or `ids` was changed in place since."""
    copy, version = getattr(ids, "_host_copy", (None, 0))
    return copy if copy is not None and ids._version == version else None


def _remember(ids: Any, copy: Tensor | None) -> Any:
    if copy is not None and not ids.is_inference():  # torch does not track changes of inference tensors
        ids._host_copy = copy, ids._version
    return ids


def _end_of_inputs(rows: Any, index: Any) -> int | None:
    # The end of a slice of columns that gives the inputs, or None for another index.
    if not (isinstance(index, tuple) and len(index) == 2 and all(isinstance(part, slice) for part in index)):
        return None
    start, end, step = index[1].indices(rows.size(1))
    return end if (start, step) == (0, 1) and 0 < end < rows.size(1) else None
