"""Operators whose arguments are named tuples."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from litgpt_moe_ext.kernels.operator import operator


class Call(NamedTuple):
    """Arguments of an operator."""

    x: Tensor
    factor: int


@operator("scaled_in_a_test", Call, lambda call: torch.empty_like(call.x))
def scaled(call: Call) -> Tensor:
    """Return numbers that autograd knows nothing of, as a kernel's."""
    return call.x.detach() * call.factor


def test_an_operator_without_gradient_says_so():
    """Its result does not pass for a constant."""
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        assert scaled(x, 3).tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="litgpt_moe_ext::scaled_in_a_test has no gradient"):
        scaled(x, 3).sum().backward()


def test_shapes_alone_reach_no_kernel():
    """A kernel would be given memory that is not there."""
    called = []

    @operator("counted_in_a_test", Call, lambda call: torch.empty_like(call.x))
    def counted(call: Call) -> Tensor:
        called.append(call)
        return call.x + 1

    x = torch.ones(2, device="meta")
    with torch.no_grad():
        assert counted(x, 3).shape == (2,)
    assert called == []
    assert counted(torch.ones(2), 3).tolist() == [2, 2]
    assert len(called) == 1
