"""A router's product on a CPU, by Triton's interpreter: not collected by itself, `tests/test_triton.py` runs it."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe_ext.moe.kernels.routing import fused_router, router_product
from litgpt_moe_ext.moe.kernels.routing.router_product import (
    ProjectionBackward,
    project,
    project_and_pass,
    project_backward,
)
from litgpt_moe_ext.moe.kernels.triton import projecting
from tests.moe.kernels.interpreted_triton import EXAMPLES
from tests.moe.kernels.products import PASSED, compare_passed, compare_product, every_bit, gradients_of
from tests.moe.routers import keep_choices, make_gate

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGER = ((7, 40, 3), (300, 768, 8), (100, 72, 64))


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["parts", "float32"])
def split(request, monkeypatch):
    """Tensor Cores and without."""
    if not request.param:
        monkeypatch.setattr(projecting, "_form", lambda *args, form=projecting._form: form(*args)._replace(split=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "D", "E"),
    [(1, 16, 2), (100, 72, 8), *(pytest.param(*size, marks=pytest.mark.slow) for size in LARGER)],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("split")
def test_equals_float64(T, D, E, dtype):
    compare_product(T, D, E, (dtype, torch.float32))


@given(
    T=st.integers(1, 70), D=st.integers(1, 70), E=st.integers(1, 40), x_dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_shape(T, D, E, x_dtype, weight_dtype, seed):
    torch.manual_seed(seed)
    compare_product(T, D, E, (x_dtype, weight_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_is_lost(dtype):
    """Numbers times one, and zeros beside them, are the numbers."""
    for name, (ours, expected) in every_bit(dtype).items():
        if name != "x" or dtype == torch.float32:  # which the interpreter cuts off
            assert torch.equal(ours, expected), name


@pytest.mark.slow
def test_rows_apart_and_blocks_of_tokens():
    """Tokens of a wider matrix, and more blocks than one, which add up to the same bits every time."""
    x, weight, upstream = torch.randn(300, 48)[:, 8:40], torch.randn(3, 32), torch.randn(300, 3)
    first, second = (gradients_of(project, x, weight, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first["weight"], upstream.t() @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(first["x"], upstream @ weight, rtol=1e-5, atol=1e-5)


def test_no_token():
    result = gradients_of(project, torch.empty(0, 16), torch.randn(3, 16), torch.empty(0, 3))
    assert result["logits"].shape == (0, 3)
    assert not result["weight"].any()


def test_only_what_is_needed():
    x, weight, upstream = torch.randn(20, 16), torch.randn(3, 16), torch.randn(20, 3)
    dx, nothing = project_backward(ProjectionBackward(upstream, x, weight, None, None, True, False))
    assert nothing.numel() == 0
    torch.testing.assert_close(dx, upstream @ weight)
    nothing, dweight = project_backward(ProjectionBackward(upstream, x, weight, None, None, False, True))
    assert nothing.numel() == 0
    torch.testing.assert_close(dweight, upstream.t() @ x)


@pytest.mark.parametrize(
    "dtypes", [*PASSED[:3], *(pytest.param(d, marks=pytest.mark.slow) for d in PASSED[3:])], ids=str
)
@pytest.mark.parametrize(
    ("T", "D", "E"), [(70, 40, 5), *(pytest.param(*size, marks=pytest.mark.slow) for size in LARGER)], ids=str
)  # fmt: skip
def test_tokens_are_passed_on_and_their_gradients_added(T, D, E, dtypes):
    compare_passed(T, D, E, dtypes)


def test_tokens_without_gradient_are_passed_on_without():
    """And a gate without a gradient passes on that of the experts."""
    x, weight = torch.randn(9, 16), torch.randn(3, 16, requires_grad=True)
    passed = project_and_pass(x, weight, torch.float16)
    assert [result.requires_grad for result in passed] == [True, False, False]
    passed = project_and_pass(x.requires_grad_(), weight, torch.float16)
    upstream = torch.randn(9, 16).half()
    passed.routed_TD.backward(upstream)
    assert torch.equal(x.grad, upstream.float())
    assert weight.grad is None


@pytest.mark.parametrize("changes", [{"router_bias": True, "router_jitter_noise": 0.1}, {"router_type": "noisy_topk"}])
def test_routers_take_it(monkeypatch, changes):
    """With bias, jitter and noise; also under checkpointing; not those who ask for ordinary operators."""
    monkeypatch.setattr(router_product, "FEWEST_NUMBERS", 4)
    monkeypatch.setattr(fused_router, "works_on", lambda x: True)
    kept = partial(checkpoint, use_reentrant=False, context_fn=keep_choices)
    calls, original = [], projecting.project
    monkeypatch.setattr(projecting, "project", lambda *args: calls.append(1) or original(*args))
    results = []
    for backend in (None, "loop"):
        gate = make_gate(**changes, expert_backend=backend)
        for name, parameter in gate.named_parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
        for call in (lambda x, gate=gate: gate(x), lambda x, gate=gate: kept(gate, x)):
            torch.manual_seed(1)
            gate.zero_grad()
            x = torch.randn(12, 16, requires_grad=True)
            order = (routing := call(x)).experts_TK.argsort(1)
            routing.weights_TK.gather(1, order).square().sum().backward()
            results.append({"x": x.grad, **{name: p.grad for name, p in gate.named_parameters()}})
    assert len(calls) == 3 * (2 if "router_type" in changes else 1)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-4, atol=1e-5)


def test_who_takes_it(monkeypatch):
    x, weight = torch.empty(2048, 1024), torch.empty(8, 1024)
    assert not router_product.works_on(x, weight)
    monkeypatch.setattr(fused_router, "works_on", lambda x: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert router_product.works_on(x, weight)
    assert not router_product.works_on(x[1:], weight)
    assert not router_product.works_on(x.double(), weight)
    assert not router_product.works_on(x, weight.double())
    assert router_product.works_on(x, torch.empty(64, 1024))
    assert not router_product.works_on(x, torch.empty(65, 1024))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert router_product.works_on(x, weight)
    assert not router_product.works_on(x, torch.empty(17, 1024))


def test_meta_tensors_and_flops():
    for device in ("meta", "cpu"):
        x, weight = torch.randn(9, 16, device=device).bfloat16().requires_grad_(), torch.randn(3, 16, device=device)
        weight.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            project(x, weight).sum().backward()
        assert counter.get_total_flops() == 3 * 2 * 9 * 16 * 3
        assert (x.grad.dtype, x.grad.shape) == (torch.bfloat16, x.shape)
        assert (weight.grad.dtype, weight.grad.shape) == (torch.float32, weight.shape)
