"""PyTorch's flash attention for GPUs, with sliding windows and documents."""

import torch
from torch import Tensor

from litgpt_moe_ext.attention.kernels import calls
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs, Result

aten = torch.ops.aten


def forward(inputs: Inputs, call: Call) -> Result:
    """Compute causal attention, within windows and documents if there are any."""
    q, k, v, _, offsets = inputs
    if offsets is None and call.window is None:
        # The same kernel, by the operator whose shapes torch's FLOP counter reads correctly.
        out, lse, _, _, _, _, rng_state, unused, _ = aten._scaled_dot_product_flash_attention(
            q, k, v, call.dropout, call.causal, False, scale=call.scale
        )
        return Result(out, lse, (rng_state, unused))
    left, right = calls.window_sides(call)
    longest = calls.longest_document(inputs, call)
    out, lse, rng_state, unused, _ = aten._flash_attention_forward(
        *(calls.pack(x, offsets) for x in (q, k, v)), offsets, offsets, longest, longest, call.dropout, call.causal,
        False, scale=call.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return calls.unpack_result(out, lse, inputs, (rng_state, unused))


def backward(dout: Tensor, inputs: Inputs, result: Result, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values."""
    q, k, v, _, offsets = inputs
    out, lse, rest = result
    if offsets is None and call.window is None:
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.size(2), k.size(2), call.dropout, call.causal, *rest,
            scale=call.scale,
        )  # fmt: skip
    left, right = calls.window_sides(call)
    longest = calls.longest_document(inputs, call)
    dq, dk, dv = aten._flash_attention_backward(
        *(calls.pack(x, offsets) for x in (dout, q, k, v, out)), calls.pack_lse(lse, offsets), offsets, offsets,
        longest, longest, call.dropout, call.causal, *rest, scale=call.scale, window_size_left=left,
        window_size_right=right,
    )  # fmt: skip
    return calls.unpack_gradients(dq, dk, dv, inputs)
