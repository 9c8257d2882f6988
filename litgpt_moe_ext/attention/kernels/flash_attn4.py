"""The `flash-attn-4` package (FlashAttention in CuTe DSL), with sliding windows and documents. Not run on a card yet.

Written against the functions of 4.0.0b36. They are not public, so the kernel is never chosen automatically.
"""

from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.attention.kernels import calls
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs, Result


def forward(inputs: Inputs, call: Call) -> Result:
    """Compute causal attention, within windows and documents if there are any."""
    q, k, v, _, offsets = inputs
    out, lse, *_ = _package()._flash_attn_fwd(
        *(calls.pack(x, offsets) for x in (q, k, v)), **_settings(inputs, call), return_lse=True
    )
    return calls.unpack_result(out, lse, inputs)


def backward(dout: Tensor, inputs: Inputs, result: Result, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values."""
    q, k, v, _, offsets = inputs
    dq, dk, dv = _package()._flash_attn_bwd(
        *(calls.pack(x, offsets) for x in (q, k, v, result.out_BHTd, dout)),
        calls.pack_lse(result.lse_BHT, offsets),
        **_settings(inputs, call),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return calls.unpack_gradients(dq, dk, dv, inputs)


def _settings(inputs: Inputs, call: Call) -> dict[str, Any]:
    left, right = calls.window_sides(call)
    settings = {
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size_left": left,
        "window_size_right": right,
    }
    if inputs.offsets is None:
        return settings
    longest = calls.longest_document(inputs, call)
    lengths = {"max_seqlen_q": longest, "max_seqlen_k": longest}
    return {**settings, **lengths, "cu_seqlens_q": inputs.offsets, "cu_seqlens_k": inputs.offsets}


def _package() -> Any:
    from flash_attn.cute import interface  # pyrefly: ignore[missing-import]

    return interface
