"""Rows past 2^31 elements, as long sequences have them: not collected by itself, `tests/test_triton.py` runs it.

The interpreter would take days for all programs of such a launch, so the last one runs alone, and fails where a number
of 32 bits overflows. Of the memory only the pages that it uses are ever there. (`tests.watched_memory` would need
memory for each byte.)
"""

import dataclasses

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

from litgpt_moe_ext.kernels.launch import launch
from litgpt_moe_ext.moe.activations import Activation
from litgpt_moe_ext.moe.kernels.plan import Gates, Mask, plan_of
from litgpt_moe_ext.moe.kernels.routing.router_product import ProjectionBackward
from litgpt_moe_ext.moe.kernels.triton import activation, biases, combining, gating, projecting, weights

WIDTH = 512
ROWS = 2**31 // WIDTH + 4


@pytest.fixture
def watch():
    """Stands in for the one of `tests.watched_memory`."""


@pytest.fixture(autouse=True)
def _last_program(monkeypatch):
    def launch_last(kernel, grid, arguments, *how, **named):
        with monkeypatch.context() as patch:
            whole = InterpreterBuilder.create_get_program_id

            def number(builder, axis):
                handle = whole(builder, axis)
                handle.data[:] = grid[axis] - 1
                return handle

            patch.setattr(InterpreterBuilder, "create_get_program_id", number)
            launch(kernel, (1,), arguments, *how, **named)

    options = dataclasses.replace(interpreter_builder.options, debug=True, sanitize_overflow=True)
    monkeypatch.setattr(interpreter_builder, "options", options)
    for module in (activation, biases, combining, gating, projecting, weights):
        monkeypatch.setattr(module, "launch", launch_last)


def matrix(rows=ROWS, width=WIDTH, dtype=torch.float16):
    """Return a matrix whose last two rows are random; the others are not there yet."""
    x = torch.empty(rows, width, dtype=dtype)
    x[-2:] = torch.randn(2, width)
    return x


def assert_ends_alike(ours, expected, rtol=2e-3):
    torch.testing.assert_close(ours[-2:].double(), expected[-2:].double(), rtol=rtol, atol=2e-3)


def plan_of_two():
    """Two experts, of which the second has the last two rows."""
    rows = torch.zeros(ROWS, dtype=torch.int64)
    rows[-2:] = torch.tensor([ROWS - 1, ROWS - 2])
    return plan_of(rows, torch.tensor([ROWS - 2, ROWS], dtype=torch.int32), ROWS)


def test_a_sum_over_choices():
    y, gates, added = matrix(), matrix(width=1), matrix()
    ours = combining.combine(y, gates, ROWS, torch.float16, added)
    assert_ends_alike(ours, y[-2:].double() * gates[-2:].double() + added[-2:])


@pytest.mark.parametrize("name", ["swiglu", "relu2"])
def test_activations(name):
    function = Activation(name)
    h, F = matrix(), WIDTH // 2 if function.gated else WIDTH
    assert_ends_alike(activation.activate(h, function, Mask()), function(h[-2:].double()))
    da, gates, rows = matrix(width=F), torch.rand(ROWS, 1), torch.arange(ROWS)
    leaf = h[-2:].double().requires_grad_()
    a = function(leaf)
    (a * gates[-2:]).backward(da[-2:].double())
    found = activation.activate_backward(h, da, Gates(gates, rows), function, Mask())
    assert_ends_alike(found.h_RG, leaf.grad)
    assert_ends_alike(found.a_RF, a * gates[-2:])


@pytest.mark.parametrize("gated", [False, True])
def test_a_sum_with_shared_experts(gated):
    routed, shared, real = matrix(), matrix(), torch.ones(ROWS, dtype=torch.bool)
    logits = matrix(width=1) if gated else None
    gate = logits[-2:].double().sigmoid() if gated else 1.0
    assert_ends_alike(gating.add_gated(routed, shared, logits, real), routed[-2:].double() + shared[-2:] * gate)
    _, dshared, _ = gating.add_gated_backward(routed, shared, logits, real)
    assert_ends_alike(dshared, routed[-2:].double() * gate)


@pytest.mark.parametrize("scatter", [False, True])
def test_biases(scatter):
    y, bias = matrix(), torch.randn(2, WIDTH)
    expected = y[-2:].double() + bias[1]
    ours = biases.add_biases(y, bias, plan_of_two(), scatter)
    assert_ends_alike(ours, expected.flip(0) if scatter else expected)


@pytest.mark.parametrize("gather", [False, True])
def test_sums_of_rows(gather):
    x = matrix()
    ours = weights.sum_rows(x, None, plan_of_two()._replace(top_k=1), gather, torch.float32)
    torch.testing.assert_close(ours[1, -64:], x[-2:, -64:].float().sum(0))


def test_a_gate():
    x, weight = matrix(), torch.randn(3, WIDTH)
    logits, narrow = projecting.project(x, weight, torch.bfloat16)
    assert_ends_alike(logits, x[-2:].double() @ weight.double().T)
    assert_ends_alike(narrow, x, rtol=8e-3)


def test_a_gate_backwards():
    """Few and wide rows: a program goes through a hundredth of them."""
    n_token, width = 2**15 + 600, 2**16
    x, routed = matrix(n_token, width), matrix(n_token, width)
    weight, dlogits = torch.randn(2, width).half(), matrix(n_token, 2, torch.float32)
    call = ProjectionBackward(dlogits, x, weight, routed, None, need_x=True, need_weight=False)
    ours, _ = projecting.project_backward(call)
    expected = routed[-2:].double() + dlogits[-2:].double() @ weight.double()
    assert_ends_alike(ours[:, -32:], expected[:, -32:])
