"""Copies tensors into others of another dtype, all of them in one launch.

Shape legend: N numbers of a block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch
from litgpt_moe_ext.moe.kernels.triton.common import constexpr, of_program

_WARPS = 4


class _Form(NamedTuple):
    # Numbers of a block: 16 bytes of the wider dtype for each thread.
    numbers: int


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each of `sources` to its target; all are contiguous, and those of a list have one dtype."""
    widest = max(targets[0].itemsize, sources[0].itemsize)
    form = _Form(_WARPS * 32 * 16 // widest)
    sizes = tuple(source.numel() for source in sources)
    grid = (len(sizes), ceil_div(max(sizes), form.numbers))
    torch.autograd.graph.increment_version(targets)
    launch(_copy, grid, (tuple(targets), tuple(sources), sizes, form), _WARPS)


@triton.jit
def _copy(targets, sources, sizes, FORM: constexpr):
    target, source, size = of_program(targets), of_program(sources), of_program(sizes)
    first = tl.program_id(1) * FORM.numbers
    # Most programs of the smaller tensors have nothing to do.
    if first < size:
        n_N = first + tl.arange(0, FORM.numbers)
        x_N = tl.load(source + n_N, mask=n_N < size, other=0)
        tl.store(target + n_N, x_N.to(target.dtype.element_ty), mask=n_N < size)
