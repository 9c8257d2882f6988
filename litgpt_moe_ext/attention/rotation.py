"""The rotary embedding of queries and keys: LitGPT's functions, or a Triton kernel that does the same in one launch.

Shape legend: B batch, T tokens, H query heads, G key/value heads, d head size, N rotated elements of a head,
W width of the projection to queries, keys and values.
"""

from typing import Any, NamedTuple

import torch
from litgpt.model import apply_rope, apply_rope_interleave
from torch import Tensor
from torch.autograd.function import once_differentiable

from litgpt_moe_ext.kernels.launch import operators_are_unwatched

# Cosines and sines, (1 or B, T, N); two columns if N is 1, one if it is 0 (see `rope.py`).
Tables = tuple[Tensor, Tensor]
# Numbers of heads, of queries and of keys and values: H, G.
Heads = tuple[int, int]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Rotary(NamedTuple):
    """How heads rotate.

    Attributes:
        tables: Cosines and sines of the tokens.
        n_elem: Number of rotated elements of a head, N; the others are unchanged.
        interleave: Whether the elements of a pair are adjacent. In the result they are not.
    """

    tables: Tables
    n_elem: int
    interleave: bool


def rotate(x_BHTd: Tensor, rotary: Rotary) -> Tensor:
    """Rotate queries or keys by LitGPT's functions, keeping their dtype."""
    tables, n_elem, interleave = rotary
    if n_elem == 0:
        return x_BHTd
    rotated = (apply_rope_interleave if interleave else apply_rope)(x_BHTd[..., :n_elem], *tables)
    if n_elem == x_BHTd.size(-1):
        return rotated
    return torch.cat((rotated, x_BHTd[..., n_elem:]), dim=-1)


def rotate_both(q_BHTd: Tensor, k_BGTd: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, as `rotate` does, on a GPU in one launch.

    Args:
        q_BHTd: Queries.
        k_BGTd: Keys.
        rotary: How they rotate.

    Returns:
        Both, in their dtypes. The kernel's memory layout is (B, T, H, d), which attention reads without a copy.
    """
    if _has_kernel((q_BHTd, k_BGTd), q_BHTd.size(2), rotary):
        return _Rotation.apply(q_BHTd, k_BGTd, *rotary.tables, rotary.interleave)
    return rotate(q_BHTd, rotary), rotate(k_BGTd, rotary)


def rotate_projection(qkv_BTW: Tensor, heads: Heads, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor] | None:
    """Split a projection into queries, keys and values and rotate the first two, on a GPU in one launch each way.

    Args:
        qkv_BTW: The projection: the heads of queries, of keys and of values, W = (H + 2 G) d.
        heads: H and G.
        rotary: How queries and keys rotate.

    Returns:
        Queries, keys and values, the last a view of `qkv_BTW`; None if the kernel cannot do it.
    """
    if not _has_kernel((qkv_BTW,), qkv_BTW.size(1), rotary):
        return None
    return _ProjectionRotation.apply(qkv_BTW, heads, *rotary.tables, rotary.interleave)


def _has_kernel(tensors: tuple[Tensor, ...], n_token: int, rotary: Rotary) -> bool:
    x, (cos, sin), n_elem = tensors[0], rotary.tables, rotary.n_elem
    return (
        operators_are_unwatched(x)
        and x.dtype in _DTYPES
        and all(type(other) is Tensor and other.dtype == x.dtype for other in tensors)
        and _are_readable(cos, sin)
        and cos.device == x.device
        and n_elem > 0
        and n_elem % 2 == 0
        and cos.shape in ((1, n_token, n_elem), (x.size(0), n_token, n_elem))
    )


def _are_readable(cos: Tensor, sin: Tensor) -> bool:
    return (
        cos.dtype in _DTYPES
        and cos.dtype == sin.dtype
        and cos.shape == sin.shape
        and cos.stride() == sin.stride()
        and not (cos.requires_grad or sin.requires_grad)
    )


class _Rotation(torch.autograd.Function):
    """Rotates queries and keys; the gradient is the rotation back."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTd: Tensor, k_BGTd: Tensor, cos: Tensor, sin: Tensor, interleave: bool
    ) -> tuple[Tensor, Tensor]:
        """Return rotated queries and keys."""
        ctx.save_for_backward(cos, sin)
        ctx.interleave = interleave
        ctx.are_contiguous = q_BHTd.is_contiguous(), k_BGTd.is_contiguous()
        rotated = _empty(q_BHTd), _empty(k_BGTd)
        _kernels().rotate((q_BHTd, k_BGTd), rotated, (cos, sin), interleave)
        return rotated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Return the gradients of the arguments of `forward`."""
        # In the memory layout of queries and keys, so that the operator before them reads the gradients without a copy.
        pairs = zip(gradients, ctx.are_contiguous, strict=True)
        turned = tuple(dx.new_empty(dx.shape) if is_contiguous else _empty(dx) for dx, is_contiguous in pairs)
        _kernels().rotate(gradients, turned, ctx.saved_tensors, ctx.interleave, backward=True)
        return *turned, None, None, None


class _ProjectionRotation(torch.autograd.Function):
    """Rotates queries and keys of a projection; the gradients are written side by side as they were."""

    @staticmethod
    def forward(
        ctx: Any, qkv_BTW: Tensor, heads: Heads, cos: Tensor, sin: Tensor, interleave: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values."""
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.interleave = heads, interleave
        q_BHTd, k_BGTd, v_BGTd = _split(qkv_BTW, heads)
        rotated = _empty(q_BHTd), _empty(k_BGTd)
        _kernels().rotate((q_BHTd, k_BGTd), rotated, (cos, sin), interleave)
        return *rotated, v_BGTd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Return the gradients of the arguments of `forward`."""
        B, _, T, d = gradients[0].shape
        n_head, n_group = ctx.heads
        dqkv_BTW = gradients[0].new_empty(B, T, (n_head + 2 * n_group) * d)
        _kernels().rotate(gradients, _split(dqkv_BTW, ctx.heads), ctx.saved_tensors, ctx.interleave, backward=True)
        return dqkv_BTW, None, None, None, None


def _split(qkv_BTW: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    n_head, n_group = heads
    return qkv_BTW.unflatten(-1, (n_head + 2 * n_group, -1)).transpose(1, 2).split((n_head, n_group, n_group), dim=1)


def _empty(like_BHTd: Tensor) -> Tensor:
    B, H, T, d = like_BHTd.shape
    return like_BHTd.new_empty(B, T, H, d).transpose(1, 2)


def _kernels() -> Any:
    # Imports Triton.
    from litgpt_moe_ext.attention.kernels import rotation

    return rotation
