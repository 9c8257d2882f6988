"""The routed experts on a CPU, eager: one expert after the other, with a backward pass written by hand.

What it saves over the plain loop of `litgpt_moe_ext.moe.experts`, in the order of what it is worth:
- Rows are gathered expert by expert into memory that stays in the cache, instead of all at once.
- The backward pass keeps the tokens, the first projection's output and the routing, and nothing else: it computes the
  activations again. Gate values are applied to the activations, so that their gradient is the row sum of a product
  that is at hand and no expert's output needs to be kept.
- The sums over a token's experts, of outputs and of input gradients, are `embedding_bag`, which reads each row once,
  writes each token once, and adds in float32 whatever the dtype.
- Gradients of weights are written where they belong in the stacked gradient.

Rows of one expert are padded to a multiple of `_padding`. oneDNN, which multiplies bfloat16 matrices, compiles code
for each new number of rows (half a millisecond), and under changing routing numbers without a common divisor never
repeat. The padding rows of an expert are simply the rows of the next: the next expert overwrites what was computed from
them, and in the backward pass their upstream gradients are set to zero.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, G = 2 * F
(gate above up projection), R = T * K routed rows in the order of experts, P = R + room for padding after the last
expert, N rows of one expert including its padding.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litgpt_moe_ext.moe.backends import matmul_dtype

# Elements of one operand in the elementwise parts: three of them fit into a second-level cache of 1 MiB.
_BLOCK = 2**16


class Segment(NamedTuple):
    """The rows of one expert: `start` to `stop`, and to `padded` with padding."""

    expert: int
    start: int
    stop: int
    padded: int


class Dispatch(NamedTuple):
    """Which rows go where.

    Attributes:
        segments: One for each expert that has tokens, in order.
        tokens_P: Token of each row.
        positions_TK: Row of each token and chosen expert.
    """

    segments: list[Segment]
    tokens_P: Tensor
    positions_TK: Tensor


def dispatch(experts_TK: Tensor, counts_E: Tensor, padding: int) -> Dispatch:
    """Sort the routed rows by expert, keeping the order of tokens.

    Args:
        experts_TK: Chosen experts, int64.
        counts_E: Tokens per expert.
        padding: Segments are padded to a multiple of this many rows.
    """
    rows_R = experts_TK.flatten().argsort(stable=True)
    positions_TK = (
        torch.empty_like(rows_R)
        .scatter_(0, rows_R, torch.arange(rows_R.numel(), device=rows_R.device))
        .view(experts_TK.shape)
    )
    tokens_P = F.pad(rows_R.div_(experts_TK.size(1), rounding_mode="floor"), (0, padding - 1))
    segments, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            segments.append(Segment(expert, start, start + count, start + count + -count % padding))
            start += count
    return Dispatch(segments, tokens_P, positions_TK)


def grouped_cpu_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor,
    counts_E: Tensor,
    gate_up_EGD: Tensor,
    gate_up_bias_EG: Tensor | None,
    down_EDF: Tensor,
    down_bias_ED: Tensor | None,
) -> Tensor:
    """Return, for each token, the weighted sum of its SwiGLU experts' outputs, (T, D) in the dtype of `x_TD`.

    Matrices are multiplied in the dtype of `x_TD`, or in autocast's; each expert's weights are cast when its turn
    comes. Can be differentiated once.

    Args:
        x_TD: Tokens, any floating dtype.
        weights_TK: Gate values, float32 or float64.
        experts_TK: Chosen experts, int64; no expert twice for one token.
        counts_E: Tokens per expert, int64.
        gate_up_EGD: Gate projections above up projections.
        gate_up_bias_EG: Their biases, or None.
        down_EDF: Down projections.
        down_bias_ED: Their biases, or None.
    """
    dtype = matmul_dtype(x_TD)
    arguments = (x_TD, weights_TK, gate_up_EGD, gate_up_bias_EG, down_EDF, down_bias_ED)
    with torch.autocast("cpu", enabled=False):
        plan = dispatch(experts_TK, counts_E, _padding(dtype, experts_TK.numel() // counts_E.numel()))
        if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments):
            return _GroupedExperts.apply(*arguments, plan, dtype)
        return _forward(*arguments, plan, dtype, None)


def _padding(dtype: torch.dtype, mean_count: int) -> int:
    """Return the number of which segments have a multiple of rows: for oneDNN about an eighth of the mean segment.

    Any fixed number would either be a waste for small segments or leave too many different sizes of large ones: oneDNN
    remembers 1024 pieces of code, of which a layer needs six for each size.
    """
    if dtype == torch.float64 or (dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"):
        return 1  # Multiplied by the BLAS library, which compiles nothing.
    return 1 << max(mean_count.bit_length() - 4, 4)


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        gate_up_EGD: Tensor,
        gate_up_bias_EG: Tensor | None,
        down_EDF: Tensor,
        down_bias_ED: Tensor | None,
        plan: Dispatch,
        dtype: torch.dtype,
    ) -> Tensor:
        hidden: list[Tensor] = []
        y_TD = _forward(x_TD, weights_TK, gate_up_EGD, gate_up_bias_EG, down_EDF, down_bias_ED, plan, dtype, hidden)
        ctx.segments, ctx.x_dtype = plan.segments, x_TD.dtype
        ctx.save_for_backward(
            x_TD.to(dtype),
            weights_TK,
            gate_up_EGD,
            gate_up_bias_EG,
            down_EDF,
            down_bias_ED,
            plan.tokens_P,
            plan.positions_TK,
            *hidden,
        )
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):
            return *_backward(ctx, dy_TD), None, None


def _forward(
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_up_EGD: Tensor,
    gate_up_bias_EG: Tensor | None,
    down_EDF: Tensor,
    down_bias_ED: Tensor | None,
    plan: Dispatch,
    dtype: torch.dtype,
    hidden: list[Tensor] | None,
) -> Tensor:
    """Compute the output; append each segment's first projection, (N, G), to `hidden` unless it is None."""
    x_cast_TD = x_TD.to(dtype)
    weights_P1 = _by_row(weights_TK.to(dtype), plan)
    y_PD = x_TD.new_empty(plan.tokens_P.numel(), x_TD.size(1))
    for expert, start, _, end in plan.segments:
        x_ND = x_cast_TD.index_select(0, plan.tokens_P[start:end])
        h_NG = _linear(x_ND, gate_up_EGD[expert], gate_up_bias_EG, expert)
        if hidden is not None:
            hidden.append(h_NG)
        gate_NF, up_NF = h_NG.chunk(2, dim=1)
        weights_N1 = weights_P1[start:end]
        a_NF = torch.empty_like(gate_NF, memory_format=torch.contiguous_format)
        for rows in _blocks(a_NF):
            torch.ops.aten.silu.out(gate_NF[rows], out=a_NF[rows]).mul_(up_NF[rows]).mul_(weights_N1[rows])
        _matmul_into(y_PD[start:end], a_NF, down_EDF[expert].to(dtype).t())
        if down_bias_ED is not None:
            y_PD[start:end] += weights_N1 * down_bias_ED[expert]
    return F.embedding_bag(plan.positions_TK, y_PD, mode="sum")


def _backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the six tensor arguments, None where none is asked for."""
    x_TD, weights_TK, gate_up_EGD, gate_up_bias_EG, down_EDF, down_bias_ED, tokens_P, positions_TK, *hidden = (
        ctx.saved_tensors
    )
    need_x, need_weights, need_gate_up, need_gate_up_bias, need_down, need_down_bias, *_ = ctx.needs_input_grad
    need_h = need_x or need_gate_up or need_gate_up_bias
    plan = Dispatch(ctx.segments, tokens_P, positions_TK)
    dtype = x_TD.dtype
    dy_TD = dy_TD.to(dtype)
    weights_P1 = _by_row(weights_TK.to(dtype), plan)
    n_row = tokens_P.numel()
    dx_PD = x_TD.new_empty(n_row, x_TD.size(1), dtype=ctx.x_dtype) if need_x else None
    dweights_P = weights_TK.new_empty(n_row) if need_weights else None
    dgate_up_EGD = torch.empty_like(gate_up_EGD) if need_gate_up else None
    ddown_EDF = torch.empty_like(down_EDF) if need_down else None
    dgate_up_bias_EG = torch.empty_like(gate_up_bias_EG) if need_gate_up_bias else None
    ddown_bias_ED = torch.empty_like(down_bias_ED) if need_down_bias else None
    gradients = (dgate_up_EGD, dgate_up_bias_EG, ddown_EDF, ddown_bias_ED)
    for expert in set(range(gate_up_EGD.size(0))).difference(segment.expert for segment in plan.segments):
        for gradient in gradients:
            if gradient is not None:
                gradient[expert].zero_()

    for (expert, start, stop, end), h_NG in zip(plan.segments, hidden, strict=True):
        weights_N1 = weights_P1[start:end]
        dy_ND = dy_TD.index_select(0, tokens_P[start:end])
        dy_ND[stop - start :].zero_()
        da_NF = torch.mm(dy_ND, down_EDF[expert].to(dtype))
        a_NF = torch.empty_like(da_NF)
        dh_NG = torch.empty_like(h_NG) if need_h else None
        dots_N = None if dweights_P is None else dweights_P[start:end]
        for rows in _blocks(a_NF):
            _swiglu_backward(
                h_NG[rows],
                weights_N1[rows],
                da_NF[rows],
                a_NF[rows],
                None if dh_NG is None else dh_NG[rows],
                None if dots_N is None else dots_N[rows],
            )
        if ddown_EDF is not None:
            _matmul_into(ddown_EDF[expert], dy_ND.t(), a_NF)
        if ddown_bias_ED is not None:
            torch.sum(dy_ND * weights_N1, 0, out=ddown_bias_ED[expert])
        if down_bias_ED is not None and dots_N is not None:
            dots_N += (dy_ND * down_bias_ED[expert].to(dtype)).sum(1, dtype=dots_N.dtype)
        if dgate_up_EGD is not None:
            _matmul_into(dgate_up_EGD[expert], dh_NG.t(), x_TD.index_select(0, tokens_P[start:end]))
        if dgate_up_bias_EG is not None:
            torch.sum(dh_NG, 0, out=dgate_up_bias_EG[expert])
        if dx_PD is not None:
            _matmul_into(dx_PD[start:end], dh_NG, gate_up_EGD[expert].to(dtype))

    dx_TD = None if dx_PD is None else F.embedding_bag(positions_TK, dx_PD, mode="sum")
    dweights_TK = None if dweights_P is None else dweights_P[positions_TK]
    return dx_TD, dweights_TK, *gradients


def _swiglu_backward(
    h_NG: Tensor, weights_N1: Tensor, da_NF: Tensor, a_NF: Tensor, dh_NG: Tensor | None, dots_N: Tensor | None
) -> None:
    """Go backward through `weights * silu(gate) * up` for a block of rows.

    Args:
        h_NG: Gate and up projections side by side.
        weights_N1: Gate values.
        da_NF: Gradient of the weighted activations; overwritten.
        a_NF: Receives the weighted activations.
        dh_NG: Receives the gradient of `h_NG` unless None.
        dots_N: Receives the gradient of `weights_N1` unless None.
    """
    gate_NF, up_NF = h_NG.chunk(2, dim=1)
    silu_NF = F.silu(gate_NF)
    torch.mul(silu_NF, up_NF, out=a_NF)
    if dots_N is not None:
        torch.sum(a_NF * da_NF, 1, dtype=dots_N.dtype, out=dots_N)
    a_NF.mul_(weights_N1)
    if dh_NG is not None:
        dgate_NF, dup_NF = dh_NG.chunk(2, dim=1)
        da_NF.mul_(weights_N1)
        torch.mul(da_NF, silu_NF, out=dup_NF)
        torch.ops.aten.silu_backward.grad_input(da_NF.mul_(up_NF), gate_NF, grad_input=dgate_NF)


def _by_row(weights_TK: Tensor, plan: Dispatch) -> Tensor:
    """Return the gate value of each row, (P, 1); arbitrary finite values in the padding."""
    weights_P = weights_TK.new_zeros(plan.tokens_P.numel())
    return weights_P.scatter_(0, plan.positions_TK.flatten(), weights_TK.flatten()).unsqueeze(1)


def _linear(x_ND: Tensor, weight_EGD: Tensor, bias_EG: Tensor | None, expert: int) -> Tensor:
    weight_GD = weight_EGD.to(x_ND.dtype)
    return F.linear(x_ND, weight_GD, None if bias_EG is None else bias_EG[expert].to(x_ND.dtype))


def _matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write `a @ b` to `out`, which under autocast has another dtype than the operands."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _blocks(tensor: Tensor) -> Iterator[slice]:
    """Cut the rows of `tensor` into blocks that stay in the cache while several operations pass over them."""
    n_row, width = tensor.shape
    step = max(1, _BLOCK // width)
    return (slice(start, start + step) for start in range(0, n_row, step))
