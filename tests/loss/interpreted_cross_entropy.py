"""The Triton kernels for the loss on a CPU: not collected itself, `tests/test_triton.py` runs it.

Triton's interpreter must be switched on before Triton is imported.
"""

import os

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings

from litgpt_moe_ext.loss import cross_entropy_kernels as kernels
from litgpt_moe_ext.loss import linear
from litgpt_moe_ext.loss.cross_entropy import mean_cross_entropy
from litgpt_moe_ext.moe.balancing.gradient_injection import forget_scale, present_scale
from litgpt_moe_ext.training.steps import handover
from litgpt_moe_ext.training.steps.handover import loss_of_logits
from tests.runs import logged, train
from tests.subsets import soon

EXAMPLES = int(os.environ.get("TRITON_EXAMPLES", "3"))
# Of gradients; the interpreter cuts bfloat16 off where a card rounds.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def compare(logits, targets, factor=1.0):
    """Hold loss and gradient against torch's in float64; return the loss."""
    exact = logits.detach().double().requires_grad_()
    counts = (targets != -100).sum().clamp(min=1)
    expected = F.cross_entropy(exact, targets, reduction="sum") / counts
    (expected_gradient,) = torch.autograd.grad(factor * expected, exact)
    leaf = logits.detach().requires_grad_()
    # A copy with the strides of the logits: a gradient takes the place of what it is of.
    loss = mean_cross_entropy(torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).copy_(leaf), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(factor * loss, leaf)
    assert gradient.dtype == logits.dtype
    # As a share of the largest gradient there could be.
    bound = TOLERANCE[logits.dtype] * factor / counts
    assert (gradient.double() - expected_gradient).abs().max() <= bound + 1e-7
    assert not gradient[targets == -100].any()
    return loss


@given(
    T=st.integers(1, 9), V=st.integers(1, 700) | st.sampled_from([512, 4096, 5000, 9000]), seed=st.integers(0, 99),
    dtype=st.sampled_from(list(TOLERANCE)), spread=st.sampled_from((0.1, 3.0, 60.0)),
    padded=st.sampled_from((0.0, 0.4, 1.0)), layout=st.sampled_from(("rows", "apart", "columns")),
    factor=st.sampled_from((1.0, 1 / 3, 1024.0)),
)  # fmt: skip
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_shape(T, V, seed, dtype, spread, padded, layout, factor):
    torch.manual_seed(seed)
    logits = (spread * torch.randn(T, V)).to(dtype)
    if layout == "apart":
        logits = F.pad(logits, (0, 7))[:, :V]
    elif layout == "columns":
        logits = logits.T.contiguous().T
    compare(logits, torch.randint(V, (T,)).masked_fill(torch.rand(T) < padded, -100), factor)


@pytest.mark.parametrize("dtype", soon(TOLERANCE, [torch.bfloat16]), ids=str)
def test_several_blocks(monkeypatch, dtype):
    """Columns are two blocks and a rest, the largest logit in each of them once; rows are one block and a rest."""
    monkeypatch.setattr(kernels, "_BLOCK", tl.constexpr(64))
    torch.manual_seed(0)
    logits = torch.randn(3, 2 * 4096 + 5)
    logits[range(3), [3, 5000, 8194]] = 9.0
    compare(logits.to(dtype), torch.tensor([3, 8194, 8196]))
    compare(torch.randn(70, 2).to(dtype), torch.randint(2, (70,)).masked_fill(torch.rand(70) < 0.1, -100))


def test_targets_that_are_apart():
    logits, targets = torch.randn(3, 5), torch.tensor([[1, 0], [4, 0], [-100, 0]])
    assert torch.equal(compare(logits, targets[:, 0]), compare(logits, torch.tensor([1, 4, -100])))


def test_nothing_to_predict():
    for T in (0, 3):
        logits = torch.randn(T, 5).requires_grad_()
        loss = mean_cross_entropy(logits * 1, torch.full((T,), -100))
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient, torch.zeros(T, 5))


def test_numbers_that_are_none():
    """They show in the loss. Logits of minus infinity are no such numbers, whole blocks of them neither."""
    row = torch.zeros(1, 5000)
    for value in ("nan", "inf"):
        broken = row.clone()
        broken[0, 4999] = float(value)
        assert mean_cross_entropy(broken, torch.tensor([0])).isnan()
    row[0, :4500] = float("-inf")
    compare(row, torch.tensor([4999]))
    assert mean_cross_entropy(row, torch.tensor([3])) == float("inf")


@pytest.mark.parametrize("target", [-2, 5, 2**40])
def test_a_token_that_is_not_among_the_logits(target):
    """Torch ends the process of a GPU there."""
    assert mean_cross_entropy(torch.zeros(2, 5), torch.tensor([1, target])).isnan()


def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    logits, targets = torch.randn(30, 5000), torch.randint(5000, (30,))
    first, second = (kernels.mean_loss(logits, targets) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gradient_takes_the_place_of_the_logits():
    leaf = torch.randn(4, 5, requires_grad=True)
    logits = leaf * 1
    loss, later = mean_cross_entropy(logits, torch.arange(4)), logits.exp()
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    later.sum().backward()  # which has kept its result


def test_who_needs_the_logits_after_that_is_told():
    leaf, targets = torch.randn(4, 5, requires_grad=True), torch.arange(4)
    logits = leaf * 1
    (mean_cross_entropy(logits, targets) + (logits**2).sum()).backward()  # the square comes first
    expected = torch.autograd.grad(F.cross_entropy(leaf, targets) + (leaf**2).sum(), leaf)
    torch.testing.assert_close(leaf.grad, *expected)
    logits = leaf * 1
    loss = (logits**2).sum() + mean_cross_entropy(logits, targets)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_more_than_two_billion_logits():
    """Only the pages that are used become memory."""
    memory = torch.empty(2**31 + 40, dtype=torch.float16)
    far, targets = memory.as_strided((3, 40), (2**30, 1)), torch.tensor([7, 30, 39])
    far.copy_(torch.randn(3, 40))
    assert torch.equal(mean_cross_entropy(far, targets), compare(far.clone(), targets))
    _, normalizers, share = kernels.mean_loss(far, targets)
    near = torch.empty(3, 40, dtype=torch.float16)
    kernels.gradients(far, targets, normalizers, (share, share), near)
    kernels.gradients(far, targets, normalizers, (share, share), far)
    assert torch.equal(near, far)


@pytest.fixture
def _on_a_gpu(monkeypatch):
    monkeypatch.setattr("litgpt_moe_ext.loss.cross_entropy.operators_are_unwatched", lambda _: True)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_with_the_output_head(monkeypatch, dtype):
    """Piece by piece, the kernels do what torch's operators do, also with targets that are apart."""
    monkeypatch.setattr(linear, "_LOGITS", 1)
    x, head = torch.randn(300, 16, requires_grad=True), torch.nn.Linear(16, 40)
    targets = torch.randint(0, 40, (300, 2)).masked_fill(torch.rand(300, 1) < 0.3, -100)[:, 0]
    inputs = [x, *head.parameters()]
    results = []
    for works in (True, False):
        monkeypatch.setattr(linear, "has_kernel", lambda *_, works=works: works)
        loss = linear._HalfProducts.apply(x, head.weight, head.bias, targets, dtype)
        results.append([loss, *torch.autograd.grad(3 * loss, inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= TOLERANCE[dtype] * theirs.norm()


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_in_the_loop(dtype):
    """The loss of logits as the output head wrote them, without a copy in float32."""

    class Precision:
        def convert_output(self, _):
            pytest.fail("converted")

    loss = loss_of_logits(lambda *_: pytest.fail("computed elsewhere"), Precision())
    logits, targets = torch.randn(2, 9, 40).to(dtype).requires_grad_(), torch.randint(40, (2, 9))
    expected = F.cross_entropy(logits.detach().float().flatten(0, 1), targets.flatten())
    value = loss(logits, targets)
    torch.testing.assert_close(value.detach(), expected)
    # Auxiliary losses learn by what the loop scales it.
    (value / 4).backward()
    assert present_scale(value) == 0.25
    forget_scale()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("packing", ["stream", "pad"])
def test_a_run(recipe, monkeypatch, tmp_path, precision, packing):
    """LitGPT's loop hands over 16-bit logits, of validations too, and trains as with LitGPT's loss, as on a CPU."""
    types = []

    def noted(logits, targets):
        types.append(logits.dtype)
        return mean_cross_entropy(logits, targets)

    monkeypatch.setattr(handover, "mean_cross_entropy", noted)
    file = recipe(precision=precision, model_config={"router_z_loss_coef": 0.01}, train={"max_tokens": 2 * 128})
    kernels_used = {}
    for name, works in (("ours", True), ("litgpts", False)):
        monkeypatch.setattr(handover, "has_kernel", lambda *_, works=works: works)
        arguments = ("--config", file, "--out_dir", tmp_path / name, "--data.init_args.packing", packing)
        assert train(*arguments) == 0
        kernels_used[name] = len(types)
    assert set(types) == {torch.bfloat16 if precision == "bf16-mixed" else torch.float16}
    assert kernels_used["litgpts"] == kernels_used["ours"] > 2
    for column in ("loss", "val_loss", "grad_norm"):
        ours, theirs = ([float(value) for value in logged(tmp_path / name, column)] for name in kernels_used)
        assert ours == pytest.approx(theirs, rel=2e-2 if column == "grad_norm" else 2e-3)
