"""The results of operators on tensors that have a shape and no memory."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.meta.kernels import KERNELS
from litgpt_moe_ext.meta.registrations import asking_again

META = torch.device("meta")


class New(NamedTuple):
    """A result of an operator in memory of its own.

    Attributes:
        size: Its shape.
        stride: Its strides.
        dtype: Its type.
        n_bytes: Size of the memory.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    n_bytes: int


class View(NamedTuple):
    """A result of an operator in the memory of its first argument.

    Attributes:
        size: Its shape.
        stride: Its strides.
        dtype: Its type.
        offset: Where it begins, in elements.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int


Make = Callable[[New | View, Tensor | None], Tensor]
"""Makes a tensor; for a view, from the first argument of the operator."""


class Operators:
    """Runs operators on tensors without memory; asks torch for their results once for each kind of input.

    Asking torch takes longer than remembering, especially if it computes shapes in Python.
    """

    def __init__(self) -> None:
        self._kinds: dict[Any, str] = {}
        self._results: dict[Any, Any] = {}

    def __call__(self, func: Any, args: tuple, kwargs: dict[str, Any], make: Make) -> Any:
        """Return the result of an operator.

        Args:
            func: An overload of an operator of torch.
            args: Its arguments.
            kwargs: Its named arguments.
            make: Makes the tensors that it returns.
        """
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind_of(func._schema)
        if kind == "changes":
            return args[0]
        if kind == "other":
            return _carry_out(func, args, kwargs, make)
        base = args[0] if args and isinstance(args[0], Tensor) else None
        offset = None if base is None else base.storage_offset()
        key = (func, _describe(args), _describe(kwargs), offset, torch.get_default_dtype())
        if key not in self._results:
            given: dict[int, Tensor] = {}
            args, kwargs = _on_meta(args, given), _on_meta(kwargs, given)
            result = asking_again(KERNELS.get(func, func), *args, **kwargs)
            self._results[key] = _note(result, None if base is None else args[0])
        return _build(self._results[key], base, make)


OPERATORS = Operators()


def make_on_meta(note: New | View, base: Tensor | None) -> Tensor:
    """Make a tensor on torch's meta device."""
    # A base with memory is a constant created from numbers.
    if isinstance(note, New) or base is None or not base.is_meta:
        return torch.empty_strided(note.size, note.stride, dtype=note.dtype, device=META)
    view = torch.empty(0, dtype=note.dtype, device=META)
    return view.set_(base.untyped_storage(), note.offset, note.size, note.stride)


# Operators that change the shape of their argument in place.
_RESHAPING = ("aten::resize_", "aten::set_", "aten::squeeze_", "aten::t_", "aten::transpose_", "aten::unsqueeze_")


def _kind_of(schema: Any) -> str:
    """Return whether an operator `returns` new tensors or views, `changes` its first argument, or else is `other`."""
    arguments, returns = list(schema.arguments), list(schema.returns)
    shared = [value.alias_info for value in (*arguments, *returns) if value.alias_info is not None]
    if schema.name.startswith("profiler::"):
        return "other"
    if not any(info.is_write for info in shared):
        return "returns"
    first, *others = arguments
    if first.alias_info is None or any(argument.alias_info is not None for argument in others):
        return "other"
    return "changes" if len(returns) == 1 and schema.name not in _RESHAPING else "other"


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_describe(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _describe(item)) for name, item in value.items()])
    # 1 and 1.0 give results of different types.
    return type(value), value


def _carry_out(func: Any, args: tuple, kwargs: dict[str, Any], make: Make) -> Any:
    given: dict[int, Tensor] = {}
    result = asking_again(func, *_on_meta(args, given), **_on_meta(kwargs, given))
    # An operator that changes a tensor returns it.
    known = given.get(id(result))
    return _build(_note(result, None), None, make) if known is None else known


def _on_meta(value: Any, given: dict[int, Tensor]) -> Any:
    """Return arguments on the meta device; `given` gets the tensor that each of them stands for, by its identity."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return value
        storage = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8, device=META).untyped_storage()
        tensor = torch.empty(0, dtype=value.dtype, device=META)
        tensor.set_(storage, value.storage_offset(), value.shape, value.stride())
        given[id(tensor)] = value
        return tensor
    if isinstance(value, (tuple, list)):
        return type(value)([_on_meta(item, given) for item in value])
    if isinstance(value, dict):
        return {name: _on_meta(item, given) for name, item in value.items()}
    return META if isinstance(value, torch.device) else value


def _note(value: Any, base: Tensor | None) -> Any:
    if isinstance(value, Tensor):
        size, stride = tuple(value.shape), value.stride()
        # Some operators return views without saying so.
        if base is not None and value.untyped_storage()._cdata == base.untyped_storage()._cdata:
            return View(size, stride, value.dtype, int(value.storage_offset()))
        return New(size, stride, value.dtype, _extent(size, stride) * value.itemsize)
    return type(value)([_note(item, base) for item in value]) if isinstance(value, (tuple, list)) else value


def _extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    # Elements from the first to the last one, both included.
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _build(note: Any, base: Tensor | None, make: Make) -> Any:
    if isinstance(note, (New, View)):
        return make(note, base)
    return type(note)([_build(item, base, make) for item in note]) if isinstance(note, (tuple, list)) else note
