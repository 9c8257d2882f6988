"""The `flash-attn` package, 2.7 or newer, with sliding windows and documents. Not run on a card yet."""

from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.attention.kernels import calls
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs, Result


def forward(inputs: Inputs, call: Call) -> Result:
    """Compute causal attention, within windows and documents if there are any."""
    q, k, v, _, offsets = inputs
    settings = {**_settings(call), "return_softmax": False}
    packed = [calls.pack(x, offsets) for x in (q, k, v)]
    package = _package()
    if offsets is None:
        out, lse, _, rng_state = package._flash_attn_forward(*packed, **settings)
    else:
        longest = calls.longest_document(inputs, call)
        out, lse, _, rng_state = package._flash_attn_varlen_forward(
            *packed, offsets, offsets, longest, longest, **settings
        )
    return calls.unpack_result(out, lse, inputs, (rng_state,))


def backward(dout: Tensor, inputs: Inputs, result: Result, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of queries, keys and values."""
    q, k, v, _, offsets = inputs
    settings = {
        **_settings(call),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "rng_state": result.rest[0],
    }
    packed = [calls.pack(x, offsets).contiguous() for x in (dout, q, k, v, result.out_BHTd)]
    # The package writes gradients into given tensors.
    gradients = [torch.empty_like(x) for x in packed[1:4]]
    lse = calls.pack_lse(result.lse_BHT, offsets).contiguous()
    package = _package()
    if offsets is None:
        package._flash_attn_backward(*packed, lse, *gradients, **settings)
    else:
        longest = calls.longest_document(inputs, call)
        lengths = (offsets, offsets, longest, longest)
        package._flash_attn_varlen_backward(*packed, lse, *gradients, *lengths, **settings)
    dq, dk, dv = gradients
    return calls.unpack_gradients(dq, dk, dv, inputs)


def register_flop_formulas(flop_counter: Any) -> None:
    """Give the package's operators the FLOP formulas that torch has for `F.scaled_dot_product_attention`.

    As in torch, a causal mask or a window changes nothing.

    Args:
        flop_counter: The module `torch.utils.flop_counter`.
    """
    formulas = {
        "_flash_attn_forward": forward_flops,
        "_flash_attn_varlen_forward": varlen_forward_flops,
        "_flash_attn_backward": backward_flops,
        "_flash_attn_varlen_backward": varlen_backward_flops,
    }
    for name, formula in formulas.items():
        operator = getattr(torch.ops.flash_attn, name, None)
        if operator is not None and operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator, get_raw=True)(formula)


def forward_flops(q_BTHd: Tensor, k_BSGd: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of `_flash_attn_forward`: two products."""
    return _flops(2, q_BTHd, [(q_BTHd.size(1), k_BSGd.size(1))] * q_BTHd.size(0))


def backward_flops(
    dout_BTHd: Tensor, q_BTHd: Tensor, k_BSGd: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    """Return the FLOPs of `_flash_attn_backward`: the scores again, and two products for each of the forward's."""
    return _flops(5, q_BTHd, [(q_BTHd.size(1), k_BSGd.size(1))] * q_BTHd.size(0))


def varlen_forward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of `_flash_attn_varlen_forward`: attention within each sequence.

    Args:
        args: The operator's: q, k, v, offsets of queries and of keys, largest lengths of both. On the meta device all
            sequences are taken to have the largest length.
        out_val: The operator's result.
        kwargs: The operator's other settings.
    """
    return _flops(2, args[0], _lengths(args[0], args[3:7]))


def varlen_backward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of `_flash_attn_varlen_backward`.

    Args:
        args: The operator's: dout, q, k, v, out, lse, dq, dk, dv, then as in the forward from the offsets on.
        out_val: The operator's result.
        kwargs: The operator's other settings.
    """
    return _flops(5, args[1], _lengths(args[1], args[9:13]))


def _flops(products: int, q: Tensor, lengths: list[tuple[int, int]]) -> int:
    # Each product is of T x d by d x S, or of the same three sizes in another order.
    return sum(2 * products * q.size(-2) * n_query * n_key * q.size(-1) for n_query, n_key in lengths)


def _lengths(q: Tensor, offsets: tuple[Any, ...]) -> list[tuple[int, int]]:
    from torch._subclasses.fake_tensor import FakeTensor

    of_queries, of_keys, longest_query, longest_key = offsets
    if of_queries.is_meta or isinstance(of_queries, FakeTensor):
        return [(longest_query, longest_key)] * (q.size(0) // longest_query)
    return list(zip(of_queries.diff().tolist(), of_keys.diff().tolist(), strict=True))


def _settings(call: Call) -> dict[str, Any]:
    left, right = (-1 if side is None else side for side in calls.window_sides(call))
    return {
        "dropout_p": call.dropout,
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _package() -> Any:
    # Optional, and it loads CUDA code.
    from flash_attn import flash_attn_interface  # pyrefly: ignore[missing-import]

    return flash_attn_interface
