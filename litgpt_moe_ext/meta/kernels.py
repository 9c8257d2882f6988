"""Meta kernels of operators for which torch has none in C++.

`litgpt_moe_ext.meta.registrations` says why torch's own in Python are not used. `tests/meta/test_kernels.py` compares
each kernel here with torch's; for operators that are not here, torch's are loaded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.meta.registrations import asking_again

_aten = torch.ops.aten


def _embedding(weight_VD: Tensor, index: Tensor, *_options: Any) -> Tensor:
    return weight_VD.new_empty((*index.shape, weight_VD.size(1)))


def _embedding_dense_backward(grad: Tensor, _index: Tensor, n_rows: int, *_options: Any) -> Tensor:
    return grad.new_empty((n_rows, grad.size(-1)))


def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    size = list(x.shape)
    size[dim] = index.numel()
    return x.new_empty(size)


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, _bias: Tensor | None, _eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    # On a CPU the statistics have the type of the weights.
    size, like = (*x.shape[: -len(shape)], *(1 for _ in shape)), x if weight is None else weight
    return x.new_empty(x.shape), like.new_empty(size), like.new_empty(size)


def _layer_norm_backward(
    dy: Tensor, x: Tensor, _shape: list[int], _mean: Tensor, _rstd: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    weight, bias, wanted = rest
    return tuple(
        None if like is None or not wants else like.new_empty(like.shape)
        for like, wants in zip((x, weight, bias), wanted, strict=True)
    )


def _attention(query_BHTd: Tensor, *_arguments: Any, **_options: Any) -> tuple[Tensor, Tensor]:
    B, H, T, _ = query_BHTd.shape
    dtype = torch.float64 if query_BHTd.dtype == torch.float64 else torch.float32
    return torch.empty_like(query_BHTd), query_BHTd.new_empty((B, T, H), dtype=dtype).transpose(1, 2)


def _attention_backward(_dy: Tensor, *arguments: Any, **_options: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_permuted(x.shape, (0, 2, 1, 3), dtype=x.dtype, device=x.device) for x in arguments[:3])


KERNELS: dict[Any, Callable[..., Any]] = {
    _aten.embedding.default: _embedding,
    _aten.embedding_dense_backward.default: _embedding_dense_backward,
    _aten.index_select.default: _index_select,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    _aten.dot.default: lambda x, _y: x.new_empty(()),
    # By operators that have a kernel and return the same.
    _aten.logsumexp.default: lambda x, dim, keepdim=False: _aten.mean.dim(x, dim, keepdim),
    _aten.relu.default: lambda x: _aten.clamp_min.default(x, 0),
    _aten.__rshift__.Scalar: lambda x, n: _aten.bitwise_right_shift.Tensor_Scalar(x, n),
    _aten.where.self: lambda condition, x, y: _aten.addcmul.default(condition, x, y),
    _aten._safe_softmax.default: lambda x, dim, dtype=None: _aten.softmax.int(x, dim, dtype),
    _aten.var.correction: lambda x, dim=None, correction=None, keepdim=False: _aten.mean.dim(x, dim, keepdim),
}
"""Overload of an operator to a function of its arguments that returns tensors of the right shape and type."""


def call(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of an overload of an operator for meta tensors."""
    return asking_again(KERNELS.get(operator, operator), *args, **kwargs)
