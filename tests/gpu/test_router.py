"""The fused router of this card against torch's operators: the decision, gradients, losses and statistics."""

import pytest
import torch

from litgpt_moe_ext.moe.kernels.routing import fused_router, router_product
from tests.gpu.card import no_waits, require_bfloat16
from tests.moe.kernels import directions
from tests.moe.kernels.products import PASSED, compare_passed, compare_product, every_bit, gradients_of
from tests.moe.routers import LAYERS, RULES, compare, compare_fixed, compare_layer, make_gate, run

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_triton(device):
    if device.type == "cpu":
        pytest.skip("the kernels need a card; tests/moe interprets them")


@pytest.mark.parametrize(("E", "K", "T"), [(8, 2, 130), (8, 2, 20000), (160, 6, 3000), (384, 8, 3000)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_equals_the_operators(device, name, E, K, T):
    gate = make_gate(**RULES[name], n_expert=E, n_expert_per_token=K).to(device)
    if hasattr(gate, "e_score_correction_bias"):
        gate.e_score_correction_bias.normal_(std=0.3)
    compare(gate, T)
    compare(gate, T, n_sequence=10, padded=True)
    gate.eval()
    compare(gate, 3)


@pytest.mark.parametrize("padded", [False, True], ids=["text", "padding"])
@pytest.mark.parametrize("kind", ["hash", "uniform"])
def test_routers_that_do_not_learn(device, kind, padded):
    compare_fixed(kind, padded, device)


@pytest.mark.parametrize("name", ["noisy, all losses", "noisy, everything"])
def test_two_runs_give_the_same_bits(device, name):
    gate = make_gate(**RULES[name]).to(device)
    x, upstream = torch.randn(5000, 16, device=device), torch.rand(5000, 2, device=device)
    (first, _), (second, _) = (run(gate, x, upstream, True, n_sequence=5) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("name", ["noisy, all losses", "noisy, everything"])
def test_it_is_what_a_card_takes_and_nothing_waits(device, name):
    gate = make_gate(**RULES[name]).to(device)
    x = torch.randn(64, 16, device=device, requires_grad=True)
    real = torch.arange(64, device=device) % 3 > 0
    assert fused_router.works_on(x)
    gate(x).weights_TK.sum().backward()
    for padding in (None, real):
        with no_waits(device):
            routing = gate(x, 4, padding)
            routing.weights_TK.sum().backward()


@pytest.mark.parametrize("padded", [False, True], ids=["text", "padding"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_whole_layer_equals_the_operators(device, name, padded):
    compare_layer(name, None, (8, 50), padded, device)


@pytest.mark.parametrize(("T", "D", "E"), [(1, 16, 2), (100, 72, 3), (1000, 768, 64), (16384, 768, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_product_equals_float64(device, T, D, E, dtype):
    if dtype == torch.bfloat16:
        require_bfloat16(device)
    compare_product(T, D, E, (dtype, torch.float32), device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_bit_of_the_product_is_lost(device, dtype):
    """Nearly: Tensor Cores may cut off the last one."""
    for ours, expected in every_bit(dtype, device).values():
        torch.testing.assert_close(ours, expected, rtol=2**-22 if ours.dtype == torch.float32 else 2**-10, atol=1e-7)


def test_the_product_has_the_same_bits_every_time_and_in_a_graph(device):
    x, weight = torch.randn(4096, 768, device=device), torch.randn(8, 768, device=device)
    upstream = torch.randn(4096, 8, device=device)
    assert router_product.works_on(x, weight)
    first, second = (gradients_of(router_product.project, x, weight, upstream) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = router_product.project(x, weight)
        call = router_product.ProjectionBackward(upstream, x, weight, None, None, True, True)
        gradients = router_product.project_backward(call)
    graph.replay()
    for name, value in zip(first, (logits, *gradients), strict=True):
        assert torch.equal(value, first[name]), name
    with no_waits(device):
        gradients_of(router_product.project, x, weight, upstream)


@pytest.mark.parametrize("dtypes", PASSED, ids=str)
@pytest.mark.parametrize(("T", "D", "E"), [(100, 72, 3), (2048, 128, 16), (16384, 768, 8)], ids=str)
def test_tokens_are_passed_on_and_their_gradients_added(device, T, D, E, dtypes):
    if torch.bfloat16 in dtypes:
        require_bfloat16(device)
    compare_passed(T, D, E, dtypes, device)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_half_precision_equals_the_operators(monkeypatch, device, name):
    monkeypatch.setattr(router_product, "FEWEST_NUMBERS", 4)
    compare_layer(name, None, (8, 300), False, device, torch.float16)


@pytest.mark.parametrize(("E", "D"), [(1, 16), (8, 768), (70, 128), (384, 7168), (1024, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_orthogonality_loss_equals_float64(device, E, D, dtype):
    if dtype == torch.bfloat16:
        require_bfloat16(device)
    weight = torch.randn(E, D, device=device).to(dtype)
    directions.compare_orthogonality(weight)
    first, second = (directions.gradients_of(directions.weighted, weight, 0.1) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    with no_waits(device):
        directions.gradients_of(directions.weighted, weight, 0.1)
