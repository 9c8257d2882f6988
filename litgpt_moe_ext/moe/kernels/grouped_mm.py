"""The routed experts as grouped matrix products (`torch.nn.functional.grouped_mm`, torch 2.10 and later).

Nothing here asks the device how many rows an expert has, so that neither the host waits nor `torch.compile` breaks the
graph. Meant for GPUs with a native grouped product (bfloat16, compute capability 9.0), on which it was NOT measured;
tests run it on a CPU, where torch computes the groups one by one.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, G width of
the first projection (2 * F with a gate), R = T * K routed rows in the order of experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.moe.kernels.backends import ExpertWeights, Hidden, matmul_dtype
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
    weights_TK, experts_TK, counts_E = routing
    experts_R, rows_R = experts_TK.flatten().sort(stable=True)
    tokens_R = rows_R.div(experts_TK.size(1), rounding_mode="floor")
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    # Autocast does not reach the grouped product.
    dtype = matmul_dtype(x_TD)
    x_RD = x_TD.to(dtype).index_select(0, tokens_R)
    a_RF = hidden.activation(_grouped_linear(x_RD, weights.up_EGD, weights.up_bias_EG, experts_R, ends_E))
    if hidden.dropout:
        a_RF = F.dropout(a_RF, hidden.dropout)
    y_RD = _grouped_linear(a_RF, weights.down_EDF, weights.down_bias_ED, experts_R, ends_E)
    weights_R1 = weights_TK.flatten().index_select(0, rows_R).unsqueeze(1)
    y_TD = weights_R1.new_zeros(x_TD.shape).index_add(0, tokens_R, y_RD * weights_R1)
    return y_TD.to(x_TD.dtype)


def _grouped_linear(
    x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, experts_R: Tensor, ends_E: Tensor
) -> Tensor:
    # I and O are the widths of input and output.
    y_RO = F.grouped_mm(x_RI, weight_EOI.to(x_RI.dtype).transpose(1, 2), offs=ends_E)
    return y_RO if bias_EO is None else y_RO + bias_EO.to(x_RI.dtype).index_select(0, experts_R)
