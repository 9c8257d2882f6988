"""Losses and gradients of a model on the null GPU that computes, against the CPU's: `test_numbers.py` runs it.

Experts in a loop go through operators whose kernels start others, in place and with sums.
"""

import pytest
import torch
from torch import Tensor, nn

from litgpt_moe_ext.loss.linear import linear_loss
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


SINKS = {"attention_class_name": "SinkAttention"}


@pytest.mark.parametrize(
    "settings",
    [
        {"expert_backend": "loop"},
        SINKS | {"attention_sinks": False, "sliding_window_size": 5, "sliding_window_indices": [1]},
        SINKS
        | {
            "attention_document_boundary": "eos",
            "attention_document_token_id": 3,
            "attention_document_restart_positions": True,
        },
    ],
    ids=["loop", "attention with a mask", "positions of documents"],
)
def test_gradients_are_those_of_the_cpu(settings):
    model = initialized_model(moe_config(n_layer=1, **settings))
    theirs = passed(model, "cpu")
    for a, b in zip(passed(model, "cuda"), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_outer_products():
    """For which torch has a Triton kernel of its own."""
    a, b = torch.randn(3, 5, 1), torch.randn(3, 1, 7)
    torch.testing.assert_close(torch.bmm(a.cuda(), b.cuda()).cpu(), torch.bmm(a, b))


def test_products_of_16_bits_in_float32():
    head = nn.Linear(8, 40)
    x, targets = torch.randn(1, 6, 8, requires_grad=True), torch.randint(40, (1, 6))
    expected = nn.functional.cross_entropy(head(x)[0], targets[0])
    gradients = torch.autograd.grad(expected, [x, *head.parameters()])
    head.cuda()
    x = x.detach().cuda().requires_grad_()
    loss = linear_loss(x, targets.cuda(), head, torch.bfloat16)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-2, atol=1e-2)
    for a, b in zip(torch.autograd.grad(loss, [x, *head.parameters()]), gradients, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=3e-2, atol=3e-3)


@pytest.mark.parametrize(("autocast", "bias"), [(torch.bfloat16, False), (torch.float16, True), (None, True)], ids=str)
def test_gated_networks_equal_float64(autocast, bias):
    """With casts of weights that make two projections one, in odd widths."""
    compare_feed_forward((9, 24, 35), autocast, torch.device("cuda"), mlp_activation="swiglu", bias=bias)
