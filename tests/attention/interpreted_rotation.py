"""The Triton kernel for the rotary embedding on a CPU: not collected itself, `tests/test_triton.py` runs it.

Triton's interpreter must be switched on before Triton is imported.
"""

import math
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import litgpt_moe_ext
from litgpt_moe_ext.attention import rotation as plain
from litgpt_moe_ext.attention.kernels import rotation
from tests.models import attention_config, initialized_model

EXAMPLES = int(os.environ.get("TRITON_EXAMPLES", "3"))
# The same operations in the same order, except that the interpreter cuts bfloat16 off where a card rounds.
EXACT = {"rtol": 0, "atol": 0}
TOLERANCE = {torch.float32: EXACT, torch.float16: EXACT, torch.bfloat16: {"rtol": 8e-3, "atol": 1e-6}}


def tables_of(B, T, n_elem, dtype=torch.float32, columns=1):
    """Return tables that are no rotation, so that every column counts; `columns` apart in memory."""
    return tuple(torch.randn(B, T, n_elem, columns).to(dtype)[..., 0] for _ in range(2))


def inputs_of(layout, B, H, G, T, d, dtype):
    """Return leaves, and what is made of them: a projection, views of one, or queries and keys of their own."""
    if layout in ("projection", "views"):
        qkv = torch.randn(B, T, (H + 2 * G) * d).to(dtype).requires_grad_()
        return [qkv], [qkv] if layout == "projection" else plain._split(qkv, (H, G))[:2]
    leaves = [torch.randn(B, n, T, d).to(dtype).requires_grad_() for n in (H, G)]
    return leaves, [x * 1 if layout == "contiguous" else (x.mT.contiguous() * 1).mT for x in leaves]


def run(layout, sizes, dtype, rotary):
    torch.manual_seed(1)
    _, H, G, *_ = sizes
    leaves, inputs = inputs_of(layout, *sizes, dtype)
    if layout != "projection":
        results = plain.rotate_both(*inputs, rotary)
    elif (results := plain.rotate_projection(*inputs, (H, G), rotary)) is None:
        q, k, v = plain._split(*inputs, (H, G))
        results = *plain.rotate_both(q, k, rotary), v
    gradients = torch.autograd.grad(results, leaves, [torch.randn(x.shape).to(dtype) for x in results])
    return results, gradients


def compare(B, H, G, T, d, n_elem, dtype, *, layout="projection", interleave=False, tables=None):
    tables = tables_of(1, T, n_elem) if tables is None else tables
    arguments = (layout, (B, H, G, T, d), dtype, plain.Rotary(tables, n_elem, interleave))
    ours, our_gradients = run(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "_has_kernel", lambda *_: False)
        theirs, their_gradients = run(*arguments)
    tolerance = TOLERANCE[dtype] if tables[0].dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(ours, theirs, **tolerance)
    # LitGPT's functions round gradients in 16 bits three times.
    loose = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.float16: {"rtol": 2e-3, "atol": 4e-3}}
    tolerance = loose.get(dtype, {"rtol": 2e-2, "atol": 4e-2})
    torch.testing.assert_close(our_gradients, their_gradients, **tolerance)
    for x in ours[:2]:
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
    layout=st.sampled_from(["projection", "views", "contiguous", "transposed"]),
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
    [
        (24, 24, True),
        (128, 64, True),
        (520, 8, False),
        *(
            pytest.param(d, n_elem, False, marks=pytest.mark.slow)
            for d, n_elem in ((16, 2), (64, 32), (96, 96), (128, 128))
        ),
    ],
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


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "heads", "tokens"])
def test_more_than_two_billion_elements(axis):
    """Only the pages that are used become memory."""
    memory = torch.empty(2**31 + 4096, dtype=torch.float16)

    def far(start, *shape):
        strides = list(torch.empty(shape, device="meta").stride())
        strides[axis] = 2**30 + 32
        return memory.as_strided(shape, strides, start).copy_(torch.randn(shape))

    q, turned, k = far(0, 3, 3, 3, 8), far(512, 3, 3, 3, 8), torch.randn(3, 3, 3, 8).half()
    tables = tuple(far(start, 3, 1, 3, 8)[:, 0] for start in (1024, 1536))
    rotation.rotate((q, k), (turned, torch.empty_like(k)), tables, False)
    near = torch.empty(q.shape, dtype=q.dtype)
    rotation.rotate((q.contiguous(), k), (near, torch.empty_like(k)), tuple(x.contiguous() for x in tables), False)
    assert torch.equal(turned, near)


@pytest.mark.parametrize(
    "settings",
    [
        {"rotary_percentage": 0.5},
        {"norm_qk": True, "rope_interleave": True},
        {"clip_qkv": 0.5, "rope_base": 100, "rope_local_base_freq": 10.0, "rope_indices": [1, 0]},
        {"attention_document_boundary": "eos", "attention_document_token_id": 3,
         "attention_document_restart_positions": True},
    ],
    ids=lambda settings: "-".join(settings),
)  # fmt: skip
def test_a_model(settings, monkeypatch):
    """With the kernel and without: the same logits and gradients, by whatever way layers come to it."""
    litgpt_moe_ext.register()
    model, ids = initialized_model(attention_config(**settings)), torch.randint(0, 9, (2, 12))
    results = []
    for used in (True, False):
        monkeypatch.setattr(plain, "_has_kernel", lambda *_, used=used: used)
        logits = model(ids)
        results.append((logits, *torch.autograd.grad(logits.square().mean(), list(model.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
