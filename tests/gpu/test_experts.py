"""Every expert backend of this card against float64, forward and every gradient; nothing waits, nothing varies."""

import contextlib

import pytest
import torch

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.moe.experts import Experts
from litgpt_moe_ext.moe.kernels.step_weights import StepWeights
from litgpt_moe_ext.moe.layer import FeedForward
from litgpt_moe_ext.moe.routing.router import Routing
from tests.gpu.card import no_waits, require_bfloat16
from tests.models import moe_config, randomize
from tests.moe.feed_forward import compare_feed_forward
from tests.moe.gradients import exact, run

pytestmark = pytest.mark.gpu

BACKENDS = ("triton", "grouped_mm", "loop")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# T, K, E, D, F: code-moe-60m, fine-grained experts, odd widths, few rows, one expert.
SIZES = [(2048, 2, 4, 512, 768), (2048, 8, 64, 512, 256), (333, 3, 5, 72, 40), (40, 2, 8, 64, 64), (50, 1, 1, 64, 32)]
ACTIVATIONS = [("swiglu", "none"), ("geglu", "none"), ("geglu", "tanh"), ("gelu", "none"), ("relu", "none"),
               ("relu2", "none"), ("clamped_swiglu", "none")]  # fmt: skip


def make(device, dtype, E, D, F, backend, **settings):
    sizes = {"n_expert": E, "n_embd": D, "moe_intermediate_size": F, "n_expert_per_token": 1}
    experts = randomize(Experts(moe_config(**sizes, expert_backend=backend, **settings)), std=0.05).to(device, dtype)
    try:
        experts.backend_for(torch.empty(1, D, device=device, dtype=dtype))
    except SettingsError as error:
        pytest.skip(str(error))
    return experts


def make_routing(device, T, K, E):
    """Leave the last of more than four experts without a token."""
    scores = torch.rand(T, E, device=device)
    if E > 4:
        scores[:, -1] = -1
    experts = scores.topk(K, dim=1).indices
    return Routing(torch.rand(T, K, device=device), experts, torch.bincount(experts.flatten(), minlength=E))


def error(ours, truth):
    return ((ours.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-6)).item()


def compare(experts, backend, T, K):
    device, dtype = experts.down_proj.device, experts.down_proj.dtype
    routing = make_routing(device, T, K, experts.n_expert)
    x, upstream = (torch.randn(T, experts.n_embd, device=device).to(dtype) for _ in range(2))
    truth = exact(experts, x, routing, upstream)
    ours, loop = (run(experts, name, x, routing, upstream) for name in (backend, "loop"))
    floor = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for name, expected in truth.items():
        assert ours[name].dtype == loop[name].dtype
        assert error(ours[name], expected) <= max(2 * error(loop[name], expected), floor), name


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parity(device, tiny, backend, dtype, bias):
    torch.set_float32_matmul_precision("highest")
    for T, K, E, D, F in SIZES[2:] if tiny else SIZES:
        if backend != "grouped_mm" or not (D * dtype.itemsize % 16 or F * dtype.itemsize % 16):
            compare(make(device, dtype, E, D, F, backend, bias=bias), backend, T, K)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations(device, backend, activation):
    names = {"mlp_activation": activation[0], "gelu_approximate": activation[1]}
    compare(make(device, torch.float32, 4, 64, 32, backend, **names), backend, 100, 2)


def test_tf32_is_for_those_who_allow_it(device):
    """With "high" products lose digits, but not with "highest"."""
    experts = make(device, torch.float32, 4, 512, 256, "triton")
    routing, x = make_routing(device, 64, 2, 4), torch.randn(64, 512, device=device)
    truth = exact(experts, x, routing, x)["y"]
    errors = {}
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        errors[precision] = error(run(experts, "triton", x, routing, x)["y"], truth)
    assert errors["highest"] < 1e-5
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        assert 1e-5 < errors["high"] < 1e-2


@pytest.mark.parametrize("backend", ["triton", "grouped_mm"])
def test_two_runs_give_the_same_bits(device, tiny, backend):
    T, K, E, D, F = (40, 2, 8, 64, 64) if tiny else (4096, 8, 64, 512, 256)
    experts, routing = make(device, torch.bfloat16, E, D, F, backend), make_routing(device, T, K, E)
    x, upstream = (torch.randn(T, D, device=device).bfloat16() for _ in range(2))
    first = run(experts, backend, x, routing, upstream)
    for _ in range(3):
        for name, value in run(experts, backend, x, routing, upstream).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("backend", ["triton", "grouped_mm"])
def test_micro_batches_share_weights(device, tiny, backend, autocast):
    """Weights that are cast once, and gradients that products add up themselves, are what autograd makes of them."""
    if autocast == torch.bfloat16:
        require_bfloat16(device)
    for T, K, E, D, F in SIZES[3:4] if tiny else [*SIZES[:2], (1024, 2, 8, 256, 1024)]:
        experts, routing = make(device, torch.float32, E, D, F, backend), make_routing(device, T, K, E)
        x, upstream = (torch.randn(T, D, device=device) for _ in range(2))
        results, weights = [], StepWeights()
        for shared in (contextlib.nullcontext, weights.shared, weights.shared):
            experts.zero_grad()
            for factor in (1.0, 2.0, 3.0):
                with shared(), torch.autocast(device.type, autocast, enabled=autocast is not None):
                    experts(factor * x, routing).backward(upstream)
            results.append([parameter.grad for parameter in experts.parameters()])
            weights.keep()
            weights.refresh()
        for apart, *together in zip(*results, strict=True):
            for gradient in together:
                torch.testing.assert_close(gradient, apart, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [2, 64])
@pytest.mark.parametrize("backend", ["triton", "grouped_mm"])
def test_nothing_waits(device, backend, tokens):
    """On a card with a native grouped product that product too; elsewhere torch's waits, and is not chosen."""
    if backend == "grouped_mm" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        pytest.skip("torch has no native grouped product on this card")
    experts, routing = make(device, torch.bfloat16, 8, 64, 64, backend), make_routing(device, tokens, 2, 8)
    x = torch.randn(tokens, 64, device=device, dtype=torch.bfloat16)
    for scope in (contextlib.nullcontext(), no_waits(device)):  # the first time kernels are compiled
        with scope:
            run(experts, backend, x, routing, x)
            with torch.no_grad():
                experts(x, routing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_reads_only_the_chosen_experts(device, backend, dtype):
    experts, routing = make(device, dtype, 8, 64, 64, backend, bias=True), make_routing(device, 2, 2, 8)
    x = torch.randn(2, 64, device=device).to(dtype)
    idle = [e for e in range(8) if routing.counts_E[e] == 0]
    with torch.no_grad():
        experts.forced_backend = "loop"
        expected = experts(x, routing)
        for parameter in experts.parameters():
            parameter[idle] = float("nan")
        experts.forced_backend = backend
        torch.testing.assert_close(experts(x, routing), expected, atol=2e-2, rtol=2e-2)


def test_dropout_keeps_the_mean(device):
    sizes = {"expert_dropout": 0.25, "mlp_activation": "relu", "bias": False}
    experts = make(device, torch.float32, 1, 16, 4096, "triton", **sizes)
    with torch.no_grad():
        experts.up_proj.fill_(1.0)
        experts.down_proj.fill_(1 / 4096)
    experts.dropout = 0.25
    counts = torch.tensor([64], device=device)
    routing = Routing(torch.ones(64, 1, device=device), torch.zeros(64, 1, dtype=torch.int64, device=device), counts)
    y = experts(torch.full((64, 16), 1 / 16, device=device), routing)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    assert y[:, 0].std().item() == pytest.approx((0.25 * 0.75) ** 0.5 / 0.75 / 64, rel=0.5)


def test_more_than_two_billion_elements(device, tiny):
    if tiny or torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB")
    from litgpt_moe_ext.moe.kernels.plan import Product, plan_of
    from litgpt_moe_ext.moe.kernels.triton.rows import multiply_rows

    E, O, I = 3, 2**16, 2**15  # noqa: E741
    weight = torch.zeros(E, O, I, device=device, dtype=torch.float16)
    weight[-1, -1, -1] = 3.0
    rows, ends = torch.arange(3, device=device), torch.arange(1, 4, device=device, dtype=torch.int32)
    y = multiply_rows(Product(torch.ones(3, I, device=device).half(), weight, None, plan_of(rows, ends, 3)))
    assert y[2, -1] == 3.0
    assert y.sum() == 3.0


@pytest.mark.parametrize("bias", [False, True])
def test_weights_of_shared_experts_are_cast_as_autocast_does(device, bias):
    """In one launch instead of one for each: the same bits, forward and backward."""
    config = {"n_embd": 64, "mlp_activation": "relu2", "bias": bias}
    layers = [FeedForward(moe_config(expert_backend=backend, **config), 96).to(device) for backend in (None, "loop")]
    layers[1].load_state_dict(randomize(layers[0]).state_dict())
    x, upstream = torch.randn(2, 50, 64, device=device)
    results = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        with torch.autocast(device.type, torch.float16 if device.type == "cuda" else torch.bfloat16):
            y = layer(leaf)
        y.backward(upstream.to(y.dtype))
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if "glu" in a[0]], ids="-".join)
def test_gated_networks_equal_float64(device, tiny, activation, autocast, bias):
    """Shared experts and dense layers, of which autocast makes both projections one product; odd widths too."""
    if autocast == torch.bfloat16:
        require_bfloat16(device)
    torch.set_float32_matmul_precision("highest")
    names = {"mlp_activation": activation[0], "gelu_approximate": activation[1], "bias": bias}
    for T, D, F in [(25, 64, 96), (25, 72, 35)] if tiny else [(25, 64, 96), (25, 72, 35), (1024, 768, 2048)]:
        compare_feed_forward((T, D, F), autocast, device, **names)
