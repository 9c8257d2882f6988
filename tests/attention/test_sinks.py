"""Sink attention: the flash backend against the written-out reference, and how it gets on with the rest of torch."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe_ext.attention.kernels import choice
from litgpt_moe_ext.attention.kernels.choice import choose_kernel
from litgpt_moe_ext.attention.sinks import Softmax, fused_sink_attention
from tests.attention.attend import sink_attention


def make_inputs(B=2, G=2, n=2, T=5, S=None, d=4, dtype=torch.float64, device="cpu") -> tuple[torch.Tensor, ...]:
    """Return q (B, G * n, T, d), k and v (B, G, S, d) and sinks (G * n,), all of them leaves that want gradients."""
    S = T if S is None else S
    shapes = (B, G * n, T, d), (B, G, S, d), (B, G, S, d), (G * n,)
    return tuple(torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes)


def gradients(inputs: tuple[torch.Tensor, ...], dout: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(sink_attention(*inputs, scale=0.4, **kwargs), inputs, dout)


def test_reference_is_the_definition() -> None:
    q, k, v, sinks = make_inputs(B=1, G=1, n=2, T=3)
    out = sink_attention(q, k, v, sinks, scale=0.5, backend="eager")
    for head in range(2):
        for t in range(3):
            weights = [math.exp(0.5 * q[0, head, t].dot(k[0, 0, s]).item()) for s in range(t + 1)]
            total = sum(weights) + math.exp(sinks[head].item())
            expected = sum(weight / total * v[0, 0, s] for s, weight in enumerate(weights))
            torch.testing.assert_close(out[0, head, t], expected)


@pytest.mark.parametrize("backend", ["eager", "flash_cpu"])
def test_a_sink_of_minus_infinity_is_no_sink(backend: str) -> None:
    q, k, v, _ = make_inputs()
    out = sink_attention(q, k, v, torch.full((4,), -math.inf), scale=0.4, backend=backend)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool) -> None:
    inputs = make_inputs(B=2, G=2, n=2, T=4, d=3)
    mask = torch.randn(2, 1, 4, 4, dtype=torch.float64) if masked else None
    assert torch.autograd.gradcheck(lambda *x: sink_attention(*x, scale=0.7, mask=mask, backend="flash_cpu"), inputs)


@pytest.mark.parametrize("sink", [-2.0, 0.0, 3.0])
def test_query_and_key_gradients_account_for_the_sink(sink: float) -> None:
    # Treating the log-sum-exp as a constant leaves the output and the gradients of v and of the sinks right, and those
    # of q and k wrong.
    q, k, v, sinks = make_inputs(T=6)
    sinks = torch.full_like(sinks, sink).requires_grad_()
    dout = torch.randn_like(q)
    dq, dk, _, _ = gradients((q, k, v, sinks), dout, backend="flash_cpu")
    dq_ref, dk_ref, _, _ = gradients((q, k, v, sinks), dout, backend="eager")
    torch.testing.assert_close(dq, dq_ref, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dk, dk_ref, rtol=1e-10, atol=1e-12)


def test_a_mask_that_learns_gets_its_gradient() -> None:
    inputs, mask = make_inputs(), torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda mask: sink_attention(*inputs, scale=0.7, mask=mask), mask)


@settings(max_examples=40, deadline=None)
@given(
    B=st.integers(1, 3),
    G=st.integers(1, 3),
    n=st.integers(1, 3),
    T=st.integers(1, 9),
    more_keys=st.integers(0, 40),
    d=st.integers(1, 9),
    mask_kind=st.sampled_from(["causal", "bool", "additive"]),
    seed=st.integers(0, 2**16),
)
def test_flash_equals_eager(B: int, G: int, n: int, T: int, more_keys: int, d: int, mask_kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    S = T if mask_kind == "causal" else T + more_keys
    inputs = make_inputs(B, G, n, T, S, d)
    visible = torch.rand(B, 1, T, S) < 0.7  # now and then a row that may look nowhere
    mask = {
        "causal": None,
        "bool": visible,
        "additive": torch.randn(T, S).masked_fill(~visible[0, 0], -math.inf),  # of another type than the queries
    }[mask_kind]
    out = sink_attention(*inputs, scale=0.4, mask=mask, backend="flash_cpu")
    expected = sink_attention(*inputs, scale=0.4, mask=mask, backend="eager")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    dout = torch.randn_like(out)
    actual_grads = gradients(inputs, dout, mask=mask, backend="flash_cpu")
    expected_grads = gradients(inputs, dout, mask=mask, backend="eager")
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "flash_cpu"])
def test_half_precision_is_close_to_double(dtype: torch.dtype, backend: str) -> None:
    inputs = make_inputs(T=40, d=16, dtype=dtype)
    dout = torch.randn_like(inputs[0])
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    out = sink_attention(*inputs, scale=0.25, backend=backend)
    assert out.dtype == dtype
    expected = sink_attention(*exact_inputs, scale=0.25, backend="eager")
    tolerance = 0.03 if dtype == torch.bfloat16 else 0.004
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grads = gradients(inputs, dout, backend=backend)
    assert all(grad.dtype == dtype for grad in grads)
    for grad, exact in zip(grads, gradients(exact_inputs, dout.double(), backend="eager"), strict=True):
        torch.testing.assert_close(grad.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


def test_float32_sinks_with_bfloat16_activations() -> None:
    q, k, v, sinks = make_inputs(dtype=torch.bfloat16)
    sinks = sinks.detach().float().requires_grad_()
    sink_attention(q, k, v, sinks, scale=0.4).sum().backward()
    assert sinks.grad.dtype == torch.float32


@pytest.mark.parametrize("shape", [(20,), (20, 20), (4, 20, 20), (2, 1, 1, 20), (2, 4, 20, 20)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("has_sinks", [True, False])
def test_masks_of_any_shape_and_type(shape: tuple[int, ...], kind: torch.dtype, has_sinks: bool) -> None:
    visible = torch.rand(shape) < 0.6
    visible[..., 0] = True
    mask = visible if kind == torch.bool else torch.randn(shape, dtype=kind)
    for dtype in (torch.float32, torch.float64):
        q, k, v, sinks = make_inputs(T=20, dtype=dtype)
        inputs = q, k, v, sinks if has_sinks else None
        expected = sink_attention(*inputs, scale=0.7, mask=mask, backend="eager")
        torch.testing.assert_close(sink_attention(*inputs, scale=0.7, mask=mask), expected)


def test_the_fully_masked_row_is_zero() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    for backend in ("eager", "flash_cpu"):
        inputs = make_inputs(T=2)
        out = sink_attention(*inputs, scale=0.4, mask=mask, backend=backend)
        assert (out[:, :, 1] == 0).all()
        assert (out[:, :, 0] != 0).any()
        out[:, :, 1].sum().backward()
        assert all((x.grad == 0).all() for x in inputs)


def test_choice_of_backend() -> None:
    def choose(**kwargs) -> str:
        return choose_kernel(*make_inputs(**kwargs)[:3])

    assert choose() == choose(dtype=torch.bfloat16) == choose(dtype=torch.float32) == "flash_cpu"
    assert choose(device="meta") == "eager"
    assert choose(T=0) == "eager"
    q, k, v, sinks = make_inputs(d=4)
    assert choose_kernel(q, k, v[..., :3]) == "eager"
    assert choose_kernel(q, k.float(), v) == "eager"
    assert choose_kernel(q, k, v, ("mask", "mask_gradient")) == "eager"
    transposed = q.detach().mT.contiguous().mT
    assert choose_kernel(transposed, k, v) == "eager"
    torch.testing.assert_close(
        sink_attention(transposed, k, v, sinks, scale=1), sink_attention(q, k, v, sinks, scale=1)
    )
    assert sink_attention(q, k, v[..., :3], sinks, scale=1).shape == (2, 4, 5, 3)
    assert sink_attention(*make_inputs(T=0), scale=1).shape == (2, 4, 0, 4)


def test_a_slow_fallback_is_said_once(recwarn: pytest.WarningsRecorder) -> None:
    choice._announce.cache_clear()
    q, k, v, sinks = make_inputs()
    sink_attention(q, k, v, sinks, scale=1)
    sink_attention(q, k, v, sinks, scale=1, backend="eager")
    sink_attention(*make_inputs(device="meta"), scale=1)
    # Windows and documents are cut into pieces, which a kernel computes.
    assert choose_kernel(q, k, v, ("window",)) == choose_kernel(q, k, v, ("documents",)) == "eager"
    assert not recwarn.list
    for _ in range(2):
        sink_attention(q, k, v[..., :3], sinks, scale=1)
    assert [str(warning.message) for warning in recwarn.list] == [
        "attention: eager for torch.float64 on cpu (chosen): no flash kernel can do this, so memory and time grow with "
        "the square of the sequence length"
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("n", [1, 2])
def test_flops_are_counted_as_those_of_sdpa(device: str, n: int) -> None:
    q, k, v, sinks = make_inputs(n=n, T=16, dtype=torch.float32, device=device)

    def count(attend) -> int:
        with FlopCounterMode(display=False) as counter:
            out = attend()
            out.sum().backward()
        assert out.shape == q.shape
        assert out.device.type == device
        return counter.get_total_flops()

    assert count(lambda: sink_attention(q, k, v, sinks, scale=0.4)) == count(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=n > 1)
    )


@pytest.mark.parametrize("backend", ["eager", "flash_cpu"])
def test_autocast(backend: str) -> None:
    inputs = make_inputs(T=12, dtype=torch.float32)
    expected = gradients(inputs, torch.ones_like(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sink_attention(*inputs, scale=0.4, backend=backend)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert all(grad.dtype == torch.float32 for grad in grads)
    torch.testing.assert_close(grads, expected, rtol=0.05, atol=0.05)
    exact = make_inputs(T=12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sink_attention(*exact, scale=0.4, backend=backend)
    assert torch.equal(out, sink_attention(*exact, scale=0.4, backend=backend)), "as torch's, which leaves float64"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    inputs = make_inputs()
    dout = torch.randn_like(inputs[0])
    out = checkpoint(lambda *x: sink_attention(*x, scale=0.4), *inputs, use_reentrant=use_reentrant)
    out.backward(dout)
    torch.testing.assert_close(tuple(x.grad for x in inputs), gradients(inputs, dout))


def test_a_kernel_that_knows_no_windows_is_not_asked_for_one() -> None:
    q, k, v, sinks = make_inputs()
    softmax = Softmax(sinks, 0.4, backend="flash_cpu")
    assert fused_sink_attention(q, k, v, softmax, 3, None) is None
    assert fused_sink_attention(q, k, v, softmax, None, None) is not None


def test_how_many_weights_are_dropped() -> None:
    zeros, v = torch.zeros(1, 4, 64, 64), torch.eye(64).expand(1, 4, 64, 64)
    settings = {"scale": 1.0, "dropout": 0.2, "causal": False, "backend": "eager"}
    weights = sink_attention(zeros, zeros, v, torch.zeros(4), **settings)
    assert (weights == 0).float().mean().item() == pytest.approx(0.2, abs=0.02)


def test_a_checkpoint_may_keep_what_the_kernel_returns() -> None:
    """As selective activation checkpointing does; the sinks then change a copy of it."""
    inputs = make_inputs()
    kept = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    out = checkpoint(lambda *x: sink_attention(*x, scale=0.4), *inputs, use_reentrant=False, context_fn=contexts)
    dout = torch.randn_like(out)
    out.backward(dout)
    torch.testing.assert_close(tuple(x.grad for x in inputs), gradients(inputs, dout))


def test_compiles_without_graph_breaks() -> None:
    inputs = make_inputs(dtype=torch.float32)
    compiled = torch.compile(sink_attention, fullgraph=True, backend="aot_eager")
    dout = torch.randn_like(inputs[0])
    grads = torch.autograd.grad(compiled(*inputs, scale=0.4), inputs, dout)
    torch.testing.assert_close(grads, gradients(inputs, dout))


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v, sinks = make_inputs(G=2, n=2)
    with pytest.raises(ValueError, match="3 query heads must be a multiple of the 2 key/value heads"):
        sink_attention(q[:, :3], k, v, sinks[:3], scale=1)
    with pytest.raises(ValueError, match=r"sinks of shape \(2,\) must have shape \(4,\)"):
        sink_attention(q, k, v, sinks[:2], scale=1)
    with pytest.raises(ValueError, match="1 queries for 5 keys need a mask"):
        sink_attention(q[:, :, :1], k, v, sinks, scale=1)
