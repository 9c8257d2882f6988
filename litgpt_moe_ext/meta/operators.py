"""What operators return for meta tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from litgpt_moe_ext.meta.kernels import KERNELS
from litgpt_moe_ext.meta.registrations import asking_again

META = torch.device("meta")


class _New(NamedTuple):
    # A tensor that an operator returns, in memory of its own.
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _View(NamedTuple):
    # A tensor that an operator returns, in the memory of its first argument.
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Operators:
    """Carry out operators on meta tensors; what they return is asked of torch once for each kind of input.

    torch computes most shapes in Python, which takes longer than a small operator itself.
    """

    def __init__(self) -> None:
        self._kinds: dict[Any, str] = {}
        self._results: dict[Any, Any] = {}

    def __call__(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return what an operator returns.

        Args:
            func: An overload of an operator of torch.
            args: Its arguments; every tensor is a meta tensor.
            kwargs: Its named arguments.
        """
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind_of(func._schema)
        if kind == "changes":
            return args[0]
        if kind == "other":
            return asking_again(func, *args, **kwargs)
        base = args[0] if args and isinstance(args[0], Tensor) else None
        offset = None if base is None else base.storage_offset()
        key = (func, _describe(args), _describe(kwargs), offset, torch.get_default_dtype())
        if key not in self._results:
            self._results[key] = _note(asking_again(KERNELS.get(func, func), *args, **kwargs), base)
        return _make(self._results[key], base)


# They change the shape of what they are given.
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
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_describe(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _describe(item)) for name, item in value.items()])
    # 1 and 1.0 make different types.
    return type(value), value


def _note(value: Any, base: Tensor | None) -> Any:
    if isinstance(value, Tensor):
        size, stride = tuple(value.shape), value.stride()
        # Some operators return views without saying so.
        if base is not None and value.untyped_storage()._cdata == base.untyped_storage()._cdata:
            return _View(size, stride, int(value.storage_offset()))
        return _New(size, stride, value.dtype)
    return type(value)([_note(item, base) for item in value]) if isinstance(value, (tuple, list)) else value


def _make(note: Any, base: Tensor | None) -> Any:
    if isinstance(note, _View):
        assert base is not None
        view = torch.empty(0, dtype=base.dtype, device=META)
        return view.set_(base.untyped_storage(), note.offset, note.size, note.stride)
    if isinstance(note, _New):
        return torch.empty_strided(note.size, note.stride, dtype=note.dtype, device=META)
    return type(note)([_make(item, base) for item in note]) if isinstance(note, (tuple, list)) else note
