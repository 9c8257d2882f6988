"""The routed experts one after the other with ordinary operators: works everywhere; the reference for other backends.

Shape legend: T tokens, D model width, F hidden width of one expert, K chosen experts per token, N rows of one expert,
R = T * K routed rows in the order of experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights, Hidden
from litgpt_moe_ext.moe.kernels.few_rows import MOST_GATHERED, decodes, gather_experts
from litgpt_moe_ext.moe.routing.router import Routing


def loop_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    """Return, for each token, the weighted sum of its experts' outputs, (T, D) in the dtype of `x_TD`.

    Args:
        x_TD: Tokens.
        routing: The router's decision for them.
        weights: Stacked weights of the experts.
        hidden: What happens between the two projections.
    """
    if x_TD.device.type not in ("cpu", "meta") and decodes(MOST_GATHERED, x_TD, routing, weights, hidden):
        # The loop would wait for the GPU and read the weights of every expert.
        return gather_experts(x_TD, routing, weights, hidden.activation, matmul_dtype(x_TD))
    rows_R = routing.experts_TK.flatten().argsort(stable=True)
    if routing.real_T is not None and not x_TD.is_meta:
        # Padding comes after the last expert.
        rows_R = rows_R[: int(routing.counts_E.sum())]
    tokens_R = rows_R.div(routing.experts_TK.size(1), rounding_mode="floor")
    x_RD = x_TD.index_select(0, tokens_R)
    if x_RD.is_meta:
        # Meta tensors hold no routing, but the work is known: every row passes through one expert, and all have the
        # same size. FLOP counters then see only the active experts.
        y_RD = _expert(x_RD, _each(weights)[0], hidden)
    else:
        y_RD = one_by_one(x_RD, routing.counts_E, weights, hidden)
    weights_R1 = routing.weights_TK.flatten().index_select(0, rows_R).unsqueeze(1)
    # The sum over a token's experts has the gate's precision, as in Hugging Face's DeepSeek-V3.
    y_TD = weights_R1.new_zeros(x_TD.shape).index_add(0, tokens_R, y_RD * weights_R1)
    return y_TD.to(x_TD.dtype)


def one_by_one(x_RD: Tensor, counts_E: Tensor, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    """Return the outputs of the experts, (R, D), in the order of their rows.

    Args:
        x_RD: Rows in the order of experts.
        counts_E: The number of rows of each expert.
        weights: Stacked weights of the experts.
        hidden: What happens between the two projections.
    """
    inputs = x_RD.split(counts_E.tolist())
    return torch.cat([_expert(x, expert, hidden) for x, expert in zip(inputs, _each(weights), strict=True)])


def _each(weights: ExpertWeights) -> list[ExpertWeights]:
    # `unbind` keeps the backward pass linear in E: indexing would create a gradient of the whole stack for every
    # expert.
    none = (None,) * len(weights.up_EGD)
    up_bias = none if weights.up_bias_EG is None else weights.up_bias_EG.unbind()
    down_bias = none if weights.down_bias_ED is None else weights.down_bias_ED.unbind()
    each = zip(weights.up_EGD.unbind(), up_bias, weights.down_EDF.unbind(), down_bias, strict=True)
    return [ExpertWeights(*expert) for expert in each]


def _expert(x_ND: Tensor, weights: ExpertWeights, hidden: Hidden) -> Tensor:
    # `weights` are those of one expert.
    a_NF = hidden.activation(F.linear(x_ND, weights.up_EGD, weights.up_bias_EG))
    if len(x_ND) and not x_ND.is_meta and (keep_NF := hidden.dropout_mask(len(x_ND), a_NF)) is not None:
        a_NF = a_NF * keep_NF
    return F.linear(a_NF, weights.down_EDF, weights.down_bias_ED)
