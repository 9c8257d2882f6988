"""Flash kernels that return the log-sum-exp of the scores, behind one signature.

`forward` returns `out`, `lse` and what its `backward` needs besides them. `backward` recomputes the probabilities as
`exp(score - lse)` and takes `rowsum(dout * out)` from what it is given, so that a caller may hand it an `out` and `lse`
of a softmax with one more column (see `sinks.py`).

Shape suffixes: B batch, H query heads, G key/value heads, T queries, S keys, D head size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten


class Call(NamedTuple):
    """What a kernel is to compute, apart from tensors.

    Attributes:
        scale: Multiplied to the scores.
        causal: Whether a query sees only keys up to its own position.
        window: Number of visible keys, the query's own included; only for kernels in `FUSED_PATTERNS`.
        dropout: Probability of dropping an attention weight.
    """

    scale: float
    causal: bool
    window: int | None
    dropout: float


class Kernel(NamedTuple):
    """A pair of functions.

    Attributes:
        forward: (q_BHTD, k_BGSD, v_BGSD, mask, offsets, call) -> (out_BHTD, lse_BHT, rest). `mask` is additive;
            `offsets` are where the documents begin in the B * T tokens, int32, last entry B * T.
        backward: (dout_BHTD, q_BHTD, k_BGSD, v_BGSD, mask, offsets, out_BHTD, lse_BHT, rest, call) -> (dq, dk, dv).
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _flash_cpu_forward(q: Any, k: Any, v: Any, mask: Any, offsets: None, call: Call) -> Any:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, call.causal, attn_mask=mask, scale=call.scale
    )
    return out, lse, ()


def _flash_cpu_backward(
    dout: Any, q: Any, k: Any, v: Any, mask: Any, offsets: None, out: Any, lse: Any, rest: tuple, call: Call
) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, call.causal, attn_mask=mask, scale=call.scale
    )


def _flash_forward(q: Any, k: Any, v: Any, mask: None, offsets: Any, call: Call) -> Any:
    if offsets is None and call.window is None:
        # The same kernel; torch's flop counter reads the shapes of this operator right.
        out, lse, _, _, _, _, rng_state, unused, _ = aten._scaled_dot_product_flash_attention(
            q, k, v, call.dropout, call.causal, False, scale=call.scale
        )
        return out, lse, (rng_state, unused)
    left, right = _window_sides(call)
    out, lse, rng_state, unused, _ = aten._flash_attention_forward(
        *(_pack(x, offsets) for x in (q, k, v)), offsets, offsets, q.size(2), k.size(2), call.dropout, call.causal,
        False, scale=call.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return _unpack(out, q, offsets), _unpack_lse(lse, q, offsets), (rng_state, unused)


def _flash_backward(
    dout: Any, q: Any, k: Any, v: Any, mask: None, offsets: Any, out: Any, lse: Any, rest: tuple, call: Call
) -> Any:
    if offsets is None and call.window is None:
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.size(2), k.size(2), call.dropout, call.causal, *rest,
            scale=call.scale,
        )  # fmt: skip
    left, right = _window_sides(call)
    dq, dk, dv = aten._flash_attention_backward(
        *(_pack(x, offsets) for x in (dout, q, k, v, out)), _pack_lse(lse, offsets), offsets, offsets, q.size(2),
        k.size(2), call.dropout, call.causal, *rest, scale=call.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return _unpack(dq, q, offsets), _unpack(dk, k, offsets), _unpack(dv, v, offsets)


def _cudnn_forward(q: Any, k: Any, v: Any, mask: None, offsets: None, call: Call) -> Any:
    out, lse_BHT1, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, call.dropout, call.causal, False, scale=call.scale
    )
    return out, lse_BHT1.squeeze(-1), (seed, offset)


def _cudnn_backward(
    dout: Any, q: Any, k: Any, v: Any, mask: None, offsets: None, out: Any, lse: Any, rest: tuple, call: Call
) -> Any:
    return aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1), *rest, None, None, None, q.size(2), k.size(2), call.dropout, call.causal,
        scale=call.scale,
    )  # fmt: skip


def _efficient_forward(q: Any, k: Any, v: Any, mask: None, offsets: None, call: Call) -> Any:
    k, v = _repeat_groups(k, q), _repeat_groups(v, q)
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, call.dropout, call.causal, scale=call.scale
    )
    return out, lse[..., : q.size(2)], (seed, offset)


def _efficient_backward(
    dout: Any, q: Any, k: Any, v: Any, mask: None, offsets: None, out: Any, lse: Any, rest: tuple, call: Call
) -> Any:
    # The kernel reads lse in rows of a multiple of 32, and wants infinity where there is no query.
    lse = torch.nn.functional.pad(lse, (0, -lse.size(-1) % 32), value=float("inf"))
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, _repeat_groups(k, q), _repeat_groups(v, q), None, out, lse, *rest, call.dropout,
        [True, True, True, False], call.causal, scale=call.scale,
    )  # fmt: skip
    return dq, _sum_groups(dk, k), _sum_groups(dv, v)


def _flash_attn_forward(q: Any, k: Any, v: Any, mask: None, offsets: Any, call: Call) -> Any:
    from flash_attn import flash_attn_interface as package

    left, right = (-1 if side is None else side for side in _window_sides(call))
    settings = {
        "dropout_p": call.dropout,
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": 0.0,
        "alibi_slopes": None,
        "return_softmax": False,
    }
    packed = [_pack(x, offsets) for x in (q, k, v)]
    if offsets is None:
        out, lse, _, rng_state = package._flash_attn_forward(*packed, **settings)
    else:
        out, lse, _, rng_state = package._flash_attn_varlen_forward(
            *packed, offsets, offsets, q.size(2), k.size(2), **settings
        )
    return _unpack(out, q, offsets), _unpack_lse(lse, q, offsets), (rng_state,)


def _flash_attn_backward(
    dout: Any, q: Any, k: Any, v: Any, mask: None, offsets: Any, out: Any, lse: Any, rest: tuple, call: Call
) -> Any:
    from flash_attn import flash_attn_interface as package

    left, right = (-1 if side is None else side for side in _window_sides(call))
    settings = {
        "dropout_p": call.dropout,
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "rng_state": rest[0],
    }
    packed = [_pack(x, offsets).contiguous() for x in (dout, q, k, v, out)]
    # The package writes the gradients into tensors that it is given.
    dq, dk, dv = grads = [torch.empty_like(x) for x in packed[1:4]]
    lse = _pack_lse(lse, offsets).contiguous()
    if offsets is None:
        package._flash_attn_backward(*packed, lse, *grads, **settings)
    else:
        package._flash_attn_varlen_backward(*packed, lse, *grads, offsets, offsets, q.size(2), k.size(2), **settings)
    return _unpack(dq, q, offsets), _unpack(dk, k, offsets), _unpack(dv, v, offsets)


KERNELS = {
    "flash_cpu": Kernel(_flash_cpu_forward, _flash_cpu_backward),
    "flash_attn": Kernel(_flash_attn_forward, _flash_attn_backward),
    "flash": Kernel(_flash_forward, _flash_backward),
    "cudnn": Kernel(_cudnn_forward, _cudnn_backward),
    "efficient": Kernel(_efficient_forward, _efficient_backward),
}


def _window_sides(call: Call) -> tuple[int | None, int | None]:
    # How many keys to the left and to the right of its own position a query sees.
    return (None, None) if call.window is None else (call.window - 1, 0)


def _pack(x_BHTD: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    # (B, T, H, D), the layout of the flash kernels, or (B * T, H, D) for documents.
    x_BTHD = x_BHTD.transpose(1, 2)
    return x_BTHD if offsets is None else x_BTHD.flatten(0, 1)


def _unpack(packed: torch.Tensor, like_BHTD: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    x_BTHD = packed if offsets is None else packed.unflatten(0, (like_BHTD.size(0), like_BHTD.size(2)))
    return x_BTHD.transpose(1, 2)


def _pack_lse(lse_BHT: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    return lse_BHT if offsets is None else lse_BHT.transpose(0, 1).flatten(1)


def _unpack_lse(lse: torch.Tensor, q_BHTD: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    return lse if offsets is None else lse.unflatten(1, (q_BHTD.size(0), q_BHTD.size(2))).transpose(0, 1)


def _repeat_groups(x_BGSD: torch.Tensor, q_BHTD: torch.Tensor) -> torch.Tensor:
    n = q_BHTD.size(1) // x_BGSD.size(1)
    return x_BGSD if n == 1 else x_BGSD.repeat_interleave(n, dim=1)


def _sum_groups(dx_BHSD: torch.Tensor, x_BGSD: torch.Tensor) -> torch.Tensor:
    return dx_BHSD if dx_BHSD.size(1) == x_BGSD.size(1) else dx_BHSD.unflatten(1, (x_BGSD.size(1), -1)).sum(2)
