"""PyTorch's memory-efficient attention, for float32 and for cards before Ampere."""

import torch
from torch import Tensor

from litgpt_moe_ext.attention.kernels.calls import Call, Inputs, Result

aten = torch.ops.aten


def forward(inputs: Inputs, call: Call) -> Result:
    """Compute attention."""
    q, k, v, _, _ = inputs
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        q, _repeat_groups(k, q), _repeat_groups(v, q), None, True, call.dropout, call.causal, scale=call.scale
    )
    return Result(out, lse[..., : q.size(2)], (seed, offset))


def backward(dout: Tensor, inputs: Inputs, result: Result, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values."""
    q, k, v, _, _ = inputs
    # The kernel reads lse in rows of a multiple of 32, and expects infinity where there is no query.
    lse = torch.nn.functional.pad(result.lse_BHT, (0, -result.lse_BHT.size(-1) % 32), value=float("inf"))
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, _repeat_groups(k, q), _repeat_groups(v, q), None, result.out_BHTd, lse, *result.rest, call.dropout,
        [True, True, True, False], call.causal, scale=call.scale,
    )  # fmt: skip
    return dq, _sum_groups(dk, k), _sum_groups(dv, v)


def _repeat_groups(x_BGSd: Tensor, q_BHTd: Tensor) -> Tensor:
    n = q_BHTd.size(1) // x_BGSd.size(1)
    return x_BGSd if n == 1 else x_BGSd.repeat_interleave(n, dim=1)


def _sum_groups(dx_BHSd: Tensor, x_BGSd: Tensor) -> Tensor:
    return dx_BHSd if dx_BHSd.size(1) == x_BGSd.size(1) else dx_BHSd.unflatten(1, (x_BGSd.size(1), -1)).sum(2)
