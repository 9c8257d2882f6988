"""The rotary embedding of queries and keys: LitGPT's functions, or a Triton kernel that computes the same at once.

Shape legend: B batch, T tokens, H query heads, G key/value heads, d head size, N rotated elements of a head.
"""

from typing import Any

import torch
from litgpt.model import apply_rope, apply_rope_interleave
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from litgpt_moe_ext.triton_launch import triton_works_on

# Cosines and sines, (1 or B, T, N). Where N is 1 they have two columns, where it is 0 one (see `rope.py`).
Tables = tuple[Tensor, Tensor]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rotate(x_BHTd: Tensor, tables: Tables, n_elem: int, interleave: bool) -> Tensor:
    """Rotate heads, by LitGPT's functions.

    Args:
        x_BHTd: Queries or keys.
        tables: Cosines and sines of the tokens.
        n_elem: Number of rotated elements of a head, N; the others stay as they are.
        interleave: Whether the pairs that rotate stand next to each other. In the result they do not.

    Returns:
        As `x_BHTd`, in its dtype.
    """
    if n_elem == 0:
        return x_BHTd
    rotated = (apply_rope_interleave if interleave else apply_rope)(x_BHTd[..., :n_elem], *tables)
    if n_elem == x_BHTd.size(-1):
        return rotated
    return torch.cat((rotated, x_BHTd[..., n_elem:]), dim=-1)


def rotate_both(q_BHTd: Tensor, k_BGTd: Tensor, tables: Tables, n_elem: int, interleave: bool) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, as `rotate` does, on a GPU in one launch.

    Args:
        q_BHTd: Queries.
        k_BGTd: Keys.
        tables: Cosines and sines of the tokens.
        n_elem: Number of rotated elements of a head.
        interleave: As in `rotate`.

    Returns:
        Both, in their dtypes. From the kernel they lie in memory as (B, T, H, d), which attention reads without a copy.
    """
    if n_elem > 0 and _has_kernel(q_BHTd, k_BGTd, tables, n_elem):
        return _Rotation.apply(q_BHTd, k_BGTd, *tables, interleave)
    return rotate(q_BHTd, tables, n_elem, interleave), rotate(k_BGTd, tables, n_elem, interleave)


def _has_kernel(q_BHTd: Tensor, k_BGTd: Tensor, tables: Tables, n_elem: int) -> bool:
    # A compiler fuses the operators itself. A mode that watches operators (selective activation checkpointing, the FLOP
    # counter, fake tensors) does not see a Triton kernel, and a subclass of tensors may have no memory to give it.
    cos, sin = tables
    return (
        not torch.compiler.is_compiling()
        and q_BHTd.is_cuda
        and type(q_BHTd) is Tensor
        and type(k_BGTd) is Tensor
        and q_BHTd.dtype == k_BGTd.dtype
        and q_BHTd.dtype in _DTYPES
        and _are_readable(cos, sin)
        and cos.device == q_BHTd.device
        and n_elem % 2 == 0
        and cos.shape in ((1, q_BHTd.size(2), n_elem), (q_BHTd.size(0), q_BHTd.size(2), n_elem))
        and not is_in_torch_dispatch_mode()
        and triton_works_on(q_BHTd.device)
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
        # As queries and keys lay in memory: what they were computed by reads its gradients without a copy.
        pairs = zip(gradients, ctx.are_contiguous, strict=True)
        turned = tuple(dx.new_empty(dx.shape) if is_contiguous else _empty(dx) for dx, is_contiguous in pairs)
        _kernels().rotate(gradients, turned, ctx.saved_tensors, ctx.interleave, backward=True)
        return *turned, None, None, None


def _empty(like_BHTd: Tensor) -> Tensor:
    B, H, T, d = like_BHTd.shape
    return like_BHTd.new_empty(B, T, H, d).transpose(1, 2)


def _kernels() -> Any:
    # Imports Triton.
    from litgpt_moe_ext.attention.kernels import rotation

    return rotation
