"""The routed experts as grouped matrix products (`torch.nn.functional.grouped_mm`, torch 2.10 and later).

Nothing here asks the device how many rows an expert has, so that neither the host waits nor `torch.compile` breaks the
graph. Meant for GPUs on which torch has a native grouped product (bfloat16, compute capabilities 9.x and 10.x), on
which it was NOT measured; tests run it on a CPU, where torch computes the groups one by one.

Rows are moved by permutations in both directions, and the sums over a token's experts, of outputs and of gradients, are
taken in float32 in a fixed order: adding into a row by its index would be atomic on a GPU, in an order that changes.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, G width of
the first projection (2 * F with a gate), R = T * K routed rows in the order of experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.moe.kernels.backends import ExpertWeights, Hidden, has_gradient, matmul_dtype
from litgpt_moe_ext.moe.kernels.few_rows import MOST_GATHERED, gather_experts
from litgpt_moe_ext.moe.kernels.sorting import sort_rows
from litgpt_moe_ext.moe.router import Routing


def grouped_mm_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs, (T, D) in the dtype of `x_TD`.

    Args:
        x_TD: Tokens, float32, bfloat16 or float16; bfloat16 (or autocast to it) is what GPUs have kernels for. Rows of
            D and of F elements must be multiples of 16 bytes long.
        routing: The router's decision for them.
        weights: Stacked weights of the experts.
        hidden: What happens between the two projections.
    """
    gates_TK, experts_TK, counts_E = routing
    # Autocast does not reach the grouped product.
    dtype = matmul_dtype(x_TD)
    few = experts_TK.numel() <= MOST_GATHERED and x_TD.device.type == "cuda"
    if few and not hidden.dropout and not has_gradient(x_TD, gates_TK, *weights):
        return gather_experts(x_TD, routing, weights, hidden.activation, dtype)
    rows_R, ends_E = sort_rows(experts_TK, counts_E)
    experts_R = experts_TK.flatten().index_select(0, rows_R) if weights.up_bias_EG is not None else None
    inverse_R = torch.empty_like(rows_R).scatter_(0, rows_R, torch.arange(rows_R.size(0), device=rows_R.device))
    x_RD = _Dispatch.apply(x_TD.to(dtype), rows_R, inverse_R, experts_TK.size(1))
    a_RF = hidden.activation(_grouped_linear(x_RD, weights.up_EGD, weights.up_bias_EG, experts_R, ends_E))
    if hidden.dropout:
        a_RF = F.dropout(a_RF, hidden.dropout)
    y_RD = _grouped_linear(a_RF, weights.down_EDF, weights.down_bias_ED, experts_R, ends_E)
    y_TKD = _Permute.apply(y_RD, inverse_R, rows_R).view(*gates_TK.shape, -1)
    return (y_TKD * gates_TK.unsqueeze(-1)).sum(1).to(x_TD.dtype)


def _grouped_linear(
    x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, experts_R: Tensor | None, ends_E: Tensor
) -> Tensor:
    # I and O are the widths of input and output.
    y_RO = F.grouped_mm(x_RI, weight_EOI.to(x_RI.dtype).transpose(1, 2), offs=ends_E)
    return y_RO if bias_EO is None else y_RO + bias_EO.to(x_RI.dtype).index_select(0, experts_R)


class _Dispatch(torch.autograd.Function):
    """Copy each token to the K places where its experts read it."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.top_k = top_k
        return x_TD.index_select(0, rows_R.div(top_k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, dx_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        dx_TKD = dx_RD.index_select(0, inverse_R).unflatten(0, (-1, ctx.top_k))
        return dx_TKD.sum(1, dtype=torch.promote_types(dx_RD.dtype, torch.float32)).to(dx_RD.dtype), None, None, None


class _Permute(torch.autograd.Function):
    """Reorder rows, and their gradients back, without adding anything."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return y_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return dy_RD.index_select(0, inverse_R), None, None
