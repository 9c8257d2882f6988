"""Auxiliary losses: values by hand, and gradients that are scaled as the training loss is and never change it."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from litgpt_moe_ext.moe.balancing.bias import update_routers
from litgpt_moe_ext.moe.balancing.gradient_injection import forget_scale, inject, present_scale, remember_scale
from litgpt_moe_ext.moe.balancing.losses import (
    cv_squared,
    importance_loss,
    load_balancing_loss,
    load_loss,
    orthogonality_loss,
    router_z_loss,
    sequence_balancing_loss,
)
from litgpt_moe_ext.moe.balancing.metrics import load_metrics, routers_of
from litgpt_moe_ext.moe.layer import NoisyTopKMoE, SharedExpertMoE
from tests.models import initialized_model, moe_config, noisy_config, randomize
from tests.moe.routers import RULES, make_gate, max_violations


@pytest.fixture(autouse=True)
def _no_scale():
    forget_scale()
    yield
    forget_scale()


def test_cv_squared_by_hand():
    """1, 2, 3, 6 have mean 3 and variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    assert cv_squared(torch.tensor([1.0, 2.0, 3.0, 6.0])).item() == pytest.approx(3.5 / 9)
    assert cv_squared(torch.full((5,), 2.0)) == 0
    assert cv_squared(torch.tensor([8.0, 0.0, 0.0, 0.0])).item() == pytest.approx(3.0)


def test_load_balancing_by_hand():
    """Shares of the routed tokens 1/2, 1/2, 0; mean probabilities 0.5, 0.3, 0.2: 3 * (0.25 + 0.15) = 1.2."""
    probabilities = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3]])
    experts = torch.tensor([[0, 1], [1, 0]])
    assert load_balancing_loss(probabilities, experts).item() == pytest.approx(1.2)
    even = torch.full((6, 3), 1 / 3)
    assert load_balancing_loss(even, torch.arange(6).view(6, 1) % 3).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[1.0, 0.0, 0.0]] * 4)
    assert load_balancing_loss(collapsed, torch.zeros(4, 1, dtype=torch.int64)).item() == pytest.approx(3.0)


def test_load_balancing_is_hugging_faces():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(50, 8)
    theirs = load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    ours = load_balancing_loss(logits.softmax(-1), logits.topk(2).indices)
    torch.testing.assert_close(ours, theirs / 2)


def test_sequence_balancing_by_hand():
    """Balanced over the batch, but each sequence sends everything to one expert: 2 * 0.9 in both."""
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    experts = torch.tensor([[0], [0], [1], [1]])
    assert load_balancing_loss(probabilities, experts).item() == pytest.approx(1.0)
    assert sequence_balancing_loss(probabilities, experts, 2).item() == pytest.approx(1.8)


def test_padding_has_no_part_in_losses():
    """Losses and gradients are those of the tokens that are there."""
    T, E, K = 12, 5, 2
    real_T = torch.rand(T, generator=torch.Generator().manual_seed(1)) < 0.6
    clean_TE, noise_TE = torch.randn(2, T, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def losses(clean_TE, real_T=None):
        noisy_TE = clean_TE + noise_TE[: len(clean_TE)]
        weights_TK, experts_TK = noisy_TE.softmax(-1).topk(K)
        if real_T is not None:
            weights_TK = weights_TK.masked_fill(~real_T.unsqueeze(1), 0.0)
            experts_TK = experts_TK.masked_fill(~real_T.unsqueeze(1), E)
        probabilities_TE = clean_TE.softmax(-1)
        return [
            load_balancing_loss(probabilities_TE, experts_TK, real_T),
            router_z_loss(clean_TE, real_T),
            importance_loss(weights_TK, experts_TK, E, real_T),
            load_loss(clean_TE, noisy_TE, torch.full_like(clean_TE, 0.7), K, real_T),
        ]

    noise_TE = torch.cat([noise_TE[real_T], noise_TE[~real_T]])
    real_first_T = torch.arange(T) < real_T.sum()
    alone = clean_TE[real_T].clone().requires_grad_()
    among = torch.cat([clean_TE[real_T], torch.full_like(clean_TE[~real_T], 9.0)]).requires_grad_()
    for ours, theirs in zip(losses(among, real_first_T), losses(alone), strict=True):
        torch.testing.assert_close(ours, theirs)
        (gradient,), (expected,) = torch.autograd.grad(ours, among), torch.autograd.grad(theirs, alone)
        torch.testing.assert_close(gradient[real_first_T], expected)
        assert not gradient[~real_first_T].any()


def test_sequences_with_padding_count_by_their_tokens():
    """Of three and one: their losses, weighed 3 to 1; a sequence of padding alone has none."""
    probabilities_TE = torch.rand(12, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)
    experts_TK = probabilities_TE.topk(2).indices
    real_T = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0]).bool()
    first, second = (
        load_balancing_loss(probabilities_TE[rows], experts_TK[rows]) for rows in (torch.tensor([0, 1, 3]), slice(6, 7))
    )
    padded_TK = experts_TK.masked_fill(~real_T.unsqueeze(1), 5)
    found = sequence_balancing_loss(probabilities_TE, padded_TK, 3, real_T)
    torch.testing.assert_close(found, (3 * first + second) / 4)
    nothing_TK = torch.full_like(padded_TK, 5)
    assert sequence_balancing_loss(probabilities_TE, nothing_TK, 3, torch.zeros(12, dtype=torch.bool)) == 0


def test_a_layer_tells_its_router_the_sequences():
    layer = randomize(SharedExpertMoE(moe_config(router_sequence_balancing_loss_coef=1.0)))

    def loss(x):
        layer(x).sum().backward()
        update_routers([layer.gate])
        return load_metrics(layer)["moe/sequence_balancing_loss"]

    x = torch.randn(2, 6, 16)
    assert loss(x) == pytest.approx((loss(x[:1]) + loss(x[1:])) / 2, rel=1e-5)


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    assert router_z_loss(logits).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_orthogonality_by_hand():
    """Lengths do not count; each pair at 60 degrees has cosine 1/2, twice."""
    assert orthogonality_loss(torch.diag(torch.tensor([1.0, 2.0, 3.0]))).item() == pytest.approx(0)
    assert orthogonality_loss(torch.tensor([[2.0, 0.0], [1.0, 3**0.5]])).item() == pytest.approx(2 * 0.25)
    assert orthogonality_loss(torch.ones(4, 3)).item() == pytest.approx(4 * 3)
    weight = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = orthogonality_loss(weight)
    assert torch.equal(rounded, orthogonality_loss(weight)), "cosines in 16 bits are off by more than they differ"
    weight = weight.bfloat16()
    assert torch.equal(orthogonality_loss(weight), orthogonality_loss(weight.float()))


def test_importance_by_hand():
    """Two tokens give expert 0 weights .75 + 1, expert 1 .25, expert 2 none: mean 2/3."""
    weights = torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    experts = torch.tensor([[0, 1], [0, 2]])
    mean = 2 / 3
    variance = ((1.75 - mean) ** 2 + (0.25 - mean) ** 2 + mean**2) / 3
    assert importance_loss(weights, experts, 3).item() == pytest.approx(variance / mean**2)


def test_load_by_hand():
    """One token, three experts, top 1: the winner must beat the second, the others must beat the winner."""
    clean = torch.tensor([[1.0, 0.5, -1.0]], dtype=torch.float64)
    noisy = torch.tensor([[0.8, 0.9, -0.5]], dtype=torch.float64)
    std = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)

    def phi(x):
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    load = [phi((1.0 - 0.9) / 0.5), phi((0.5 - 0.8) / 1.0), phi((-1.0 - 0.9) / 2.0)]
    mean = sum(load) / 3
    expected = sum((p - mean) ** 2 for p in load) / 3 / mean**2
    assert load_loss(clean, noisy, std, top_k=1).item() == pytest.approx(expected)


def test_load_estimates_the_load():
    """Averaged over the noise, the estimate is the mean number of tokens of each expert."""
    torch.manual_seed(1)
    clean = torch.randn(1, 4).double().expand(200_000, 4)
    std = torch.full_like(clean, 0.7)
    noisy = clean + torch.randn_like(clean) * std
    counts = torch.bincount(noisy.topk(2).indices.flatten(), minlength=4).double()
    expected = cv_squared(counts).item()
    assert load_loss(clean, noisy, std, top_k=2).item() == pytest.approx(expected, rel=0.03)


def gradients(moe, x, make_loss) -> dict[str, torch.Tensor]:
    moe.zero_grad()
    torch.manual_seed(0)
    make_loss(moe(x)).backward()
    return {name: parameter.grad.clone() for name, parameter in moe.named_parameters()}


def explicit_gradients(moe, x, factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The gradients of (training loss + auxiliary losses) * factor, with the auxiliary losses added by hand."""
    router, collected = moe.gate, []
    original, coefs = router.choose, router.loss_coefs

    def choose(x_TD):
        choice = original(x_TD)
        losses = (coef * router.auxiliary_loss(name, choice, x.size(0)) for name, coef in coefs.items())
        collected.append(sum(losses))
        return choice

    router.choose, router.loss_coefs = choose, {}  # nothing is injected
    try:
        return gradients(moe, x, lambda y: (y.square().mean() + collected[-1]) * factor)
    finally:
        del router.choose
        router.loss_coefs = coefs


def make_moe(**settings):
    return randomize(NoisyTopKMoE(noisy_config(**settings)).double(), std=0.3)


ALL_LOSSES = {
    "router_load_balancing_loss_coef": 0.1,
    "router_sequence_balancing_loss_coef": 0.2,
    "router_z_loss_coef": 0.3,
    "router_importance_loss_coef": 0.4,
    "router_orthogonality_loss_coef": 0.5,
}


def assert_equal(ours, theirs):
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-12, rtol=1e-9)


def test_injected_gradients_are_those_of_the_sum():
    moe, x = make_moe(), torch.randn(2, 9, 16, dtype=torch.float64)
    with_losses = gradients(moe, x, lambda y: y.square().mean())
    assert_equal(with_losses, explicit_gradients(moe, x))
    without = make_moe(router_importance_loss_coef=0, router_load_loss_coef=0)
    without.load_state_dict(moe.state_dict())
    plain = gradients(without, x, lambda y: y.square().mean())
    assert (with_losses["gate.weight"] - plain["gate.weight"]).abs().max() > 1e-3
    assert without.gate.loss_coefs == {}


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("names", [*([name] for name in ALL_LOSSES), list(ALL_LOSSES)], ids=lambda n: "+".join(n)[7:40])
def test_every_loss_reaches_the_gate(names, score_function):
    settings = {name: ALL_LOSSES[name] for name in names}
    config = moe_config(router_score_function=score_function, norm_topk_prob=True, **settings)
    moe = randomize(SharedExpertMoE(config).double(), std=0.3)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    ours = gradients(moe, x, lambda y: y.square().mean())
    assert_equal(ours, explicit_gradients(moe, x))
    moe.gate.loss_coefs = {}
    plain = gradients(moe, x, lambda y: y.square().mean())
    assert (ours["gate.weight"] - plain["gate.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("factor", [0.25, 1024.0], ids=["accumulation", "gradient scaler"])
def test_the_loop_scales_auxiliary_losses_too(factor):
    moe, x = make_moe(), torch.randn(2, 9, 16, dtype=torch.float64)
    ours = gradients(moe, x, lambda y: remember_scale(y.square().mean()) * factor)
    assert_equal(ours, explicit_gradients(moe, x, factor))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_activation_checkpointing(use_reentrant):
    moe, x = make_moe(), torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    expected = explicit_gradients(moe, x, 0.5)

    def run(x):
        return checkpoint(moe, x, use_reentrant=use_reentrant)

    moe.zero_grad()
    torch.manual_seed(0)
    (remember_scale(run(x).square().mean()) * 0.5).backward()
    assert_equal({name: p.grad for name, p in moe.named_parameters()}, expected)


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_tiny_weights_under_bfloat16_lose_no_more_than_its_last_bit(scope):
    """And with a factor of the training loss that 16 bits cannot hold."""
    coefs = {"router_z_loss_coef": 1e-6, "router_load_balancing_loss_coef": 1e-6}
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config = moe_config(router_load_balancing_loss_scope=scope, expert_backend="loop", **coefs)
        layer = randomize(SharedExpertMoE(config), 0.3).bfloat16().to(dtype)
        x = torch.randn(2, 50, 16).bfloat16().to(dtype)
        (remember_scale(layer(x).sum() * 0.0) * 0.7 / 3).backward()
        gradients.append(layer.gate.weight.grad.float())
    assert (gradients[1] - gradients[0]).norm() < 2**-8 * gradients[0].norm()


def test_the_training_loss_is_untouched():
    moe, x = make_moe(), torch.randn(2, 9, 16, dtype=torch.float64)
    torch.manual_seed(0)
    with_losses = moe(x)
    assert moe.gate.loss_coefs
    moe.gate.loss_coefs = {}
    torch.manual_seed(0)
    assert torch.equal(with_losses, moe(x))


def test_an_optimizer_step_forgets_the_scale():
    carrier = torch.ones(1, requires_grad=True)
    weight = torch.ones(1, requires_grad=True)
    (remember_scale(carrier.sum()) * 0.5).backward()
    inject(carrier, weight.sum()).sum().backward()
    assert weight.grad.item() == 0.5
    torch.optim.SGD([carrier], lr=0.1).step()
    weight.grad = None
    inject(carrier, weight.sum()).sum().backward()
    assert weight.grad.item() == 1


def train_collapsed(coef: float, steps: int) -> float:
    """Train a noisy router that starts by sending every token to two experts; return MaxVio at the end."""
    torch.manual_seed(0)
    model = initialized_model(noisy_config(router_importance_loss_coef=coef, router_load_loss_coef=coef))
    with torch.no_grad():
        # A direction that all embeddings share, and two experts that answer to it.
        model.transformer.wte.weight[:, 0] = 1.0
        for router in routers_of(model).values():
            router.weight[:2, 0] = 3.0
    first, last = max_violations(model, 6e-3, steps)
    assert first > 2.5
    return last


def test_the_losses_balance_a_collapsed_router():
    assert train_collapsed(0.1, steps=80) < 0.6


def test_without_the_losses_it_stays_collapsed():
    assert train_collapsed(0.0, steps=40) > 1.5


def test_losses_are_logged_by_name():
    """Each with its weight, as the mean over accumulated batches."""
    model = torch.nn.ModuleList([make_moe(**ALL_LOSSES, router_load_loss_coef=0.5)])
    router, recorded = model[0].gate, []
    original = router.auxiliary_loss
    router.auxiliary_loss = lambda name, *rest: recorded.append((name, original(name, *rest))) or recorded[-1][1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model[0](torch.randn(2, 9, 16, dtype=torch.float64)).sum().backward()
    optimizer.step()
    metrics = load_metrics(model)
    assert len(recorded) == 12
    for name, coef in router.loss_coefs.items():
        values = [value.item() for recorded_name, value in recorded if recorded_name == name]
        assert metrics[f"moe/{name}"] == pytest.approx(coef * sum(values) / 2)
        assert metrics[f"moe/{name}"] > 0


def test_litgpts_loop_marks_its_loss():
    import litgpt.pretrain

    model = SharedExpertMoE(moe_config())  # a process without routers has no use for the mark
    logits = torch.randn(1, 4, 8, requires_grad=True)
    targets = torch.randint(0, 8, (1, 4))
    weight = torch.ones(1, requires_grad=True)
    loss = litgpt.pretrain.chunked_cross_entropy(inject(logits, weight.sum()), targets)
    (loss / 4).backward()
    assert weight.grad.item() == 0.25
    del model


def test_a_compiled_layer_follows_the_scale_of_the_loss():
    """From the first step on, and anew after each: what the compiler saw when it traced is no constant."""
    moe = randomize(SharedExpertMoE(moe_config(router_load_balancing_loss_coef=1.0)))
    compiled = torch.compile(moe, backend="aot_eager")
    x = torch.randn(2, 6, 16)
    for scale in (0.25, 8.0):
        gradients = []
        for layer in (moe, compiled):
            moe.zero_grad()
            (remember_scale(layer(x).mean()) * scale).backward()
            gradients.append(moe.gate.weight.grad.clone())
            forget_scale()
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["noisy, all losses", "sigmoid, sequences", "sigmoid, global batch"])
def test_an_empty_batch_has_no_losses(name):
    """Means over no token: gradients and statistics stay numbers, also beside a batch with tokens."""
    gate = make_gate(**RULES[name])
    for tokens in (0, 6):
        x = torch.randn(tokens, 16, requires_grad=True)
        gate(x, 2).weights_TK.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in gate.parameters())
    update_routers([gate])
    assert gate.record.isfinite().all()
    assert gate.record[:8].sum() == 12


def test_a_loss_without_data_or_gradient_has_no_scale():
    """FLOPs are counted before a training, whose first scale it must not be."""
    forget_scale()
    for loss in (torch.ones((), device="meta", requires_grad=True), torch.ones(())):
        assert remember_scale(loss) is loss
    remember_scale(2 * torch.ones((), device="meta", requires_grad=True)).backward()
    assert present_scale(torch.ones(2)) == 1
