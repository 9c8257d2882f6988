"""The fused router of this card against torch's operators: the decision, gradients, losses and statistics."""

import pytest
import torch

from litgpt_moe_ext.moe.kernels import fused_router
from tests.gpu.test_experts import no_waits
from tests.moe.routers import RULES, compare, make_gate, run

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_triton(device):
    if device.type == "cpu":
        pytest.skip("the kernels need a card; tests/moe interprets them")


@pytest.mark.parametrize(("E", "K", "T"), [(8, 2, 130), (8, 2, 20000), (160, 6, 3000)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_equals_the_operators(device, name, E, K, T):
    gate = make_gate(**RULES[name], n_expert=E, n_expert_per_token=K).to(device)
    if hasattr(gate, "e_score_correction_bias"):
        gate.e_score_correction_bias.normal_(std=0.3)
    compare(gate, T)
    gate.eval()
    compare(gate, 3)


def test_two_runs_give_the_same_bits(device):
    gate = make_gate(**RULES["noisy, all losses"]).to(device)
    x, upstream = torch.randn(5000, 16, device=device), torch.rand(5000, 2, device=device)
    (first, _), (second, _) = (run(gate, x, upstream, fused=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_it_is_what_a_card_takes_and_nothing_waits(device):
    gate = make_gate(**RULES["noisy, all losses"]).to(device)
    x = torch.randn(64, 16, device=device, requires_grad=True)
    assert fused_router.works_on(x)
    gate(x).weights_TK.sum().backward()
    with no_waits(device):
        routing = gate(x)
        routing.weights_TK.sum().backward()
        fused_router.sort_rows(routing.decision)
