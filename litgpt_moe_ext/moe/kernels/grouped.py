"""The routed experts as grouped products: all experts at once, without waiting for their numbers of rows.

Shape legend: T tokens, K chosen experts per token, D model width, F hidden width of one expert, R = T * K routed rows
in the order of experts.
"""

from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.kernels.side_stream import added
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights, Hidden
from litgpt_moe_ext.moe.kernels.few_rows import MOST_GATHERED, decodes, gather_experts
from litgpt_moe_ext.moe.kernels.operators.down import Down, expert_down
from litgpt_moe_ext.moe.kernels.operators.few_tokens import FewTokens, decode_experts
from litgpt_moe_ext.moe.kernels.operators.up import Up, expert_up
from litgpt_moe_ext.moe.kernels.plan import Identity, kind_of, sort_rows
from litgpt_moe_ext.moe.routing.router import Routing

# Up to this many routed rows are not sorted: each reads its own expert's weights.
_FEW_ROWS = 32


def triton_experts(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, hidden: Hidden, added_TD: Tensor | None = None
) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs, (T, D) in the dtype of `x_TD`.

    Matrices are multiplied in the dtype of `x_TD` or of autocast, with float32 sums; float32 products follow
    `torch.set_float32_matmul_precision`. Can be differentiated once. Deterministic.

    Args:
        x_TD: Tokens, float32, bfloat16 or float16.
        routing: The router's decision for them.
        weights: Stacked weights of the experts.
        hidden: What happens between the two projections.
        added_TD: What is added to the sum, (T, D) in the dtype of `x_TD`, or None.
    """
    if decodes(_FEW_ROWS, x_TD, routing, weights, hidden):
        how = hidden.activation.name, hidden.activation.gelu_approximate
        few = FewTokens(x_TD, routing.weights_TK, routing.experts_TK, *weights, *how)
        return added(decode_experts(few), added_TD)
    return _grouped(x_TD, routing, weights, hidden, added_TD, "triton")


def grouped_mm_experts(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, hidden: Hidden, added_TD: Tensor | None = None
) -> Tensor:
    """Do the same as `triton_experts` with torch's grouped products.

    Args:
        x_TD: As above; rows of D and of F elements must be multiples of 16 bytes long.
        routing: As above.
        weights: As above.
        hidden: As above.
        added_TD: As above.
    """
    if x_TD.device.type == "cuda" and decodes(MOST_GATHERED, x_TD, routing, weights, hidden):
        return added(gather_experts(x_TD, routing, weights, hidden.activation, matmul_dtype(x_TD)), added_TD)
    return _grouped(x_TD, routing, weights, hidden, added_TD, "torch")


def _grouped(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, hidden: Hidden, added_TD: Tensor | None, engine: str
) -> Tensor:
    gates_TK, experts_TK, counts_E, real_T, decision, _ = routing
    if decision is None:
        rows_R, ends_E = sort_rows(experts_TK, counts_E, padded=real_T is not None)
    else:
        rows_R, ends_E = decision.rows_R, decision.ends_E
    # Autocast does not reach the operators.
    dtype = matmul_dtype(x_TD)
    h_RG = expert_up(Up(x_TD, weights.up_EGD, weights.up_bias_EG, rows_R, ends_E, dtype, engine))
    activation: Any = hidden.activation
    if kind_of(activation) is None:
        # A registered activation runs as its own operators, which keep what they need for backward.
        h_RG, activation = activation(h_RG).contiguous(), Identity()
    keep_RF = None
    if hidden.dropout:
        shape = (h_RG.size(0), weights.down_EDF.size(2))
        keep_RF = h_RG.new_empty(shape, dtype=torch.bool).bernoulli_(1 - hidden.dropout)
    return expert_down(
        Down(
            h_RG=h_RG,
            gates_TK=gates_TK,
            weight_EDF=weights.down_EDF,
            bias_ED=weights.down_bias_ED,
            keep_RF=keep_RF,
            experts_TK=experts_TK,
            rows_R=rows_R,
            ends_E=ends_E,
            added_TD=added_TD,
            activation=activation.name,
            approximate=activation.gelu_approximate,
            scale=1 / (1 - hidden.dropout),
            dtype=x_TD.dtype,
            engine=engine,
        )
    )
