"""The loss of logits, and that of the output head and its logits together, on this card."""

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.precision import Precision
from litgpt.utils import chunked_cross_entropy

from litgpt_moe_ext.loss.cross_entropy import has_kernel
from litgpt_moe_ext.loss.linear import linear_loss
from litgpt_moe_ext.training.steps.handover import loss_of_logits
from tests.gpu.card import no_waits, require_bfloat16

pytestmark = pytest.mark.gpu

# Of a gradient, relative to the largest that there could be: the rounding of its dtype.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make(device, dtype, tiny, V=49152):
    """Return logits of two rows of tokens, a view of a wider tensor, and targets of which some do not count."""
    torch.manual_seed(0)
    V = min(V, 300) if tiny else V
    logits = (3 * torch.randn(2, 130, V + 8, device=device)).to(dtype)[..., :V]
    targets = torch.randint(V, (2, 130), device=device)
    return logits, targets.masked_fill(torch.rand(2, 130, device=device) < 0.2, -100)


@pytest.mark.parametrize("V", [7, 2048, 49152, 50257])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_it_is_torchs_without_waiting(device, tiny, dtype, V):
    if dtype == torch.bfloat16:
        require_bfloat16(device)
    logits, targets = make(device, dtype, tiny, V)
    assert has_kernel(logits, targets) == (device.type == "cuda")
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), targets.flatten())
    (expected_gradient,) = torch.autograd.grad(expected / 3, exact)
    compute = loss_of_logits(chunked_cross_entropy, Precision())
    results = []
    for run in range(3):
        leaf = logits.detach().clone().requires_grad_()
        copy = leaf * 1
        if run:
            with no_waits(device):
                loss = compute(copy, targets)
                (gradient,) = torch.autograd.grad(loss / 3, leaf)
        else:  # in which kernels are compiled
            loss = compute(copy, targets)
            (gradient,) = torch.autograd.grad(loss / 3, leaf)
        results.append((loss.detach(), gradient))
    assert all(torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
    if device.type == "cuda":
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    bound = TOLERANCE[dtype] / 3 / (targets != -100).sum()
    assert (gradient.double() - expected_gradient).abs().max() <= bound + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_with_the_output_head(device, tiny, dtype):
    """In pieces, with a bias: loss and gradients of products in float32, within the rounding of these in 16 bits."""
    if dtype == torch.bfloat16:
        require_bfloat16(device)
    torch.manual_seed(0)
    T, D, V = (40, 16, 300) if tiny else (2000, 128, 49152)
    head = torch.nn.Linear(D, V, device=device)
    x = torch.randn(1, T, D, device=device, requires_grad=True)
    targets = torch.randint(V, (1, T), device=device).masked_fill(torch.rand(1, T, device=device) < 0.2, -100)
    inputs = [x, *head.parameters()]
    expected = F.cross_entropy(head(x).flatten(0, 1), targets.flatten())
    expected_gradients = torch.autograd.grad(expected, inputs)
    for run in range(2):
        if run:
            with no_waits(device):
                loss = linear_loss(x, targets, head, dtype)
                gradients = torch.autograd.grad(loss, inputs)
        else:
            loss = linear_loss(x, targets, head, dtype)
            gradients = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()
