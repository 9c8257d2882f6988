"""FLOPs on meta tensors: exactly the matrix products of the active experts, and of attention by flash-attn."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from litgpt.model import GPT, LLaMAMoE
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from litgpt_moe_ext.attention.kernels import flash_attn2
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs
from litgpt_moe_ext.host import flops
from litgpt_moe_ext.moe.layer import NoisyTopKMoE, SharedExpertMoE
from tests.models import attention_config, dense_config, moe_config, noisy_config, randomize

B, T, D, F_, K, E = 3, 10, 16, 12, 2, 8
EXPERT = 3 * 2 * D * F_  # three matrices, two operations per multiply-add, for one token
ROUTER = 2 * D * E


def count(module: torch.nn.Module, x: torch.Tensor, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        output = module(x)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def on_meta(cls: type, config) -> tuple[torch.nn.Module, torch.Tensor]:
    with torch.device("meta"):
        return cls(config), torch.empty(B, T, D, requires_grad=True)


CASES = [
    (SharedExpertMoE, moe_config(), K * EXPERT + ROUTER),
    (SharedExpertMoE, moe_config(n_shared_expert=2), (K + 2) * EXPERT + ROUTER),
    (NoisyTopKMoE, noisy_config(), K * EXPERT + 2 * ROUTER),
    (LLaMAMoE, moe_config(mlp_class_name="LLaMAMoE"), K * EXPERT + ROUTER),
    (LLaMAMoE, moe_config(mlp_class_name="LLaMAMoE", n_shared_expert=1), (K + 1) * EXPERT + ROUTER),
    (
        LLaMAMoE,
        moe_config(mlp_class_name="LLaMAMoE", n_expert_groups=4, n_topk_groups=2, n_topk_scores_per_group=2),
        K * EXPERT + ROUTER,
    ),
]


@pytest.mark.parametrize(("cls", "config", "per_token"), CASES)
def test_by_hand(cls, config, per_token):
    assert count(*on_meta(cls, config)) == B * T * per_token
    assert count(*on_meta(cls, config), backward=True) == 3 * B * T * per_token


@pytest.mark.parametrize(("cls", "config", "per_token"), CASES)
def test_meta_counts_equal_real_counts(cls, config, per_token):
    real = randomize(cls(config))
    # Enough tokens for every expert to have more than one: a single row is multiplied twice.
    x = torch.randn(20 * B, T, D)
    assert count(real, x) == x[..., 0].numel() * per_token


def test_litgpt_layer_on_real_tensors_is_untouched():
    """The repair is for meta tensors only: on others LitGPT's own code runs, bit for bit."""
    layer = randomize(LLaMAMoE(moe_config(mlp_class_name="LLaMAMoE")))
    x = torch.randn(B, T, D)
    assert torch.equal(layer(x), LLaMAMoE.forward.__wrapped__(layer, x))
    with pytest.raises(NotImplementedError, match="nonzero"):
        LLaMAMoE.forward.__wrapped__(*on_meta(LLaMAMoE, moe_config(mlp_class_name="LLaMAMoE")))


def test_an_moe_counts_as_its_dense_twin_of_equal_active_size():
    """A whole model with attention: equal up to the router."""
    moe = GPT_flops(moe_config(n_shared_expert=1, attention_class_name="SinkAttention"))
    dense = GPT_flops(dense_config(intermediate_size=3 * F_))
    assert moe == dense + 3 * 2 * 32 * 2 * ROUTER


@pytest.mark.parametrize(
    "window", [{}, {"sliding_window_size": 4, "sliding_window_indices": [1, 1]}], ids=["", "window"]
)
def test_documents_count_as_one_in_its_window(window):
    """Where they end depends on the data; what a window hides is not computed in them either."""
    documents = {"attention_document_boundary": "eos", "attention_document_token_id": 3}
    whole = GPT_flops(attention_config(**window))
    assert GPT_flops(attention_config(**window, **documents)) == whole
    assert (whole < GPT_flops(attention_config())) == bool(window)


def GPT_flops(config) -> int:
    with torch.device("meta"):
        model = GPT(config)
        return count(model, torch.randint(0, 1, (2, 32)), backward=True)


def test_the_repair_switches_itself_off():
    class Repaired(torch.nn.Module):
        def forward(self, x):
            return x

    original = Repaired.forward
    flops.count_llama_moe(SimpleNamespace(LLaMAMoE=Repaired))
    assert Repaired.forward is original


@pytest.mark.parametrize(
    ("a", "b", "ends"),
    [((12, 16), (3, 16, 24), [4, 8, 12]), ((16, 16), (16, 24), [4, 8, 16]), ((3, 8, 16), (3, 16, 24), None)],
    ids=["rows by expert", "gradient of weights", "batched"],
)
def test_grouped_mm(a, b, ends):
    left, right = torch.randn(a, dtype=torch.bfloat16), torch.randn(b, dtype=torch.bfloat16)
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        F.grouped_mm(left, right, offs=offsets)
    expected = 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == len(b) == 3 else 1)
    assert counter.get_total_flops() == expected


# The operators of flash-attn 2.8 with their schemas. What they compute is not asked for here.
FLASH_ATTN = """
from typing import Optional, Tuple

import torch
from torch import Tensor


def operator(function, mutates_args=()):
    made = torch.library.custom_op("flash_attn::" + function.__name__, function, mutates_args=mutates_args)
    made.register_fake(function)
    return made


@operator
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Optional[Tensor], return_softmax: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2)


@operator
def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Optional[Tensor] = None, return_softmax: bool = False,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.size(1), q.size(0), dtype=torch.float32)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2)


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Optional[Tensor],
    dk: Optional[Tensor], dv: Optional[Tensor], dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: Optional[Tensor],
    deterministic: bool, rng_state: Optional[Tensor] = None,
) -> Tensor:
    return softmax_lse.clone()


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Optional[Tensor],
    dk: Optional[Tensor], dv: Optional[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Optional[Tensor], deterministic: bool,
    rng_state: Optional[Tensor] = None, zero_tensors: bool = False,
) -> Tensor:
    return softmax_lse.clone()


_flash_attn_backward = operator(_flash_attn_backward, ("dq", "dk", "dv"))
_flash_attn_varlen_backward = operator(_flash_attn_varlen_backward, ("dq", "dk", "dv"))
"""


@pytest.fixture
def flash_attn_package(tmp_path, monkeypatch):
    """Put a package on the path that has the operators of flash-attn, where the real one is not installed."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    (tmp_path / "flash_attn" / "flash_attn_interface.py").write_text(FLASH_ATTN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("flash_attn.flash_attn_interface", "flash_attn"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu not in flop_registry,
    reason="torch 2.10 does not count its own attention on CPUs",
)
@pytest.mark.usefixtures("flash_attn_package")
def test_flash_attn_counts_as_sdpa():
    importlib.import_module("flash_attn.flash_attn_interface")
    sequences, heads, groups, length, head_size = 2, 4, 2, 24, 8

    def measure(device: str, documents: list[int] | None = None, window: int | None = None) -> tuple[int, int]:
        q, k, v = (
            torch.empty(sequences, n, length, head_size, dtype=torch.bfloat16, device=device)
            for n in (heads, groups, groups)
        )
        offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32, device=device)
        call, inputs = Call("flash_attn", 0.4, True, window, 0.0), Inputs(q, k, v, None, offsets)
        with FlopCounterMode(display=False) as forward:
            result = flash_attn2.forward(inputs, call)
        with FlopCounterMode(display=False) as backward:
            flash_attn2.backward(result.out_BHTd, inputs, result, call)
        return forward.get_total_flops(), backward.get_total_flops()

    shape = sequences, groups, length, head_size
    kv = torch.empty(shape, dtype=torch.bfloat16)
    q = torch.empty(sequences, heads, length, head_size, dtype=torch.bfloat16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = F.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    expected = forward.get_total_flops(), backward.get_total_flops()
    assert expected[0] > 0
    assert measure("meta") == measure("cpu") == measure("meta", window=4) == expected
    # Documents of 24, 8, 16 and two empty ones; without values every sequence is one.
    pairs = 24**2 + 8**2 + 16**2
    documents = [0, 24, 32, 48, 48, 48]
    assert measure("cpu", documents) == tuple(n * pairs // (sequences * length**2) for n in expected)
    assert measure("meta", documents) == expected
