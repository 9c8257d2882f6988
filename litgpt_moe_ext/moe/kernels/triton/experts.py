"""The routed experts by the operators of `litgpt_moe_ext.moe.kernels.triton.ops`.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, R = T * K
routed rows in the order of experts.
"""

import torch
from torch import Tensor

from litgpt_moe_ext.moe.kernels.backends import ExpertWeights, Hidden, has_gradient, matmul_dtype
from litgpt_moe_ext.moe.kernels.sorting import sort_rows
from litgpt_moe_ext.moe.kernels.triton.ops import decode_experts, expert_down, expert_up
from litgpt_moe_ext.moe.router import Routing

# With at most so many routed rows each is worth reading its expert's weights anew, without sorting.
_FEW_ROWS = 32


def triton_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs, (T, D) in the dtype of `x_TD`.

    Matrices are multiplied in the dtype of `x_TD`, or in autocast's, with float32 sums; float32 is multiplied as
    `torch.set_float32_matmul_precision` says. Can be differentiated once. Two runs give the same bits.

    Args:
        x_TD: Tokens, float32, bfloat16 or float16.
        routing: The router's decision for them.
        weights: Stacked weights of the experts.
        hidden: What happens between the two projections.
    """
    gates_TK, experts_TK, counts_E = routing
    dtype, activation = matmul_dtype(x_TD), hidden.activation
    how = (activation.name, activation.gelu_approximate)
    if experts_TK.numel() <= _FEW_ROWS and not hidden.dropout and not has_gradient(x_TD, gates_TK, *weights):
        return decode_experts(x_TD, gates_TK, experts_TK, *weights, *how)
    rows_R, ends_E = sort_rows(experts_TK, counts_E)
    h_RG = expert_up(x_TD, weights.up_EGD, weights.up_bias_EG, rows_R, ends_E, dtype)
    keep_RF = None
    if hidden.dropout:
        shape = (h_RG.size(0), weights.down_EDF.size(2))
        keep_RF = h_RG.new_empty(shape, dtype=torch.bool).bernoulli_(1 - hidden.dropout)
    routed = (h_RG, gates_TK, weights.down_EDF, weights.down_bias_ED, keep_RF, experts_TK, rows_R, ends_E)
    return expert_down(*routed, *how, 1 / (1 - hidden.dropout), x_TD.dtype)
