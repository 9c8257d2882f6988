"""Casts that the micro-batches of a step share, and the gradients to which they add their own."""

import pytest
import torch
from torch import nn

from litgpt_moe_ext.moe.kernels import step_weights
from litgpt_moe_ext.moe.kernels.step_weights import StepWeights, cast, gradient_to_extend


def test_weights_are_cast_once_a_step():
    weight, shares = nn.Parameter(torch.ones(4)), StepWeights()
    with shares.shared():
        assert cast(weight, torch.float32) is weight
        cast(torch.ones(3), torch.bfloat16)  # is no weight, which would be kept
        assert shares.size == 0
        first = cast(weight, torch.bfloat16)
        assert shares.size == 8
        shares.keep()
        shares.refresh()
        kept = cast(weight, torch.bfloat16)
        assert torch.equal(kept, first)
        assert cast(weight, torch.bfloat16) is kept
        assert cast(weight, torch.float16) is not cast(weight, torch.float16), "another dtype is not kept yet"
    assert cast(weight, torch.bfloat16) is not kept, "outside of the scope"

    def after_a_change(grad=None, expire=False):
        weight.grad = grad
        with torch.no_grad():
            weight.add_(1.0)
        if expire:
            shares.expire()
        shares.refresh()
        with shares.shared():
            assert cast(weight, torch.bfloat16) is kept
        return torch.equal(kept.float(), weight.detach())

    assert after_a_change(), "without a gradient a step may have begun"
    assert not after_a_change(torch.ones(4))
    assert after_a_change(torch.ones(4), expire=True)
    weight.requires_grad_(False)
    assert not after_a_change(), "frozen"
    shares.clear()
    with shares.shared():
        assert cast(weight, torch.bfloat16) is not kept


def test_the_sharing_ends_with_its_scope():
    weight, outer, inner = nn.Parameter(torch.ones(4)), StepWeights(), StepWeights()
    with outer.shared():
        with pytest.raises(KeyError), inner.shared():
            raise KeyError
        cast(weight, torch.bfloat16)
    assert (outer.size, inner.size) == (8, 0)
    assert step_weights._sharing is None


def test_to_which_gradient_a_product_adds_its_own():
    weight = nn.Parameter(torch.ones(2, 3))
    with StepWeights().shared():
        assert gradient_to_extend(weight) is None, "there is none yet"
        weight.grad = torch.ones(2, 3)
        assert gradient_to_extend(weight) is weight.grad
        tensor = torch.ones(2, 3, requires_grad=True)
        tensor.grad = torch.ones(2, 3)
        assert gradient_to_extend(tensor) is None
        for register in (weight.register_hook, weight.register_post_accumulate_grad_hook):
            handle = register(print)
            assert gradient_to_extend(weight) is None, "somebody watches it"
            handle.remove()
        assert gradient_to_extend(weight) is weight.grad
        weight.grad = torch.ones(3, 2).t()
        assert gradient_to_extend(weight) is None
        weight.grad = torch.ones(2, 3).to_sparse()
        assert gradient_to_extend(weight) is None
    weight.grad = torch.ones(2, 3)
    assert gradient_to_extend(weight) is None, "outside of the scope"
