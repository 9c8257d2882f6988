"""The orthogonality loss on a CPU, by Triton's interpreter: not collected by itself, `tests/test_triton.py` runs it."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.moe.kernels.directions import compare_orthogonality, gradients_of, weighted
from tests.moe.kernels.interpreted_triton import EXAMPLES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(
    E=st.integers(1, 20), D=st.integers(1, 40), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
    scale=st.sampled_from((1.0, 0.02, 20.0)), coef=st.sampled_from((0.02, 1.0)),
)  # fmt: skip
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_shape(E, D, dtype, seed, scale, coef):
    torch.manual_seed(seed)
    compare_orthogonality((scale * torch.randn(E, D)).to(dtype), coef)


@pytest.mark.parametrize("E", [70, *(pytest.param(E, marks=pytest.mark.slow) for E in (64, 300, 1024))])
def test_several_blocks(E):
    """The last one not full."""
    torch.manual_seed(0)
    compare_orthogonality(torch.randn(E, 24))


def test_directions_that_are_special():
    """Equal, opposite, orthogonal, nothing at all, and shorter than what rows are divided by at least."""
    x, y = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0])
    for rows in ((x, x), (x, -x), (x, y), (x, 0 * x), (0 * x, 0 * x), (x, 1e-13 * (x + y), 4e-13 * y, y - x)):
        compare_orthogonality(torch.stack(rows))


def test_numbers_that_are_none_are_seen():
    weight = torch.randn(3, 4)
    weight[1, 2] = float("nan")
    assert all(value.isnan().any() for value in gradients_of(weighted, weight, 0.1).values())


def test_two_runs_give_the_same_bits():
    weight = torch.randn(70, 24)
    first, second = (gradients_of(weighted, weight, 0.1) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_autocast_does_not_reach_it():
    weight = torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients_of(weighted, weight, 0.1)
    for name, value in gradients_of(weighted, weight, 0.1).items():
        assert torch.equal(value, rounded[name]), name


@pytest.mark.slow
def test_torch_takes_the_operator():
    torch.library.opcheck(
        torch.ops.litgpt_moe_ext.weighted_orthogonality.default, (torch.randn(5, 8, requires_grad=True), 0.1)
    )


def test_meta_and_fake_tensors_and_flops():
    for device in ("meta", "cpu"):
        weight = torch.randn(3, 16, device=device).bfloat16().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            weighted(weight, 0.1).backward()
        assert counter.get_total_flops() == 3 * 2 * 3 * 3 * 16
        assert (weight.grad.dtype, weight.grad.shape) == (torch.bfloat16, weight.shape)
    with FakeTensorMode():
        weight = torch.empty(3, 16, requires_grad=True)
        loss = weighted(weight, 0.1)
        loss.backward()
    assert (loss.dtype, loss.shape, weight.grad.shape) == (torch.float32, (), (3, 16))


@pytest.mark.slow
def test_a_compiler_takes_it_whole():
    weight = torch.randn(5, 8, requires_grad=True)
    compiled = torch.compile(lambda weight: 2 * weighted(weight, 0.1), fullgraph=True, backend="aot_eager")
    for function in (compiled, lambda weight: 2 * weighted(weight, 0.1)):
        weight.grad, before = None, weight.grad
        function(weight).backward()
    assert torch.equal(weight.grad, before)
