"""The sum of routed and (optionally gated) shared experts, in one launch each way; arithmetic is float32.

Shape legend: T tokens, D model width, M a block of T, N a block of D.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litgpt_moe_ext.kernels.launch import ceil_div, launch
from litgpt_moe_ext.moe.kernels.triton.common import block_of, constexpr


class _Shared(NamedTuple):
    y: Any
    logits: Any
    real: Any
    n_token: Any
    width: Any


class _Gradients(NamedTuple):
    routed: Any
    shared: Any
    logits: Any


def add_gated(routed_TD: Tensor, shared_TD: Tensor, logits_T1: Tensor | None, real_T: Tensor | None) -> Tensor:
    """Return `routed + shared * sigmoid(logits)`, (T, D) in the dtype of `routed_TD`; 0 for padding.

    Args:
        routed_TD: Output of the routed experts, contiguous.
        shared_TD: Output of the shared experts, contiguous.
        logits_T1: Logits of their gate, contiguous; None without a gate.
        real_T: Which tokens are not padding, bool, contiguous; None if all.
    """
    sum_TD, block = torch.empty_like(routed_TD), block_of(routed_TD.size(1))
    shared = _Shared(shared_TD, logits_T1, real_T, *routed_TD.shape)
    grid = (ceil_div(shared.n_token, block[0]), ceil_div(shared.width, block[1]))
    launch(_add_gated, grid, (shared, routed_TD, sum_TD, block), warps=4)
    return sum_TD


def add_gated_backward(
    dsum_TD: Tensor, shared_TD: Tensor, logits_T1: Tensor | None, real_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `routed_TD`, `shared_TD` and `logits_T1`.

    The first is empty where it equals another tensor: `dsum_TD` without padding, the second result without a gate.

    Args:
        dsum_TD: Gradient of the sum, contiguous.
        shared_TD: As above.
        logits_T1: As above.
        real_T: As above.
    """
    drouted_TD = dsum_TD.new_empty(0) if real_T is None or logits_T1 is None else torch.empty_like(dsum_TD)
    dlogits_T1 = dsum_TD.new_empty(0) if logits_T1 is None else torch.empty_like(logits_T1)
    gradients = _Gradients(drouted_TD, torch.empty_like(shared_TD), dlogits_T1)
    block, shared = block_of(dsum_TD.size(1)), _Shared(shared_TD, logits_T1, real_T, *dsum_TD.shape)
    launch(_add_gated_backward, (ceil_div(shared.n_token, block[0]),), (shared, dsum_TD, gradients, block), warps=4)
    return gradients


@triton.jit
def _tokens(shared, BLOCK: constexpr):
    # The tokens of the program, which of them exist, which are not padding, and their gate values.
    token_M = (tl.program_id(0) * BLOCK[0] + tl.arange(0, BLOCK[0])).to(tl.int64)
    live_M = token_M < shared.n_token
    if shared.logits is None:
        gate_M = tl.full((BLOCK[0],), 1.0, tl.float32)
    else:
        gate_M = tl.sigmoid(tl.load(shared.logits + token_M, mask=live_M, other=0.0).to(tl.float32))
    if shared.real is None:
        return token_M, live_M, live_M, gate_M
    else:
        return token_M, live_M, live_M & (tl.load(shared.real + token_M, mask=live_M, other=0) != 0), gate_M


@triton.jit
def _add_gated(shared, routed, out, BLOCK: constexpr):
    token_M, live_M, text_M, gate_M = _tokens(shared, BLOCK)
    d_N = tl.program_id(1) * BLOCK[1] + tl.arange(0, BLOCK[1])
    at_MN = token_M[:, None] * shared.width + d_N[None, :]
    width_N = (d_N < shared.width)[None, :]
    text_MN = text_M[:, None] & width_N
    sum_MN = tl.load(routed + at_MN, mask=text_MN, other=0.0).to(tl.float32)
    sum_MN += tl.load(shared.y + at_MN, mask=text_MN, other=0.0).to(tl.float32) * gate_M[:, None]
    # Padding was not read, but its gate may be NaN.
    tl.store(out + at_MN, tl.where(text_MN, sum_MN, 0.0).to(out.dtype.element_ty), mask=live_M[:, None] & width_N)


@triton.jit
def _add_gated_backward(shared, dsum, gradients, BLOCK: constexpr):
    token_M, live_M, text_M, gate_M = _tokens(shared, BLOCK)
    dot_MN = tl.full((BLOCK[0], BLOCK[1]), 0.0, tl.float32)
    for start in range(0, shared.width, BLOCK[1]):
        d_N = start + tl.arange(0, BLOCK[1])
        at_MN = token_M[:, None] * shared.width + d_N[None, :]
        width_N = (d_N < shared.width)[None, :]
        text_MN, live_MN = text_M[:, None] & width_N, live_M[:, None] & width_N
        dsum_MN = tl.load(dsum + at_MN, mask=text_MN, other=0.0).to(tl.float32)
        if shared.logits is not None:
            dot_MN += dsum_MN * tl.load(shared.y + at_MN, mask=text_MN, other=0.0).to(tl.float32)
        dshared_MN = tl.where(text_MN, dsum_MN * gate_M[:, None], 0.0)
        tl.store(gradients.shared + at_MN, dshared_MN.to(gradients.shared.dtype.element_ty), mask=live_MN)
        if shared.real is not None and shared.logits is not None:
            tl.store(gradients.routed + at_MN, dsum_MN.to(gradients.routed.dtype.element_ty), mask=live_MN)
    if shared.logits is not None:
        dlogits_M = tl.where(text_M, tl.sum(dot_MN, 1) * gate_M * (1.0 - gate_M), 0.0)
        tl.store(gradients.logits + token_M, dlogits_M.to(gradients.logits.dtype.element_ty), mask=live_M)
