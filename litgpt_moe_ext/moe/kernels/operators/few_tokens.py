"""Both projections for a handful of tokens, as in decoding.

Shape legend: T tokens, K chosen experts per token, E experts, D model width, F hidden width of one expert, G width of
the first projection (2 * F with a gate).
"""

from typing import Any, NamedTuple

from torch import Tensor

from litgpt_moe_ext.kernels.operator import operator
from litgpt_moe_ext.moe.kernels.calls import ExpertWeights
from litgpt_moe_ext.moe.kernels.operators.parts import product_flops
from litgpt_moe_ext.moe.kernels.plan import activation_of


class FewTokens(NamedTuple):
    """Arguments of `decode_experts`: tokens, their routing, the weights, and the activation as in `down.Down`."""

    x_TD: Tensor
    gates_TK: Tensor
    experts_TK: Tensor
    up_EGD: Tensor
    up_bias_EG: Tensor | None
    down_EDF: Tensor
    down_bias_ED: Tensor | None
    activation: str
    approximate: str


def _flops(shapes: Any) -> int:
    n_row = shapes.experts_TK[0] * shapes.experts_TK[1]
    return product_flops(n_row, shapes.up_EGD) + product_flops(n_row, shapes.down_EDF)


@operator("decode_experts", FewTokens, lambda c: c.x_TD.new_empty(c.x_TD.shape), flops=_flops)
def decode_experts(call: FewTokens) -> Tensor:
    """Return the weighted sum of the experts' outputs for a few tokens, (T, D), by Triton."""
    from litgpt_moe_ext.moe.kernels.triton import decode

    weights = ExpertWeights(call.up_EGD, call.up_bias_EG, call.down_EDF, call.down_bias_ED)
    return decode(call.x_TD, call.gates_TK, call.experts_TK, weights, activation_of(call))
