"""Shared experts and dense layers against float64, for tests on a card and on one that is not there."""

import torch

from litgpt_moe_ext.moe.layer import FeedForward
from tests.models import moe_config, randomize


def _passes(layer, x, upstream, autocast):
    leaf = x.to(layer.proj.weight.dtype).detach().requires_grad_()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y = layer(leaf)
    y.backward(upstream.to(y.dtype))
    return {"y": y, "x": leaf.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def _error(found, truth):
    return ((found.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-6)).item()


def compare_feed_forward(size, autocast, device, **settings):
    """Hold outputs and gradients against float64: as good as those of ordinary operators.

    Args:
        size: Tokens of each of two sequences, width of the model, hidden width.
        autocast: Its dtype, or None without.
        device: Where.
        settings: Of the model.
    """
    T, D, F = size
    ours = randomize(FeedForward(moe_config(n_embd=D, **settings), F), std=0.05).to(device)
    ordinary = moe_config(n_embd=D, expert_backend="loop", **settings)
    loop, exactly = FeedForward(ordinary, F).to(device), FeedForward(ordinary, F).to(device, torch.float64)
    for layer in (loop, exactly):
        layer.load_state_dict(ours.state_dict())
    x, upstream = torch.randn(2, 2, T, D, device=device)
    found, expected = (_passes(layer, x, upstream, autocast) for layer in (ours, loop))
    floor = {torch.bfloat16: 1e-2, torch.float16: 2e-3, None: 2e-5}[autocast]
    for name, truth in _passes(exactly, x, upstream, None).items():
        assert found[name].dtype == expected[name].dtype, name
        assert _error(found[name], truth) <= max(2 * _error(expected[name], truth), floor), name
