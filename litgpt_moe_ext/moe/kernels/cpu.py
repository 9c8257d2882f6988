"""The routed experts on a CPU, eager: one expert after the other, with a backward pass written by hand.

What it saves over the plain loop (`litgpt_moe_ext.moe.kernels.loop`), largest gain first:
- Rows are gathered expert by expert, instead of all at once, into memory that all experts share, so it stays in the
  cache.
- Only the tokens, the first projection's output and the routing are kept for the backward pass, which recomputes the
  activations. No expert's output is kept, because the gradient of a gate value is the dot product of activations
  and their gradient.
- The sums over a token's experts, of outputs and of input gradients, are `embedding_bag`, which reads each row once,
  weights it, writes each token once, and adds in float32 whatever the dtype.
- Gradients of weights are written straight into the stacked gradient.

Rows of one expert are padded to a multiple of `_padding`. oneDNN, which multiplies bfloat16 matrices, compiles code
for each new number of rows (half a millisecond), and routing would produce new numbers again and again. The padding
rows of an expert are zeros. Their results lie where the rows of the next expert begin, which overwrites them.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, G width of
the first projection (2 * F with a gate), R = T * K routed rows in the order of experts, those of padding tokens last,
P = R + room for padding after the last expert, N rows of one expert including its padding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litgpt_moe_ext.kernels.allocator import keep_large_blocks
from litgpt_moe_ext.kernels.precision import float32_precision, matmul_dtype
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights, Hidden, has_gradient
from litgpt_moe_ext.moe.kernels.few_rows import linear, one_token
from litgpt_moe_ext.moe.routing.router import Routing


class Segment(NamedTuple):
    """The rows of one expert: `start` to `stop`, and to `padded` with padding."""

    expert: int
    start: int
    stop: int
    padded: int


class Dispatch(NamedTuple):
    """The assignment of rows to experts and tokens.

    Attributes:
        segments: One for each expert that has tokens, in order.
        tokens_R: Token of each row.
        positions_TK: Row of each token and chosen expert.
        n_row: P.
    """

    segments: list[Segment]
    tokens_R: Tensor
    positions_TK: Tensor
    n_row: int


class _Job(NamedTuple):
    """How one layer is computed: the dispatch of rows, what happens between the projections, and the dtype."""

    plan: Dispatch
    hidden: Hidden
    dtype: torch.dtype


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
    tokens_R = rows_R.div_(experts_TK.size(1), rounding_mode="floor")
    segments, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        if count:
            segments.append(Segment(expert, start, start + count, start + count + -count % padding))
            start += count
    return Dispatch(segments, tokens_R, positions_TK, len(tokens_R) + padding - 1)


def grouped_cpu_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs, (T, D) in the dtype of `x_TD`.

    Matrices are multiplied in the dtype of `x_TD` or of autocast; each expert's weights are cast when it is computed.
    Can be differentiated once.

    Args:
        x_TD: Tokens, any floating dtype.
        routing: The router's decision for them.
        weights: Stacked weights of the experts.
        hidden: What happens between the two projections.
    """
    dtype = matmul_dtype(x_TD)
    differentiable = (x_TD, routing.weights_TK, *weights)
    with torch.autocast("cpu", enabled=False):
        if has_gradient(*differentiable):
            keep_large_blocks()
            return _GroupedExperts.apply(_Job(_plan(routing, dtype), hidden, dtype), *differentiable)
        if len(x_TD) == 1 and routing.real_T is None and not hidden.dropout:
            return one_token(x_TD, routing, weights, hidden.activation, dtype)
        return _forward(x_TD, routing.weights_TK, weights, _Job(_plan(routing, dtype), hidden, dtype), None)


def _plan(routing: Routing, dtype: torch.dtype) -> Dispatch:
    mean_count = routing.experts_TK.numel() // routing.counts_E.numel()
    return dispatch(routing.experts_TK, routing.counts_E, _padding(dtype, mean_count))


def _padding(dtype: torch.dtype, mean_count: int) -> int:
    """Return the multiple to which segments are padded: for oneDNN about a sixteenth of the mean segment.

    Any fixed number would either waste work on small segments or leave too many different sizes of large ones: oneDNN
    caches 1024 kernels, and a layer needs six for each size.
    """
    if dtype == torch.float64 or (dtype == torch.float32 and float32_precision("cpu") == "ieee"):
        return 1  # The BLAS library multiplies these, and compiles nothing.
    if mean_count < 16:
        return 1  # Small segments have few different sizes.
    return 1 << max(mean_count.bit_length() - 5, 4)


class _Saved(NamedTuple):
    """What the backward pass keeps of one segment: the first projection, (N, G), and the dropout mask if any."""

    h_NG: Tensor
    keep_NF: Tensor | None


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, x_TD: Tensor, weights_TK: Tensor, *parameters: Any) -> Tensor:
        plan, weights = job.plan, ExpertWeights(*parameters)
        saved: list[_Saved] = []
        y_TD = _forward(x_TD, weights_TK, weights, job, saved)
        ctx.segments, ctx.n_row, ctx.hidden, ctx.x_dtype = plan.segments, plan.n_row, job.hidden, x_TD.dtype
        ctx.save_for_backward(
            x_TD.to(job.dtype), weights_TK, *weights, plan.tokens_R, plan.positions_TK, *(t for s in saved for t in s)
        )
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyrefly: ignore[bad-override]  # by torch's decorator
        with torch.autocast("cpu", enabled=False):
            return None, *_backward(ctx, grad_outputs[0])


def _forward(x_TD: Tensor, weights_TK: Tensor, weights: ExpertWeights, job: _Job, saved: list[_Saved] | None) -> Tensor:
    """Compute the output; append to `saved` what the backward pass needs of each segment unless it is None."""
    plan, hidden, dtype = job
    x_cast_TD = x_TD.to(dtype)
    y_PD = x_TD.new_empty(plan.n_row, x_TD.size(1))
    x_space_ND = _workspace(plan.segments, x_cast_TD, x_TD.size(1))
    a_space_NF = _workspace(plan.segments, x_cast_TD, weights.down_EDF.size(2))
    for segment in plan.segments:
        expert, start, stop, end = segment
        x_ND = _gather(x_cast_TD, plan.tokens_R, segment, x_space_ND)
        h_NG = linear(x_ND, weights.up_EGD[expert], weights.up_bias_EG, expert)
        a_NF = a_space_NF[: end - start]
        hidden.activation.forward_into(h_NG, a_NF)
        keep_NF = hidden.dropout_mask(stop - start, a_NF)
        if keep_NF is not None:
            a_NF[: stop - start].mul_(keep_NF)
        if saved is not None:
            saved.append(_Saved(h_NG, keep_NF))
        if weights.down_bias_ED is None and y_PD.dtype == dtype and len(a_NF) > 4:
            torch.mm(a_NF, weights.down_EDF[expert].to(dtype).t(), out=y_PD[start:end])
        else:
            y_PD[start:end] = linear(a_NF, weights.down_EDF[expert], weights.down_bias_ED, expert)
        del h_NG  # before the next is made
    return _combine(plan.positions_TK, y_PD, weights_TK)


class _Gradients(NamedTuple):
    """Memory for the gradients of the weights; None for those that are not needed."""

    up_EGD: Tensor | None
    up_bias_EG: Tensor | None
    down_EDF: Tensor | None
    down_bias_ED: Tensor | None


def _backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the six tensor arguments; None for those that are not needed."""
    x_TD, weights_TK, *tensors = ctx.saved_tensors
    weights, (tokens_R, positions_TK), saved = ExpertWeights(*tensors[:4]), tensors[4:6], tensors[6:]
    _, need_x, need_weights, *need_parameters = ctx.needs_input_grad
    activation = ctx.hidden.activation
    dtype = x_TD.dtype
    dy_TD = dy_TD.to(dtype)
    weights_P1 = _by_row(weights_TK.to(dtype), positions_TK, ctx.n_row)
    dx_PD = x_TD.new_empty(ctx.n_row, x_TD.size(1), dtype=ctx.x_dtype) if need_x else None
    dweights_P = weights_TK.new_empty(ctx.n_row) if need_weights else None
    gradients = _Gradients(
        *(
            torch.empty_like(t) if need and t is not None else None
            for t, need in zip(weights, need_parameters, strict=True)
        )
    )
    dup_EGD, dup_bias_EG, ddown_EDF, ddown_bias_ED = gradients
    need_hidden = any(gradient is not None for gradient in (dx_PD, dup_EGD, dup_bias_EG))
    _zero_idle_experts(gradients, ctx.segments, weights.up_EGD.size(0))
    rows_space_ND = _workspace(ctx.segments, x_TD, x_TD.size(1))
    da_space_NF, a_space_NF = (_workspace(ctx.segments, x_TD, weights.down_EDF.size(2)) for _ in range(2))
    dh_space_NG = _workspace(ctx.segments, x_TD, weights.up_EGD.size(1))

    for i, segment in enumerate(ctx.segments):
        expert, start, stop, end = segment
        h_NG, keep_NF = saved[2 * i : 2 * i + 2]
        weights_N1 = weights_P1[start:end]
        dots_N = None if dweights_P is None else dweights_P[start:end]
        n = end - start
        dy_ND = _gather(dy_TD, tokens_R, segment, rows_space_ND)
        da_NF = torch.mm(dy_ND, weights.down_EDF[expert].to(dtype), out=da_space_NF[:n])
        if keep_NF is not None:
            da_NF[: stop - start].mul_(keep_NF)
        a_NF = a_space_NF[:n]
        dh_NG = dh_space_NG[:n] if need_hidden else None
        activation.backward_into(h_NG, da_NF, a_NF, dh_NG, dots_N)
        if weights.down_bias_ED is not None and dots_N is not None:
            dots_N += (dy_ND * weights.down_bias_ED[expert].to(dtype)).sum(1, dtype=dots_N.dtype)
        # The gate value is a factor of every gradient of weights, and is cheapest to apply to the narrow operand.
        if ddown_EDF is not None or ddown_bias_ED is not None:
            dy_ND.mul_(weights_N1)
        if ddown_EDF is not None:
            if keep_NF is not None:
                a_NF[: stop - start].mul_(keep_NF)
            _matmul_into(ddown_EDF[expert], dy_ND.t(), a_NF)
        if ddown_bias_ED is not None:
            torch.sum(dy_ND, 0, out=ddown_bias_ED[expert])
        if dh_NG is None:
            continue
        if dup_EGD is not None:
            x_ND = _gather(x_TD, tokens_R, segment, rows_space_ND).mul_(weights_N1)
            _matmul_into(dup_EGD[expert], dh_NG.t(), x_ND)
        if dup_bias_EG is not None:
            dup_bias_EG[expert] = torch.mv(dh_NG.t(), weights_N1.squeeze(1))
        if dx_PD is not None:
            _matmul_into(dx_PD[start:end], dh_NG, weights.up_EGD[expert].to(dtype))

    dx_TD = _combine(positions_TK, dx_PD, weights_TK) if dx_PD is not None else None
    dweights_TK = dweights_P[positions_TK] if dweights_P is not None else None
    return dx_TD, dweights_TK, *gradients


def _workspace(segments: Sequence[Segment], like: Tensor, width: int) -> Tensor:
    """Return memory for the rows of the longest segment; reused for all segments, it stays in the cache."""
    return like.new_empty(max((end - start for _, start, _, end in segments), default=0), width)


def _gather(x_TD: Tensor, tokens_R: Tensor, segment: Segment, space_ND: Tensor) -> Tensor:
    """Return the rows of one expert in the given memory, and zeros for its padding.

    Rows of other experts would serve as padding too, but could overflow in this one.
    """
    _, start, stop, end = segment
    n = stop - start
    torch.index_select(x_TD, 0, tokens_R[start:stop], out=space_ND[:n])
    space_ND[n : end - start].zero_()
    return space_ND[: end - start]


def _zero_idle_experts(gradients: _Gradients, segments: Sequence[Segment], n_expert: int) -> None:
    for expert in set(range(n_expert)).difference(segment.expert for segment in segments):
        for gradient in gradients:
            if gradient is not None:
                gradient[expert].zero_()


def _combine(positions_TK: Tensor, y_PD: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the weighted sum of each token's rows, (T, D)."""
    return F.embedding_bag(positions_TK, y_PD, mode="sum", per_sample_weights=weights_TK.to(y_PD.dtype))


def _by_row(weights_TK: Tensor, positions_TK: Tensor, n_row: int) -> Tensor:
    """Return the gate value of each row, (P, 1); arbitrary finite values in the padding."""
    weights_P = weights_TK.new_zeros(n_row)
    return weights_P.scatter_(0, positions_TK.flatten(), weights_TK.flatten()).unsqueeze(1)


def _matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write `a @ b` to `out`, whose dtype differs from the operands' under autocast."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))
