"""Which experts the routers choose, in what precision, and how they start."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from litgpt_moe_ext.moe.layer import SharedExpertMoE
from litgpt_moe_ext.moe.routing.learned_routers import NoisyTopKRouter, TopKRouter
from tests.models import initialized_model, moe_config, noisy_config, randomize


def grouped(**settings):
    return randomize(TopKRouter(moe_config(**settings)))


GROUPS = {"n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 1}


def test_unselected_groups_lose_against_negative_scores():
    """With a mask of 0 instead of minus infinity, experts of unselected groups would win here."""
    router = grouped(**GROUPS)
    router.e_score_correction_bias.fill_(-2.0)
    x = torch.randn(50, 16)
    scores = torch.sigmoid(x @ router.weight.T) - 2.0
    allowed = scores.view(50, 4, 2).amax(-1).topk(2).indices
    assert all(expert // 2 in allowed[t] for t, row in enumerate(router(x).experts_TK) for expert in row)


@given(
    groups=st.sampled_from([None, (2, 1), (4, 1), (4, 3), (8, 2)]),
    top_k=st.integers(1, 2),
    tokens=st.integers(1, 9),
    score_function=st.sampled_from(["sigmoid", "softmax"]),
    bias=st.floats(-3, 3),
)
def test_a_routing_is_consistent(groups, top_k, tokens, score_function, bias):
    settings = {}
    if groups is not None:
        settings = {"n_expert_groups": groups[0], "n_topk_groups": groups[1], "n_topk_scores_per_group": 1}
        top_k = min(top_k, 8 // groups[0] * groups[1])
    router = grouped(n_expert_per_token=top_k, norm_topk_prob=True, router_score_function=score_function, **settings)
    router.e_score_correction_bias.fill_(bias)
    x = torch.randn(tokens, 16)
    routing = router(x)
    logits = x @ router.weight.T
    positive = logits.sigmoid() if score_function == "sigmoid" else logits.softmax(-1)
    torch.testing.assert_close(router.scores(x), positive / positive.sum(-1, keepdim=True))
    assert routing.experts_TK.shape == routing.weights_TK.shape == (tokens, top_k)
    assert all(len(set(row.tolist())) == top_k for row in routing.experts_TK), "an expert twice for one token"
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.ones(tokens))
    assert torch.equal(routing.counts_E, torch.bincount(routing.experts_TK.flatten(), minlength=8))


def test_the_bias_chooses_but_does_not_weigh():
    router = grouped(n_expert_per_token=1, routed_scaling_factor=0.5)
    x = torch.randn(20, 16)
    router.e_score_correction_bias[3] = 10.0
    routing = router(x)
    assert (routing.experts_TK == 3).all()
    torch.testing.assert_close(routing.weights_TK[:, 0], 0.5 * torch.sigmoid(x @ router.weight[3]))


@pytest.mark.parametrize("make", [grouped, lambda: randomize(NoisyTopKRouter(noisy_config()))])
def test_arithmetic_is_float32_whatever_the_model(make):
    """Logits that differ in the 12th bit: bfloat16 could not tell them apart."""
    router = make().eval()
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = 1.0
        router.weight[5, 1] = 2.0**-12
    x = torch.zeros(4, 16)
    x[:, :2] = 1.0
    router.top_k = 1
    assert (router(x).experts_TK == 5).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert (router(x).experts_TK == 5).all()
    half = router.bfloat16()(x.bfloat16())
    assert (half.experts_TK == 5).all()
    assert half.weights_TK.dtype == torch.float32


@pytest.mark.parametrize("convert", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double()])
def test_bias_stays_float32(convert):
    router = grouped(router_bias_update_schedule={"warmup_steps": 9})
    router.e_score_correction_bias.copy_(torch.arange(8) * 1e-3 + 0.5)
    router.bias_updates.fill_(4097)
    before = router.e_score_correction_bias.clone()
    convert(router)
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, before)
    assert router.bias_updates.item() == 4097, "which 16 bits do not hold"
    router.to("meta", torch.bfloat16)
    assert router.e_score_correction_bias.is_meta


def test_bias_follows_the_device():
    with torch.device("meta"):
        router = TopKRouter(moe_config())
    router.bfloat16()
    assert router.e_score_correction_bias.is_meta
    router.to_empty(device="cpu").reset_parameters()
    assert router.e_score_correction_bias.tolist() == [0.0] * 8
    router(torch.randn(3, 16)).weights_TK.sum().backward()
    assert router.tally.take()[:8].sum() == 6


def test_noise_only_in_training():
    router = randomize(NoisyTopKRouter(noisy_config()))
    x = torch.randn(64, 16)
    assert not torch.equal(router(x).weights_TK, router(x).weights_TK)
    assert copy.deepcopy(router).bfloat16().choose(x.bfloat16()).std_TE.dtype == torch.float32
    router.eval()
    assert torch.equal(router(x).weights_TK, router(x).weights_TK)


def test_noise_has_the_learned_deviation():
    """Equation 4 of arXiv:1701.06538: the deviation of the logits is softplus(x W_noise)."""
    router = NoisyTopKRouter(noisy_config(n_expert=2, n_expert_per_token=2))
    with torch.no_grad():
        router.weight.zero_()
        router.noise_weight.zero_()
        router.noise_weight[1] = 1.0
    x = torch.full((20000, 16), 0.25)
    choice = router.choose(x)
    assert not choice.logits_TE.any(), "losses go by logits without noise"
    weights = choice.weights_TK.gather(1, choice.experts_TK.argsort(1))
    logit_difference = (weights[:, 1] / weights[:, 0]).log()
    expected = math.sqrt(math.log(2) ** 2 + math.log1p(math.exp(4)) ** 2)
    assert logit_difference.std().item() == pytest.approx(expected, rel=0.03)
    weights.sum().backward()


def test_noise_weights_learn():
    router = randomize(NoisyTopKRouter(noisy_config()))
    routing = router(torch.randn(32, 16))
    routing.weights_TK[:, 0].sum().backward()
    assert router.noise_weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "config", [moe_config(n_embd=64, n_layer=4, n_shared_expert=1), noisy_config(n_embd=64, n_layer=4)]
)
def test_initialisation_under_pretrain(config):
    """LitGPT's scheme: sqrt(2 / 5 / n_embd), and 1 / sqrt(n_embd) / n_layer for what writes to the residual stream."""
    model = initialized_model(config)
    std_in, std_out = math.sqrt(2 / 5 / 64), 1 / 8 / 4
    for block in model.transformer.h:
        moe = block.mlp
        assert moe.gate.weight.std().item() == pytest.approx(std_in, rel=0.1)
        assert moe.experts.gate_up_proj.std().item() == pytest.approx(std_in, rel=0.05)
        assert moe.experts.down_proj.std().item() == pytest.approx(std_out, rel=0.05)
        for parameter in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj):
            assert abs(parameter.mean().item()) < 0.2 * parameter.std().item()
        assert len({round(expert.std().item(), 9) for expert in moe.experts.down_proj}) == 8, "experts must differ"
        if moe.shared_experts is not None:
            assert moe.shared_experts.proj.weight.std().item() == pytest.approx(std_out, rel=0.1)
        if isinstance(moe.gate, TopKRouter):
            assert moe.gate.e_score_correction_bias.tolist() == [0.0] * 8
        else:
            assert moe.gate.noise_weight.abs().sum() == 0
    logits = model(torch.randint(0, 64, (2, 32)))
    assert logits.std() < 2


def test_biases_start_at_zero():
    """Whatever is in their memory."""
    schedule = {"warmup_steps": 3}
    layer = SharedExpertMoE(moe_config(router_bias=True, bias=True, router_bias_update_schedule=schedule))
    names = (
        "gate.bias",
        "gate.e_score_correction_bias",
        "gate.bias_updates",
        "experts.gate_up_bias",
        "experts.down_bias",
    )
    for module, name in (name.split(".") for name in names):
        torch.nn.init.ones_(getattr(getattr(layer, module), name))
    layer.gate.reset_parameters()
    layer.experts.reset_parameters()
    assert not any(getattr(getattr(layer, module), name).any() for module, name in (name.split(".") for name in names))


def test_jitter_changes_the_routers_input_in_training_only():
    """Factors from 0.5 to 1.5 on each element; the weights of a linear map from a single element show them."""
    router = grouped(n_embd=1, n_head=1, n_query_groups=1, router_jitter_noise=0.5, n_expert_per_token=8)
    x = torch.full((4000, 1), 2.0)
    factors = router.logits(x)[:, 0] / (2.0 * router.weight[0])
    assert 0.5 <= factors.min() < 0.51
    assert 1.49 < factors.max() <= 1.5
    assert len(router.logits(x.bfloat16()).unique()) > 3000, "of 16 bits there are 192 in this range"
    router.eval()
    assert torch.equal(router.logits(x), torch.nn.functional.linear(x, router.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gates_have_exact_gradients(dtype):
    router = grouped().to(dtype)
    x = torch.randn(6, 16, dtype=dtype, requires_grad=True)
    upstream = torch.randn(6, 8)
    router.project(x, router.weight).backward(upstream)
    wide = x.detach().float().requires_grad_()
    weight = router.weight.detach().float().requires_grad_()
    torch.nn.functional.linear(wide, weight).backward(upstream)
    assert torch.equal(x.grad, wide.grad.to(dtype))
    assert torch.equal(router.weight.grad, weight.grad.to(dtype))


def test_softmax_after_or_before_top_k():
    """Normalised softmax scores are the softmax over the chosen logits: Mixtral's and GPT-OSS' order."""
    x = torch.randn(30, 16)
    after, before = (grouped(router_score_function="softmax", norm_topk_prob=n) for n in (True, False))
    before.load_state_dict(after.state_dict())
    logits = x @ after.weight.T
    best = logits.topk(2)
    expected = best.values.softmax(-1)
    torch.testing.assert_close(sort_by_expert(after(x)), expected.gather(1, best.indices.argsort(1)))
    expected = logits.softmax(-1).gather(1, best.indices)
    torch.testing.assert_close(sort_by_expert(before(x)), expected.gather(1, best.indices.argsort(1)))


def sort_by_expert(routing):
    return routing.weights_TK.gather(1, routing.experts_TK.argsort(1))
