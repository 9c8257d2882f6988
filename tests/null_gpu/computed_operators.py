"""Losses and gradients of a model on the null GPU that computes, against the CPU's: `test_numbers.py` runs it.

Experts in a loop go through operators whose kernels start others, in place and with sums.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.models import initialized_model, moe_config
from tests.moe.feed_forward import compare_feed_forward


def passed(model: nn.Module, device: str) -> list[Tensor]:
    """Return the loss and the gradients of a model that is brought to a device."""
    model = model.to(device)
    ids = torch.arange(64, device=device).view(2, 32) % 37
    loss = model(ids).logsumexp(-1).sub(model(ids)[..., 3]).mean()
    model.zero_grad()
    loss.backward()
    return [loss.detach().cpu(), *(parameter.grad.cpu().clone() for parameter in model.parameters())]


def test_gradients_are_those_of_the_cpu():
    model = initialized_model(moe_config(expert_backend="loop"))
    theirs = passed(model, "cpu")
    for a, b in zip(passed(model, "cuda"), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("autocast", "bias"), [(torch.bfloat16, False), (torch.float16, True), (None, True)], ids=str)
def test_gated_networks_equal_float64(autocast, bias):
    """With casts of weights that make two projections one, in odd widths."""
    compare_feed_forward((9, 24, 35), autocast, torch.device("cuda"), mlp_activation="swiglu", bias=bias)
