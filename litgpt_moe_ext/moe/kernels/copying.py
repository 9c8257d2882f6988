"""Many tensors copied into others of another dtype: weights cast for a pass, gradients cast back."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from litgpt_moe_ext.kernels.launch import operators_are_unwatched

# Torch's copy of a list gives each of its blocks 65,536 numbers, which take 15 us. With more than this it has blocks
# for every multiprocessor all the same.
_MOST_NUMBERS = 2**24
# Each has two addresses and a size, and the arguments of a kernel may be 4 KiB in all.
_MOST_TENSORS = 128


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each of `sources` into its target, of the same shape, in one launch or a few."""
    if _works_on(targets, sources):
        from litgpt_moe_ext.moe.kernels.triton import copying

        copying.copy_each(targets, sources)
    else:
        torch._foreach_copy_(list(targets), list(sources))


def _works_on(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    return (
        0 < len(targets) <= _MOST_TENSORS
        and operators_are_unwatched(targets[0])
        and sum(target.numel() for target in targets) <= _MOST_NUMBERS
        and all(_are_alike(tensors, targets[0].device) for tensors in (targets, sources))
    )


def _are_alike(tensors: Sequence[Tensor], device: torch.device) -> bool:
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype == tensors[0].dtype
        and tensor.device == device
        and tensor.is_contiguous()
        for tensor in tensors
    )
