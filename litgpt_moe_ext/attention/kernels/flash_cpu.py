"""PyTorch's flash attention for CPUs.

FlexAttention cannot replace it: it has no backward on CPUs.
"""

import torch
from torch import Tensor

from litgpt_moe_ext.attention.kernels.calls import Call, Inputs, Result

aten = torch.ops.aten


def forward(inputs: Inputs, call: Call) -> Result:
    """Compute attention with or without a mask."""
    q, k, v, mask, _ = inputs
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, call.causal, attn_mask=mask, scale=call.scale
    )
    return Result(out, lse)


def backward(dout: Tensor, inputs: Inputs, result: Result, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values."""
    q, k, v, mask, _ = inputs
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, result.out_BHTd, result.lse_BHT, 0.0, call.causal, attn_mask=mask, scale=call.scale
    )
