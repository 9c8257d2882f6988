"""What operators return for meta tensors, against what torch's own kernels return for tensors on a CPU."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litgpt_moe_ext.meta.kernels import KERNELS

aten = torch.ops.aten
INDEX = torch.tensor([[0, 2, 1]])


def call(name: str, x: torch.Tensor) -> tuple:
    """Return an operator that has a kernel here, and arguments for it: (2, 3, 4, 8), strided in many ways."""
    weight, bias, flat = torch.ones(8, dtype=x.dtype), torch.ones(8), x.flatten()
    match name:
        case "embedding":
            return aten.embedding.default, x[0, 0], INDEX
        case "embedding_dense_backward":
            return aten.embedding_dense_backward.default, x[0, :1], INDEX.new_tensor([[0, 2, 1, 1]]), 5, -1, False
        case "index_select":
            return aten.index_select.default, x, -2, INDEX[0]
        case "layer_norm":
            return aten.native_layer_norm.default, x, [4, 8], None, None, 1e-5
        case "layer_norm_weight":
            return aten.native_layer_norm.default, x, [8], weight.float(), bias, 1e-5
        case "layer_norm_backward":
            _, mean, rstd = aten.native_layer_norm.default(x, [8], weight, None, 1e-5)
            wanted = [True, True, False]
            return aten.native_layer_norm_backward.default, x, x, [8], mean, rstd, weight, None, wanted
        case "attention":
            return aten._scaled_dot_product_flash_attention_for_cpu.default, x, x, x, 0.0, True
        case "attention_backward":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(x, x, x, 0.0, True)
            return aten._scaled_dot_product_flash_attention_for_cpu_backward.default, x, x, x, x, out, lse, 0.0, True
        case "dot":
            return aten.dot.default, flat, flat
        case "logsumexp":
            return aten.logsumexp.default, x, [-1]
        case "relu":
            return aten.relu.default, x
        case "shift":
            return aten.__rshift__.Scalar, x.long(), 3
        case "where":
            return aten.where.self, x[:1] > 0, x, torch.zeros((), dtype=x.dtype)
        case "where_between":
            return aten.where.self, x > 0, x[..., :1], x.transpose(0, 1).contiguous().transpose(0, 1)
        case "softmax":
            return aten._safe_softmax.default, x, -1
        case "softmax_float32":
            return aten._safe_softmax.default, x, -1, torch.float32
        case "var":
            return aten.var.correction, flat
    return partial(aten.var.correction, keepdim=True), x, [1, -1]


NAMES = (
    "embedding", "embedding_dense_backward", "index_select", "layer_norm", "layer_norm_weight", "layer_norm_backward",
    "attention", "attention_backward", "dot", "logsumexp", "relu", "shift", "where", "where_between", "softmax",
    "softmax_float32", "var", "var_of_dimensions",
)  # fmt: skip


def kind(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return [kind(item) for item in value] if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("name", NAMES)
@given(order=st.permutations(range(4)), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_kernels_return_what_a_cpu_returns(name, order, dtype):
    size = (2, 3, 4, 8)
    x = torch.ones([size[i] for i in order], dtype=dtype).permute([order.index(i) for i in range(4)])
    operator, *arguments = call(name, x)
    meta = [argument.to("meta") if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    options = getattr(operator, "keywords", {})
    kernel = KERNELS[getattr(operator, "func", operator)]
    assert kind(kernel(*meta, **options)) == kind(operator(*arguments))


def test_every_kernel_is_held_against_torchs():
    operators = [call(name, torch.ones(2, 3, 4, 8))[0] for name in NAMES]
    assert {getattr(operator, "func", operator) for operator in operators} == set(KERNELS)
