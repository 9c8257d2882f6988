"""Cross-entropy of logits in Triton, and their gradients.

A program reads a row of logits in blocks. For each part of a block it keeps the largest logit so far, and the sum of
exponentials relative to it. Another program adds up the rows, always in the same order. Arithmetic is float32.

Shape legend: T tokens, V vocabulary, C columns of a block, P its parts, N columns of a part, R rows of a block.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch, power_of_two
from litgpt_moe_ext.tokens.padding import PADDING

if TYPE_CHECKING:
    # To a type checker a constant of a kernel is whatever it was called with.
    constexpr = Any
else:
    from triton.language import constexpr

_IGNORED = tl.constexpr(PADDING)
# Most columns of a block, and columns per thread: 32 bytes of 16-bit logits.
_COLUMNS, _OF_A_THREAD = 4096, 16
# Rows that are added up at once, and the warps that do it.
_BLOCK, _WARPS = tl.constexpr(4096), 8


class _Logits(NamedTuple):
    data: Any
    stride: Any
    width: Any


class _Form(NamedTuple):
    # Columns of a block, and of its parts.
    columns: int
    part: int


def mean_loss(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean loss of the counted targets, and what its gradient needs, in two launches.

    Args:
        logits_TV: Logits, 16-bit or float32, the elements of a row contiguous.
        targets_T: Token ids, int64, contiguous; -100 is not counted.

    Returns:
        The mean, a scalar, 0 without counted targets; the logarithm of each row's sum of exponentials, (T,); and one
        over the number of counted targets, a scalar. All float32.
    """
    losses_T, normalizers_T = row_losses(logits_TV, targets_T)
    mean, share = losses_T.new_empty(()), losses_T.new_empty(())
    launch(_add_up, (1,), (losses_T, targets_T, mean, share, len(losses_T)), _WARPS)
    return mean, normalizers_T, share


def row_losses(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each row and the log of its sum of exponentials, (T,), float32; both 0 if it is not counted.

    Args:
        logits_TV: As above.
        targets_T: As above.
    """
    losses_T = torch.empty(len(logits_TV), dtype=torch.float32, device=logits_TV.device)
    normalizers_T = torch.empty_like(losses_T)
    form = _form(logits_TV.size(1))
    arguments = (_logits(logits_TV), targets_T, losses_T, normalizers_T, form)
    launch(_lose, (len(logits_TV),), arguments, _warps(form))
    return losses_T, normalizers_T


def gradients(
    logits_TV: Tensor, targets_T: Tensor, normalizers_T: Tensor, factors: tuple[Tensor, Tensor], out_TV: Tensor
) -> None:
    """Write the gradients of logits: (probabilities - targets) times both factors; 0 for rows that are not counted.

    Args:
        logits_TV: As above.
        targets_T: As above.
        normalizers_T: The second result of `row_losses`.
        factors: Two scalars, such as the gradient of the mean and one over the number of targets.
        out_TV: Where to write, 16-bit or float32, the elements of a row contiguous; may be `logits_TV`.
    """
    form = _form(logits_TV.size(1))
    n_block = ceil_div(logits_TV.size(1), form.columns)
    arguments = (_logits(logits_TV), targets_T, normalizers_T, factors, _logits(out_TV), form)
    launch(_differentiate, (len(logits_TV) * n_block,), arguments, _warps(form))


def _logits(x_TV: Tensor) -> _Logits:
    return _Logits(x_TV, x_TV.stride(0), x_TV.size(1))


@functools.cache
def _form(width: int) -> _Form:
    return _Form(min(max(power_of_two(width), 32 * _OF_A_THREAD), _COLUMNS), _OF_A_THREAD)


def _warps(form: _Form) -> int:
    return form.columns // (32 * _OF_A_THREAD)


@triton.jit
def _lose(logits, targets, losses, normalizers, FORM: constexpr):
    row = tl.program_id(0)
    target = tl.load(targets + row)
    loss, normalizer = 0.0, 0.0
    if target != _IGNORED:
        x = logits.data + row.to(tl.int64) * logits.stride
        # Each part of a block has a sum of its own, so that no thread waits for others before the end.
        at_PN = tl.arange(0, FORM.columns // FORM.part)[:, None] * FORM.part + tl.arange(0, FORM.part)[None, :]
        largest_P = tl.full((FORM.columns // FORM.part,), float("-inf"), tl.float32)
        total_P = tl.full((FORM.columns // FORM.part,), 0.0, tl.float32)
        for first in range(0, logits.width, FORM.columns):
            x_PN = tl.load(x + first + at_PN, mask=first + at_PN < logits.width, other=float("-inf")).to(tl.float32)
            larger_P = tl.maximum(largest_P, tl.max(x_PN, 1))
            # If all logits are -inf, subtracting it would give NaN.
            below_P = tl.where(larger_P == float("-inf"), 0.0, larger_P)
            total_P = total_P * tl.exp(largest_P - below_P) + tl.sum(tl.exp(x_PN - below_P[:, None]), 1)
            largest_P = larger_P
        largest = tl.max(largest_P, 0)
        normalizer = largest + tl.log(tl.sum(total_P * tl.exp(largest_P - largest), 0))
        among = (target >= 0) & (target < logits.width)
        loss = normalizer - tl.load(x + target, mask=among, other=float("nan")).to(tl.float32)
    tl.store(losses + row, loss)
    tl.store(normalizers + row, normalizer)


@triton.jit(do_not_specialize=["T"])
def _add_up(losses, targets, mean, share, T):
    total_R = tl.full((_BLOCK,), 0.0, tl.float32)
    count_R = tl.full((_BLOCK,), 0, tl.int32)
    for first in range(0, T, _BLOCK):
        row_R = first + tl.arange(0, _BLOCK)
        total_R += tl.load(losses + row_R, mask=row_R < T, other=0.0)
        count_R += (tl.load(targets + row_R, mask=row_R < T, other=_IGNORED) != _IGNORED).to(tl.int32)
    one_of = 1.0 / tl.maximum(tl.sum(count_R, 0), 1).to(tl.float32)
    tl.store(mean, tl.sum(total_R, 0) * one_of)
    tl.store(share, one_of)


@triton.jit
def _differentiate(logits, targets, normalizers, factors, out, FORM: constexpr):
    n_block = tl.cdiv(logits.width, FORM.columns)
    row, block = tl.program_id(0) // n_block, tl.program_id(0) % n_block
    target = tl.load(targets + row)
    column_C = block * FORM.columns + tl.arange(0, FORM.columns)
    inside_C = column_C < logits.width
    gradient_C = tl.full((FORM.columns,), 0.0, tl.float32)
    if target != _IGNORED:
        x_C = tl.load(logits.data + row.to(tl.int64) * logits.stride + column_C, mask=inside_C, other=0.0)
        share_C = tl.exp(x_C.to(tl.float32) - tl.load(normalizers + row))
        factor = tl.load(factors[0]).to(tl.float32) * tl.load(factors[1]).to(tl.float32)
        gradient_C = (share_C - (column_C == target).to(tl.float32)) * factor
    to_C = out.data + row.to(tl.int64) * out.stride + column_C
    tl.store(to_C, gradient_C.to(out.data.dtype.element_ty), mask=inside_C)
