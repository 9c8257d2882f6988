"""The loss without the logits, with products in 16 bits as GPUs do them."""

import pytest
import torch
import torch.nn.functional as F

from litgpt_moe_ext.kernels.precision import matmul_dtype
from litgpt_moe_ext.loss import linear
from litgpt_moe_ext.loss.linear import _HalfProducts, linear_loss
from litgpt_moe_ext.training.callbacks.fused_loss import FusedLoss
from tests.fake_cuda import fake_cuda


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_products_in_16_bits(monkeypatch, dtype, tolerance, bias):
    """Over several pieces, the loss and its gradients are those of all logits at once, which float32 shows exactly."""
    monkeypatch.setattr(linear, "_LOGITS", 1)
    x = torch.randn(300, 16, requires_grad=True)
    head = torch.nn.Linear(16, 40, bias=bias)
    targets = torch.randint(0, 40, (300,)).masked_fill(torch.rand(300) < 0.3, -100)
    inputs = [x, *head.parameters()]
    expected = F.cross_entropy(head(x), targets)
    loss = _HalfProducts.apply(x, head.weight, head.bias, targets, dtype)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    found = torch.autograd.grad(7 * loss, inputs)
    for ours, theirs in zip(found, torch.autograd.grad(7 * expected, inputs), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_the_scale_of_the_loss_is_not_rounded_to_16_bits():
    x, weight = torch.randn(8, 4, requires_grad=True), torch.randn(7, 4)
    loss = _HalfProducts.apply(x, weight, None, torch.arange(7).repeat(2)[:8], torch.bfloat16)
    (whole,) = torch.autograd.grad(loss, x, retain_graph=True)  # of 8 targets: exact in 16 bits
    (third,) = torch.autograd.grad(loss, x, torch.tensor(1 / 3))
    torch.testing.assert_close(third, whole / 3, rtol=1e-6, atol=0)


def test_the_gradient_of_a_bias_is_not_rounded_to_16_bits():
    """Of 259 tokens one is the first of two that are equally likely: it is expected 128.5 times too often."""
    x, weight, bias = torch.zeros(259, 4), torch.zeros(2, 4), torch.zeros(2, requires_grad=True)
    targets = torch.ones(259, dtype=torch.long)
    targets[0] = 0
    loss = _HalfProducts.apply(x, weight, bias, targets, torch.bfloat16)
    (gradient,) = torch.autograd.grad(loss, bias)
    torch.testing.assert_close(259 * gradient, torch.tensor([128.5, -128.5]), rtol=1e-6, atol=0)


def test_nothing_to_predict():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = _HalfProducts.apply(x, weight, None, torch.full((3,), -100), torch.bfloat16)
    assert loss == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in torch.autograd.grad(loss, [x, weight]))


def test_who_learns_nothing_sees_logits():
    model = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 7)})
    FusedLoss().on_before_setup(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert model["lm_head"](x).shape == (3, 7)
    assert model["lm_head"](x) is x
    assert model.eval()["lm_head"](x).shape == (3, 7)


@pytest.mark.parametrize("mode", ["mixed", "true"])
def test_on_a_gpu_nothing_waits_and_products_are_bfloat16(mode):
    """On fake tensors: the operators take these types and shapes, and none needs a value."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mm:
                seen.add((args[0].dtype, args[1].dtype))
            return func(*args, **(kwargs or {}))

    seen = set()
    with fake_cuda(), torch.device("cuda"):
        dtype = torch.bfloat16 if mode == "true" else torch.float32
        head = torch.nn.Linear(16, 40, bias=False, dtype=dtype)
        x = torch.randn(2, 9, 16, requires_grad=True, dtype=dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=mode == "mixed"), Products():
            loss = linear_loss(x, torch.zeros(2, 9, dtype=torch.long), head, matmul_dtype(x))
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert seen == {(torch.bfloat16, torch.bfloat16)}
