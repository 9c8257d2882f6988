"""Experts for a handful of tokens, as in decoding, where reading the weights is all the work.

Shape legend: T tokens, N rows, K chosen experts per token, E experts, O and I widths of output and input, D model
width, F hidden width of one expert, G width of the first projection (2 * F with a gate), R = T * K chosen experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litgpt_moe_ext.kernels.precision import float32_precision
from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights, Hidden, has_gradient
from litgpt_moe_ext.moe.routing.router import Routing

# Up to this many rows the BLAS library is faster with the weight as the left factor (benchmarks/moe_layer.py).
_FEW_ROWS = 4
# Up to this many chosen experts, their weights are copied; more would take more memory than a step should need.
MOST_GATHERED = 16


def decodes(most: int, x_TD: Tensor, routing: Routing, weights: ExpertWeights, hidden: Hidden) -> bool:
    """Return whether at most `most` experts were chosen, and there is no gradient, padding or dropout."""
    return (
        routing.experts_TK.numel() <= most
        and routing.real_T is None
        and not hidden.dropout
        and not has_gradient(x_TD, routing.weights_TK, *weights)
    )


def one_token(
    x_1D: Tensor, routing: Routing, weights: ExpertWeights, activation: Activation, dtype: torch.dtype
) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs for a single token, (1, D); reads their weights only.

    Args:
        x_1D: The token.
        routing: The router's decision for it.
        weights: Stacked weights of the experts.
        activation: The activation function.
        dtype: In which matrices are multiplied.
    """
    x_cast_1D = x_1D.to(dtype)
    outputs_KD = []
    for expert in routing.experts_TK[0].tolist():
        a_1F = activation(linear(x_cast_1D, weights.up_EGD[expert], weights.up_bias_EG, expert))
        outputs_KD.append(linear(a_1F, weights.down_EDF[expert], weights.down_bias_ED, expert))
    y_KD = torch.cat(outputs_KD)
    # In the gate's precision, as over many tokens.
    return (routing.weights_TK @ y_KD.to(routing.weights_TK.dtype)).to(x_1D.dtype)


def linear(x_NI: Tensor, weight_OI: Tensor, bias_EO: Tensor | None, expert: int) -> Tensor:
    """Return `x @ weight.T + bias[expert]`, (N, O), in the dtype of `x_NI`.

    Args:
        x_NI: Input.
        weight_OI: Weight of the expert, any floating dtype.
        bias_EO: Biases of all experts, or None.
        expert: Index of the expert.
    """
    weight_OI = weight_OI.to(x_NI.dtype)
    bias_O = None if bias_EO is None else bias_EO[expert].to(x_NI.dtype)
    n = len(x_NI)
    if n > _FEW_ROWS or x_NI.dtype != torch.float32 or float32_precision("cpu") != "ieee":
        return F.linear(x_NI, weight_OI, bias_O)
    # A product with one column would go to a matrix-vector routine, which is slower than a product with two columns.
    x_IN = (x_NI if n > 1 else x_NI.expand(2, -1).contiguous()).t()
    y_NO = torch.mm(weight_OI, x_IN).t()[:n]
    return y_NO if bias_O is None else y_NO + bias_O


def gather_experts(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, activation: Activation, dtype: torch.dtype
) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs, (T, D), from copies of their weights.

    For a handful of tokens on a GPU without Triton: it does not wait for the device, nor read other experts.

    Args:
        x_TD: A few tokens.
        routing: The router's decision for them.
        weights: Stacked weights of the experts.
        activation: The activation function.
        dtype: In which matrices are multiplied.
    """
    gates_TK, experts_TK = routing.weights_TK, routing.experts_TK

    def project(x_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None) -> Tensor:
        y_RO = torch.bmm(weight_EOI[experts_TK.flatten()].to(dtype), x_RI.unsqueeze(2)).squeeze(2)
        return y_RO if bias_EO is None else y_RO + bias_EO[experts_TK.flatten()].to(dtype)

    x_RD = x_TD.to(dtype).repeat_interleave(experts_TK.size(1), 0)
    a_RF = activation(project(x_RD, weights.up_EGD, weights.up_bias_EG))
    y_TKD = project(a_RF, weights.down_EDF, weights.down_bias_ED).view(*experts_TK.shape, -1)
    return (y_TKD * gates_TK.unsqueeze(2)).sum(1).to(x_TD.dtype)
