"""FLOPs on meta tensors: exactly the matrix products of the active experts."""

import pytest
import torch
import torch.nn.functional as F
from litgpt.model import GPT, LLaMAMoE
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe_ext.moe.layer import NoisyTopKMoE, SharedExpertMoE
from litgpt_moe_ext.patches import flops
from tests.models import moe_config, noisy_config, randomize

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
    dense = GPT_flops(moe_config(mlp_class_name="LLaMAMLP", intermediate_size=3 * F_))
    assert moe == dense + 3 * 2 * 32 * 2 * ROUTER


def GPT_flops(config) -> int:
    with torch.device("meta"):
        model = GPT(config)
        return count(model, torch.randint(0, 1, (2, 32)), backward=True)


def test_the_repair_switches_itself_off():
    class Repaired(torch.nn.Module):
        def forward(self, x):
            return x

    original = Repaired.forward
    flops._repair_llama_moe(Repaired)
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
