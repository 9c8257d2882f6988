"""FLOPs that torch's FLOP counter misses: in MoE layers, grouped products and the `flash-attn` package.

LitGPT 0.5.13 measures the FLOPs of a training step on a meta copy of the model before it trains. Its own `LLaMAMoE`
uses `torch.where` to find the tokens of each expert, which fails on meta tensors: `litgpt pretrain` with
`LLaMAMoE` dies with "The register_meta function for torch.nonzero() raises unimplemented by default". Assuming that
every entry is nonzero avoids the crash but counts every expert for every token. Here, on meta tensors only, the layer
does the work of the active experts: each token passes through `n_expert_per_token` of them.

torch's counter also has no formula for the grouped matrix product or the operators of `flash-attn` (2.7 and newer), and
counts them as 0.

Each part switches itself off: the first when `LLaMAMoE` no longer uses `torch.where`, the others when torch has a
formula. A counter uses the formulas that exist when it is created, so `flash-attn`, which the first attention on a GPU
imports, must have been imported by then.

Shape legend: B batch, T tokens, D model width, K chosen experts per token.
"""

from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from litgpt_moe_ext.attention.kernels.registry import KERNELS, functions_of
from litgpt_moe_ext.host import autoload


def count_llama_moe(model: ModuleType) -> None:
    """Let `LLaMAMoE` do the work of its active experts on meta tensors, unless it can be counted unchanged."""
    layer_class = model.LLaMAMoE
    original = layer_class.forward
    if "where" not in getattr(original, "__code__", original).co_names:
        return

    @wraps(original)
    def forward(self: Any, x: Tensor) -> Tensor:
        return dense_equivalent(self, x) if x.is_meta else original(self, x)

    layer_class.forward = forward


def count_products(flop_counter: ModuleType) -> None:
    """Register formulas for the grouped matrix product and the operators of attention kernels that torch lacks."""
    # Those modules define operators.
    from litgpt_moe_ext.kernels.operator import register_flops
    from litgpt_moe_ext.moe.kernels import grouped  # noqa: F401
    from litgpt_moe_ext.moe.kernels.operators import shared  # noqa: F401
    from litgpt_moe_ext.moe.kernels.routing import orthogonality, router_product  # noqa: F401

    _register_grouped_mm(flop_counter)
    register_flops(flop_counter)
    for kernel in KERNELS.values():
        if kernel.library is not None:
            # Its operators exist only once the library has been imported.
            autoload.when_imported(kernel.library, partial(_register_kernel, kernel.name, flop_counter))


def dense_equivalent(moe: Any, x: Tensor) -> Tensor:
    """Return the output of a `LLaMAMoE` that does only the products of the active experts.

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

    Whatever the ranks of the operands, every row of the left one is multiplied by one group of the right one: rows of a
    two-dimensional operand are divided among the groups, a three-dimensional one has a group per leading index.

    Args:
        a_shape: (M, K) or (G, M, K).
        b_shape: (G, K, N), or (K, N) whose columns (or, with a two-dimensional left operand, whose rows) are divided.
        *args: Ignored.
        **kwargs: Ignored.
    """
    *a_groups, m, k = a_shape
    n = b_shape[-1]
    groups = a_groups[0] if a_groups and len(b_shape) == 3 else 1
    return 2 * groups * m * k * n


def _register_grouped_mm(flop_counter: Any) -> None:
    operator = getattr(torch.ops.aten, "_grouped_mm", None)
    if operator is not None and operator not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(operator)(grouped_mm_flops)


def _register_kernel(name: str, flop_counter: Any, _library: ModuleType) -> None:
    functions: Any = functions_of(name)
    functions.register_flop_formulas(flop_counter)
