"""Operators whose arguments are named tuples."""

import contextlib
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
        assert scaled(Call(x, 3)).tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="litgpt_moe_ext::scaled_in_a_test has no gradient"):
        scaled(Call(x, 3)).sum().backward()


def test_shapes_alone_reach_no_kernel():
    """A kernel would be given memory that is not there."""
    called = []

    @operator("counted_in_a_test", Call, lambda call: torch.empty_like(call.x))
    def counted(call: Call) -> Tensor:
        called.append(call)
        return call.x + 1

    x = torch.ones(2, device="meta")
    with torch.no_grad():
        assert counted(Call(x, 3)).shape == (2,)
    assert called == []
    assert counted(Call(torch.ones(2), 3)).tolist() == [2, 2]
    assert len(called) == 1


class Sum(NamedTuple):
    """Arguments of another one."""

    x: Tensor
    added: Tensor | None
    factor: int
    weight: Tensor


@operator("summed_in_a_test", Sum, lambda call: torch.empty_like(call.x))
def summed(call: Sum) -> Tensor:
    """Return `x * weight * factor`, and what is added."""
    y = call.x.detach() * call.weight.detach() * call.factor
    return y if call.added is None else y + call.added.detach()


BACKWARD = []


def _backward(call: Sum, needs: Any, dy: Tensor) -> dict[str, Tensor | None]:
    BACKWARD.append((call, needs))
    return {"weight": dy * call.x * call.factor if needs.weight else None, "added": dy if needs.added else None}


summed.set_gradient(_backward, unread=("added",))


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_gradients_have_the_names_of_arguments(watched, added):
    """Of the operator that a mode watches, too; what is not named has none, and what is unread is not kept."""
    BACKWARD.clear()
    x, weight = torch.tensor([2.0]), torch.tensor([3.0], requires_grad=True)
    other = torch.tensor([5.0], requires_grad=True) if added else None
    with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
        y = summed(Sum(x, other, factor=7, weight=weight))
        y.backward()
    assert y.item() == 42 + 5 * added
    assert weight.grad.item() == 14
    assert other is None or other.grad.item() == 1
    ((call, needs),) = BACKWARD
    assert needs == Sum(False, added, False, True)
    assert call == Sum(x, None, 7, weight)
