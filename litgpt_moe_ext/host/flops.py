"""FLOPs that torch's flop counter misses: in MoE layers, grouped products and the `flash-attn` package.

LitGPT 0.5.13 measures the FLOPs of a training step on a meta copy of the model before it trains. Its own `LLaMAMoE`
asks `torch.where` which tokens go to which expert, which meta tensors cannot answer: `litgpt pretrain` with
`LLaMAMoE` dies with "The register_meta function for torch.nonzero() raises unimplemented by default". Assuming that
every entry is nonzero avoids the crash but counts every expert for every token. Here, on meta tensors only, the layer
does the work of the active experts: each token passes through `n_expert_per_token` of them.

torch's counter also knows no formula for the grouped matrix product, nor for the operators of `flash-attn` (2.7 and
newer), and counts them as nothing.

Each part switches itself off: the first when `LLaMAMoE` no longer uses `torch.where`, the others when there is a
formula. A counter has the formulas that there are when it is made: `flash-attn`, which the first attention on a GPU
imports, must have been imported by then.

Shape legend: B batch, T tokens (of queries), S tokens (of keys), D model width, H heads, G groups, d head size.
"""

from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.host import autoload


def count_llama_moe(model: ModuleType) -> None:
    """Let `LLaMAMoE` do the work of its active experts on meta tensors, unless it can be counted as it is."""
    layer_class = model.LLaMAMoE
    original = layer_class.forward
    if "where" not in getattr(original, "__code__", original).co_names:
        return

    @wraps(original)
    def forward(self: Any, x: Tensor) -> Tensor:
        return dense_equivalent(self, x) if x.is_meta else original(self, x)

    layer_class.forward = forward


def count_products(flop_counter: ModuleType) -> None:
    """Register formulas for the grouped matrix product and the operators of `flash-attn`, where there are none."""
    _register_grouped_mm(flop_counter)
    # Its operators exist only once the package has been imported.
    autoload.when_imported("flash_attn.flash_attn_interface", lambda _: _register_flash_attn(flop_counter))


def dense_equivalent(moe: Any, x: Tensor) -> Tensor:
    """Return the output of a `LLaMAMoE` that multiplies only what the active experts multiply.

    Args:
        moe: The layer.
        x: Hidden states on the meta device, (B, T, D).

    Returns:
        A meta tensor of the same shape, from the router, k experts per token and the shared experts.
    """
    x_TD = x.reshape(-1, x.size(-1))
    top_k = moe.config.n_expert_per_token
    gate = moe.gate(x_TD)
    weights_TK = gate[0] if isinstance(gate, tuple) else gate.topk(top_k, dim=-1).values.softmax(dim=-1)
    y_TKD = moe.experts[0](x_TD.repeat_interleave(top_k, dim=0)).unflatten(0, (-1, top_k))
    y = (y_TKD * weights_TK.unsqueeze(-1).to(x.dtype)).sum(dim=1).view(x.shape)
    return y + moe.shared_experts(x) if moe.config.n_shared_expert else y


def grouped_mm_flops(a_shape: tuple[int, ...], b_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of `torch.nn.functional.grouped_mm`, two per multiply-add.

    Whatever the ranks of its operands, every row of the left operand meets one group of the right one: rows of a
    two-dimensional operand are divided among the groups, a three-dimensional one has a group per leading index.

    Args:
        a_shape: (M, K) or (G, M, K).
        b_shape: (G, K, N), or (K, N) whose columns (or, with a two-dimensional left operand, whose rows) are divided.
        *args: Not looked at.
        **kwargs: Not looked at.
    """
    *a_groups, m, k = a_shape
    n = b_shape[-1]
    groups = a_groups[0] if a_groups and len(b_shape) == 3 else 1
    return 2 * groups * m * k * n


def _register_grouped_mm(flop_counter: Any) -> None:
    operator = getattr(torch.ops.aten, "_grouped_mm", None)
    if operator is not None and operator not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(operator)(grouped_mm_flops)


def flash_attn_flops(q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Return the FLOPs of `flash_attn._flash_attn_forward`, as torch counts `F.scaled_dot_product_attention`.

    A causal mask or a window changes nothing, as in torch. Queries are (B, T, H, d), keys and values (B, S, G, d).
    """
    return _attention_flops(2, q, [(q.size(1), k.size(1))] * q.size(0))


def flash_attn_varlen_flops(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *args: Any,
    out_val: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Return the FLOPs of `flash_attn._flash_attn_varlen_forward`: of attention within each sequence.

    Queries of all sequences are (T, H, d). `cu_q` and `cu_k` say where sequences begin, the last entry where they end;
    without values (on the meta device) all sequences are taken to have the largest length, `max_q` and `max_k`.
    """
    return _attention_flops(2, q, _lengths(q, cu_q, cu_k, max_q, max_k))


def flash_attn_backward_flops(
    dout: Tensor, q: Tensor, k: Tensor, *args: Any, out_val: Any = None, **kwargs: Any
) -> int:
    """Return the FLOPs of `flash_attn._flash_attn_backward`: five products, the scores being computed again."""
    return _attention_flops(5, q, [(q.size(1), k.size(1))] * q.size(0))


def flash_attn_varlen_backward_flops(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *args: Any, out_val: Any = None, **kwargs: Any,
) -> int:  # fmt: skip
    """Return the FLOPs of `flash_attn._flash_attn_varlen_backward`: within each sequence."""
    return _attention_flops(5, q, _lengths(q, cu_q, cu_k, max_q, max_k))


def _attention_flops(products: int, q: Tensor, lengths: list[tuple[int, int]]) -> int:
    # Each product is of T x d by d x S, or of the same three sizes in another order.
    return sum(2 * products * q.size(-2) * n_query * n_key * q.size(-1) for n_query, n_key in lengths)


def _lengths(q: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> list[tuple[int, int]]:
    from torch._subclasses.fake_tensor import FakeTensor

    if cu_q.is_meta or isinstance(cu_q, FakeTensor):
        return [(max_q, max_k)] * (q.size(0) // max_q)
    return list(zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True))


def _register_flash_attn(flop_counter: Any) -> None:
    formulas = {
        "_flash_attn_forward": flash_attn_flops,
        "_flash_attn_varlen_forward": flash_attn_varlen_flops,
        "_flash_attn_backward": flash_attn_backward_flops,
        "_flash_attn_varlen_backward": flash_attn_varlen_backward_flops,
    }
    for name, formula in formulas.items():
        operator = getattr(torch.ops.flash_attn, name, None)
        if operator is not None and operator not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operator, get_raw=True)(formula)
