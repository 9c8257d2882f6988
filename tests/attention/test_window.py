"""Sliding windows by blocks against one mask over everything."""

from unittest.mock import Mock

import pytest
import torch

from litgpt_moe_ext.attention import causal_attention as module
from litgpt_moe_ext.attention.causal_attention import causal_attention, window_mask
from litgpt_moe_ext.attention.sinks import Softmax, sink_attention

SOFTMAX = Softmax(None, 0.4)


def full_mask(T: int, window: int) -> torch.Tensor:
    return torch.tensor([[i - window < j <= i for j in range(T)] for i in range(T)])


@pytest.mark.parametrize("window", [1, 2, 3, 5, 11, 12, 13, 40])
@pytest.mark.parametrize("T", [1, 12])
@pytest.mark.parametrize("B", [1, 3])
def test_blocks_equal_one_mask(B: int, T: int, window: int) -> None:
    q = torch.randn(B, 4, T, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, 2, T, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out = causal_attention(q, k, v, SOFTMAX, window)
    expected = sink_attention(q, k, v, SOFTMAX, full_mask(T, window))
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(expected, (q, k, v), dout)
    )


def test_no_mask_over_everything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Mock(side_effect=sink_attention)
    monkeypatch.setattr(module, "sink_attention", attend)
    x = torch.randn(1, 2, 30, 4)
    causal_attention(x, x, x, SOFTMAX, 8)
    first, rest = (call.args[4:] for call in attend.call_args_list)
    assert (first, rest[0].shape) == ((), (8, 16))


def test_window_mask() -> None:
    assert torch.equal(window_mask(torch.arange(9), 9, 4), full_mask(9, 4))
    batched = window_mask(torch.tensor([[3, 4], [7, 0]]), 8, 4)
    assert batched.shape == (2, 1, 2, 8)
    assert torch.equal(batched[0, 0], full_mask(8, 4)[[3, 4]])
    assert torch.equal(batched[1, 0], full_mask(8, 4)[[7, 0]])
