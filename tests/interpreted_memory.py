"""Every fault that `tests/watched_memory.py` looks for, in a kernel: not collected itself, `test_triton.py` runs it."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy(x, out, size, FAULT: tl.constexpr):
    """Copy `x` to `out` in two programs of a warp each, as it should be but for one thing."""
    n = tl.arange(0, 16)
    at = tl.program_id(0) * 16 + n
    inside = at <= size if FAULT == "a number too many" else at < size
    value = tl.load(x + at - 1 if FAULT == "a number too early" else x + at, mask=inside, other=0.0)
    if FAULT == "no other":
        value += tl.sum(tl.load(x + at, mask=at < 0))
    elif FAULT == "one place for all":
        at = n
    elif FAULT == "reads ahead":
        value += tl.load(out + at + 16, mask=at + 16 < size, other=0.0)
    elif FAULT == "reads back":
        value += tl.load(out + at - 16, mask=at >= 16, other=0.0)
    elif FAULT == "writes twice":
        tl.store(out + at, value, mask=inside)
    elif FAULT == "writes a number twice":
        at = at // 2 * 2
    elif FAULT == "reads again":
        tl.store(out + at, value, mask=inside)
        value = tl.load(out + at, mask=inside)
    elif FAULT == "adds atomically":
        tl.atomic_add(out + at, value, mask=inside)
    elif FAULT == "barrier":
        tl.debug_barrier()
    tl.store(out + at, value, mask=inside)


@triton.jit
def _double(x, out):
    at = tl.arange(0, 32)
    tl.store(out + at, 2.0 * tl.load(x + at))


def run(fault="", x=None, out=None):
    x = torch.randn(24) if x is None else x
    expected, out = x.clone(), torch.zeros(24) if out is None else out
    _copy[(2,)](x, out, 24, fault, num_warps=1)
    return out, expected


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("a number too many", "it does not reach so far"),
        ("a number too early", "it does not reach so far"),
        ("one place for all", "written by two programs"),
        ("reads ahead", "written, and another program has read it"),
        ("reads back", "read, and another program has written it"),
        ("writes twice", "written twice, without a barrier"),
        ("writes a number twice", "written twice, without a barrier"),
        ("reads again", "read after it was written, without a barrier"),
        ("adds atomically", "atomic operations come in any order"),
    ],
)
def test_a_fault_is_seen(fault, message):
    torch.testing.assert_close(*run())
    with pytest.raises(InterpreterError, match=message):
        run(fault)


def test_views_end_where_their_rows_do():
    with pytest.raises(InterpreterError, match="it does not reach so far"):
        run(x=torch.randn(8, 4)[:, :3])


def test_what_nothing_has_written_is_not_read(watch):
    nothing = torch.empty_like(torch.zeros(24))
    with pytest.raises(InterpreterError, match="nothing has written it"):
        run(x=nothing)
    watch.reads_unwritten = True
    assert run(x=nothing)[0].isnan().all()
    assert run("no other")[0].isnan().all()


def test_in_place():
    """Fewer numbers than threads are read by several of them, and by all before one writes only with a barrier."""
    x = torch.randn(24)
    with pytest.raises(InterpreterError, match="written after it was read, without a barrier"):
        run(x=x, out=x)
    torch.testing.assert_close(*run("barrier", x=x, out=x))
    x = torch.ones(32)
    _double[(1,)](x, x, num_warps=1)
    assert x.eq(2).all()
