"""cuDNN's attention."""

import torch
from torch import Tensor

from litgpt_moe_ext.attention.kernels.calls import Call, Inputs, Result

aten = torch.ops.aten


def forward(inputs: Inputs, call: Call) -> Result:
    """Compute attention."""
    q, k, v, _, _ = inputs
    out, lse_BHT1, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, call.dropout, call.causal, False, scale=call.scale
    )
    return Result(out, lse_BHT1.squeeze(-1), (seed, offset))


def backward(dout: Tensor, inputs: Inputs, result: Result, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values."""
    q, k, v, _, _ = inputs
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, result.out_BHTd, result.lse_BHT.unsqueeze(-1), *result.rest, None, None, None, q.size(2),
        k.size(2), call.dropout, call.causal, scale=call.scale,
    )  # fmt: skip
