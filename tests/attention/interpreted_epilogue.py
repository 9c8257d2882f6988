"""The Triton kernels for sinks on a CPU: not collected by itself, `tests/test_triton.py` runs it in a process.

Triton's interpreter must be switched on before Triton is imported.
"""

import math
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from litgpt_moe_ext.attention import flash
from litgpt_moe_ext.attention.kernels import sink_epilogue
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs
from tests.attention.attend import sink_attention

EXAMPLES = 2 * int(os.environ.get("TRITON_EXAMPLES", "3"))
LAYOUTS = {"BHTd": (0, 1, 2, 3), "BTHd": (0, 2, 1, 3), "TBHd": (2, 0, 1, 3)}
# The interpreter cuts bfloat16 off where a card rounds: two units in the last place.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 1.6e-2}


def lay_out(x_BHTd, layout, room=0):
    """Return the same numbers in another order of memory, in rows `room` longer than a head, and what follows."""
    order = LAYOUTS[layout]
    shape = [x_BHTd.size(i) for i in order]
    memory = torch.full((*shape[:3], shape[3] + room), math.nan, dtype=x_BHTd.dtype)
    view = memory[..., : shape[3]].permute([order.index(i) for i in range(4)])
    return view.copy_(x_BHTd), memory[..., shape[3] :]


def exact_gradients(dout, out, lse, sinks):
    share_BHT = (sinks.double()[:, None] - lse.double()).exp()
    return -(share_BHT * (dout.double() * out.double()).sum(-1)).sum((0, 2))


def compare(B, H, T, d, dtype, layout="BTHd", room=0, sink_dtype=torch.float32):
    out, behind = lay_out(torch.randn(B, H, T, d).to(dtype), layout, room)
    expected = out.double()
    lse = torch.randn(B, T, H).mul(4).transpose(1, 2)
    sinks = torch.randn(H, 2).mul(4).to(sink_dtype)[:, 0]
    wide_lse, wide_sinks = lse.double(), sinks.double()[:, None]
    sink_epilogue.add_sinks(out, lse, sinks)
    expected = expected * torch.sigmoid(wide_lse - wide_sinks)[..., None]
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=1e-6)
    torch.testing.assert_close(lse.double(), torch.logaddexp(wide_lse, wide_sinks), rtol=1e-6, atol=1e-6)
    assert behind.isnan().all()
    dout, _ = lay_out(torch.randn(B, H, T, d).to(dtype), "BHTd", room)
    ours = sink_epilogue.sink_gradients(dout, out, lse, sinks)
    assert ours.dtype == sink_dtype
    tolerance = 1e-5 if sink_dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        ours.double(), exact_gradients(dout, out, lse, sinks), rtol=tolerance, atol=tolerance * max(B * T * d, 1) ** 0.5
    )
    assert torch.equal(ours, sink_epilogue.sink_gradients(dout, out, lse, sinks.float()).to(sink_dtype))


@given(
    B=st.integers(0, 3),
    H=st.integers(1, 5),
    T=st.integers(0, 40),
    d=st.integers(1, 40) | st.sampled_from([64, 128, 256]),
    room=st.integers(0, 3),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(list(TOLERANCE)),
    sink_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_shape(B, H, T, d, room, layout, dtype, sink_dtype, seed):
    torch.manual_seed(seed)
    compare(B, H, T, d, dtype, layout, room, sink_dtype)


@pytest.mark.parametrize("d", [pytest.param(64, marks=pytest.mark.slow), 80])
def test_several_blocks(d):
    compare(2, 3, 2 * 2048 // d + 5, d, torch.float32, sink_dtype=torch.bfloat16)


def test_infinities_and_what_is_not_a_number():
    lse = torch.tensor([[[0.5, -math.inf, math.nan], [0.5, -math.inf, 2.0]]])
    sinks, out = torch.tensor([1.0, -math.inf]), torch.ones(1, 2, 3, 4)
    expected = torch.logaddexp(lse, sinks[:, None])
    sink_epilogue.add_sinks(out, lse, sinks)
    torch.testing.assert_close(lse, expected, equal_nan=True)
    assert out[0, 0, 1].eq(0).all()
    assert out[0, 0, 2].isnan().all()
    assert out[0, 1, [0, 2]].eq(1).all()
    finite = lse.clone().nan_to_num_(0.0, neginf=0.0)
    gradients = sink_epilogue.sink_gradients(out.nan_to_num(), out.nan_to_num(), finite, sinks)
    assert gradients.isfinite().all()
    assert gradients[1] == 0


def test_gradients_of_large_sinks():
    """Of rows behind the last one too, `exp` of a sink would be infinite."""
    dout, out = torch.randn(2, 1, 2, 3, 4)
    gradients = sink_epilogue.sink_gradients(dout, out, torch.full((1, 2, 3), 101.0), torch.full((2,), 100.0))
    torch.testing.assert_close(gradients, -(dout * out).sum((0, 2, 3)) / math.e)


@pytest.mark.parametrize("stride", [(0, 0, 0, 0), (40, 10, 2, 20)], ids=["expanded", "heads in columns"])
def test_gradients_of_any_stride(stride):
    dout = torch.randn(200).as_strided((2, 4, 5, 2), stride)
    out, lse, sinks = torch.randn(2, 4, 5, 2), torch.randn(2, 4, 5), torch.randn(8)[::2]
    ours = sink_epilogue.sink_gradients(dout, out, lse, sinks)
    torch.testing.assert_close(ours.double(), exact_gradients(dout, out, lse, sinks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "queries"])
def test_more_than_two_billion_elements(axis):
    """Only the pages that are used become memory."""
    memory = torch.empty(2**31 + 4096)

    def far(start, *shape):
        strides = list(torch.empty(shape, device="meta").stride())
        strides[axis] = 2**30 + 16
        return memory.as_strided(shape, strides, start).copy_(torch.randn(shape))

    out, lse, dout, sinks = far(0, 3, 3, 3, 8), far(512, 3, 3, 3), far(1024, 3, 3, 3, 8), torch.randn(3)
    results = []
    for o, logs, do in ((out, lse, dout), tuple(x.contiguous() for x in (out, lse, dout))):
        sink_epilogue.add_sinks(o, logs, sinks)
        results.append((o, logs, sink_epilogue.sink_gradients(do, o, logs, sinks)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_of_attention(groups, monkeypatch):
    """Through the kernel for CPUs, whose log-sum-exp and output are changed in place."""
    shapes = (2, 4, 9, 6), (2, groups, 9, 6), (2, groups, 9, 6), (4,)
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    dout = torch.randn(2, 4, 9, 6)
    monkeypatch.setattr(flash, "_has_epilogue", lambda out, lse: True)
    q, k, v, sinks = inputs
    out = flash.flash_attention(Call("flash_cpu", 0.4, True, None, 0.0), sinks, Inputs(q, k, v))
    expected = sink_attention(*inputs, scale=0.4, backend="eager")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), rtol=1e-4, atol=1e-5
    )
