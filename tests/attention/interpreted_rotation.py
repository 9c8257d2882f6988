"""The Triton kernel for the rotary embedding on a CPU: not collected itself, `test_rotation.py` runs it in a process.

Triton's interpreter must be switched on before Triton is imported.
"""

import math
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from litgpt_moe_ext.attention import rotation as plain
from litgpt_moe_ext.attention.kernels import rotation

EXAMPLES = int(os.environ.get("TRITON_EXAMPLES", "3"))
# The same operations in the same order, except that the interpreter cuts bfloat16 off where a card rounds.
EXACT = {"rtol": 0, "atol": 0}
TOLERANCE = {torch.float32: EXACT, torch.float16: EXACT, torch.bfloat16: {"rtol": 8e-3, "atol": 1e-6}}


def tables_of(B, T, n_elem, dtype=torch.float32, columns=1):
    """Return tables that are no rotation, so that every column counts; `columns` apart in memory."""
    return tuple(torch.randn(B, T, n_elem, columns).to(dtype)[..., 0] for _ in range(2))


def heads_of(layout, B, H, G, T, d, dtype):
    """Return what is differentiated, and queries and keys made of it: views of a projection, or contiguous tensors."""
    if layout == "packed":
        qkv = torch.randn(B, T, (H + 2 * G) * d).to(dtype).requires_grad_()
        q, k, _ = qkv.split((H * d, G * d, G * d), dim=-1)
        return [qkv], *(x.unflatten(-1, (-1, d)).transpose(1, 2) for x in (q, k))
    leaves = [torch.randn(B, n, T, d).to(dtype).requires_grad_() for n in (H, G)]
    return leaves, *(x * 1 if layout == "contiguous" else (x.mT.contiguous() * 1).mT for x in leaves)


def run(rotate, layout, sizes, dtype, tables, interleave, n_elem):
    torch.manual_seed(1)
    leaves, q, k = heads_of(layout, *sizes, dtype)
    results = rotate(q, k, tables, n_elem, interleave)
    gradients = torch.autograd.grad(results, leaves, [torch.randn(x.shape).to(dtype) for x in results])
    return results, gradients


def compare(B, H, G, T, d, n_elem, dtype, *, layout="packed", interleave=False, tables=None):
    tables = tables_of(1, T, n_elem) if tables is None else tables
    arguments = (layout, (B, H, G, T, d), dtype, tables, interleave, n_elem)
    ours, our_gradients = run(plain.rotate_both, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_has_kernel", lambda *_: False)
        theirs, their_gradients = run(plain.rotate_both, *arguments)
    tolerance = TOLERANCE[dtype] if tables[0].dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(ours, theirs, **tolerance)
    # LitGPT's functions round gradients in 16 bits three times.
    loose = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.float16: {"rtol": 2e-3, "atol": 4e-3}}
    tolerance = loose.get(dtype, {"rtol": 2e-2, "atol": 4e-2})
    torch.testing.assert_close(our_gradients, their_gradients, **tolerance)
    for x in ours:
        assert x.transpose(1, 2).is_contiguous()


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    monkeypatch.setattr(plain, "_has_kernel", lambda *_: True)


@st.composite
def shapes(draw):
    d = draw(st.integers(2, 40) | st.sampled_from([16, 24, 64, 96, 128]))
    whole = draw(st.booleans()) and d % 2 == 0
    n_elem = d if whole else 2 * draw(st.integers(1, d // 2))
    G = draw(st.integers(1, 3))
    return draw(st.integers(0, 2)), G * draw(st.integers(1, 3)), G, draw(st.integers(0, 12)), d, n_elem


@given(
    shape=shapes(),
    interleave=st.booleans(),
    layout=st.sampled_from(["packed", "contiguous", "transposed"]),
    per_row=st.booleans(),
    columns=st.integers(1, 2),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_any_shape(shape, interleave, layout, per_row, columns, dtype):
    B, _, _, T, _, n_elem = shape
    tables = tables_of(B if per_row else 1, T, n_elem, columns=columns)
    compare(*shape, dtype, layout=layout, interleave=interleave, tables=tables)


@pytest.mark.parametrize(
    ("d", "n_elem", "interleave"),
    [(16, 2, False), (24, 24, True), (64, 32, False), (96, 96, False), (128, 64, True), (128, 128, False)],
)
def test_head_sizes(d, n_elem, interleave):
    """Six query heads are a block and a half, one key head a quarter of one; tokens are blocks and a rest."""
    compare(2, 6, 1, 5, d, n_elem, torch.float32, interleave=interleave, tables=tables_of(2, 5, n_elem))


def test_tables_of_16_bits():
    """A model in bfloat16 has such tables; LitGPT's functions round each product, the kernel the sum."""
    compare(2, 4, 2, 9, 16, 16, torch.bfloat16, tables=tables_of(1, 9, 16, torch.bfloat16))


@pytest.mark.parametrize("interleave", [False, True], ids=["halves", "neighbours"])
def test_a_rotation_and_back(interleave):
    """What the backward pass does to a rotation's result, and writing into part of what is there."""
    angle = torch.randn(1, 9, 6).repeat(1, 1, 2)
    tables = angle.cos(), angle.sin()
    sources = torch.randn(2, 4, 9, 24), torch.randn(2, 2, 9, 24)
    memory = [torch.full((2, 9, 6 + n, 24), math.nan) for n in (4, 2)]
    turned = tuple(x[:, :, 6:].transpose(1, 2) for x in memory)
    rotation.rotate(sources, turned, tables, interleave)
    back = tuple(torch.empty_like(x) for x in sources)
    rotation.rotate(turned, back, tables, interleave, backward=True)
    torch.testing.assert_close(back, sources, rtol=1e-5, atol=1e-6)
    assert all(x[:, :, :6].isnan().all() for x in memory)
