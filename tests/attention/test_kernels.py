"""The GPU kernels' wiring, without a GPU: their operators are given plain implementations on the CPU.

What this holds: which arguments go in, in which order and layout, what is kept for the backward, and that the gradient
with sinks comes out right. What only a GPU can show: that the real operators keep to their schemas.
"""

import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from litgpt_moe_ext.attention import sinks
from litgpt_moe_ext.attention.causal import Softmax, causal_attention
from litgpt_moe_ext.attention.documents import Documents, document_offsets, find_documents
from litgpt_moe_ext.attention.kernels import backends
from litgpt_moe_ext.attention.kernels.flash import KERNELS, Call

T, D = 12, 8


def visible(offsets: Any, n: int, causal: bool, left: int | None, right: int | None) -> torch.Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = torch.ones(n, n, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if left is not None and left >= 0:
        seen &= i - j <= left
    if right is not None and right >= 0:
        seen &= j - i <= right
    if offsets is not None:
        document = torch.searchsorted(offsets.long(), torch.arange(n), right=True)
        seen &= document[:, None] == document[None]
    return seen


def attention(q: Any, k: Any, v: Any, seen: Any, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, T, D) in, out and lse (B, H, T)."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attention_backward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, seen: Any, scale: float) -> Any:
    """The flash backward: everything from `out` and `lse`."""
    n = q.size(1) // k.size(1)
    kk, vv = (x.repeat_interleave(n, 1) for x in (k, v))
    p = ((q @ kk.mT * scale).masked_fill(~seen, -math.inf) - lse[..., None]).exp()
    ds = p * (dout @ vv.mT - (dout * out).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (k.size(1), n)).sum(2) for x in (ds.mT @ q, p.mT @ dout))
    return ds @ kk, dk, dv


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)[None] if x.dim() == 3 else x.transpose(1, 2)


def heads_last(x: torch.Tensor, packed: bool) -> torch.Tensor:
    return x[0].transpose(0, 1) if packed else x.transpose(1, 2)


RNG = torch.tensor([3, 4], dtype=torch.uint64)


def flash_forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale=None,
                  window_size_left=None, window_size_right=None, **unused):  # fmt: skip
    assert (cum_q is None) == (q.dim() == 4)
    assert max_q == max_k == T
    qh, kh, vh = map(heads_first, (q, k, v))
    seen = visible(cum_q, qh.size(2), causal, window_size_left, window_size_right)
    out, lse = attention(qh, kh, vh, seen, scale)
    return heads_last(out, q.dim() == 3), lse[0] if q.dim() == 3 else lse, RNG, RNG[:0], q[:0]


def flash_backward(dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng, unused, *, scale=None,
                   window_size_left=None, window_size_right=None):  # fmt: skip
    assert torch.equal(rng.long(), RNG.long())
    seen = visible(cum_q, q.size(-3), causal, window_size_left, window_size_right)
    lse = lse[None] if q.dim() == 3 else lse
    grads = attention_backward(*map(heads_first, (dout, q, k, v, out)), lse, seen, scale)
    return tuple(heads_last(grad, q.dim() == 3) for grad in grads)


def sdpa_flash_forward(q, k, v, dropout=0.0, causal=False, debug=False, *, scale=None):
    out, lse = attention(q, k, v, visible(None, T, causal, None, None), scale)
    return out, lse, None, None, T, T, RNG, RNG[:0], q[:0]


def sdpa_flash_backward(dout, q, k, v, out, lse, cq, ck, mq, mk, dropout, causal, rng, unused, *, scale=None):
    assert (mq, mk) == (T, T)
    assert torch.equal(rng.long(), RNG.long())
    return attention_backward(dout, q, k, v, out, lse, visible(None, T, causal, None, None), scale)


def cudnn_forward(q, k, v, bias, compute_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
    assert bias is None
    assert compute_lse
    out, lse = attention(q, k, v, visible(None, T, causal, None, None), scale)
    return out, lse[..., None], None, None, T, T, RNG[:1], RNG[1:], None


def cudnn_backward(dout, q, k, v, out, lse, seed, offset, bias, cq, ck, mq, mk, dropout, causal, *, scale=None):
    assert lse.shape == (*q.shape[:3], 1)
    assert (seed.item(), offset.item()) == (3, 4)
    return attention_backward(dout, q, k, v, out, lse[..., 0], visible(None, T, causal, None, None), scale)


def efficient_forward(q, k, v, bias, compute_lse, dropout=0.0, causal=False, *, scale=None):
    assert q.size(1) == k.size(1) == v.size(1)
    out, lse = attention(q, k, v, visible(None, T, causal, None, None), scale)
    return out, torch.nn.functional.pad(lse, (0, -T % 32), value=math.inf), RNG[:1], RNG[1:]


def efficient_backward(dout, q, k, v, bias, out, lse, seed, offset, dropout, mask, causal=False, *, scale=None):
    assert lse.size(-1) % 32 == 0
    assert (lse[..., T:] == math.inf).all()
    assert (seed.item(), offset.item()) == (3, 4)
    grads = attention_backward(dout, q, k, v, out, lse[..., :T], visible(None, T, causal, None, None), scale)
    return (*grads, None)


def flash_attn_package() -> types.ModuleType:
    """A stand-in for `flash_attn.flash_attn_interface` 2.8 with its signatures."""

    def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size_left=-1,
                       window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False):  # fmt: skip
        window = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        out, lse, *_ = flash_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, causal, False, scale=softmax_scale, **window
        )
        return out, lse, None, RNG

    def forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                return_softmax):  # fmt: skip
        return varlen_forward(q, k, v, None, None, T, T, dropout_p, softmax_scale, causal, window_size_left,
                              window_size_right)  # fmt: skip

    def backward(dout, q, k, v, out, lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                 window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):  # fmt: skip
        grads = flash_backward(dout, q, k, v, out, lse, None, None, T, T, dropout_p, causal, rng_state, None,
                               scale=softmax_scale, window_size_left=window_size_left,
                               window_size_right=window_size_right)  # fmt: skip
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    def varlen_backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal,
                        window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
                        rng_state=None):  # fmt: skip
        grads = flash_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, causal, rng_state, None,
                               scale=softmax_scale, window_size_left=window_size_left,
                               window_size_right=window_size_right)  # fmt: skip
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    module = types.ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_forward, module._flash_attn_backward = forward, backward
    module._flash_attn_varlen_forward, module._flash_attn_varlen_backward = varlen_forward, varlen_backward
    return module


@pytest.fixture
def gpu_operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    for name, implementation in {
        "_flash_attention_forward": flash_forward,
        "_flash_attention_backward": flash_backward,
        "_scaled_dot_product_flash_attention": sdpa_flash_forward,
        "_scaled_dot_product_flash_attention_backward": sdpa_flash_backward,
        "_scaled_dot_product_cudnn_attention": cudnn_forward,
        "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
        "_scaled_dot_product_efficient_attention": efficient_forward,
        "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    }.items():
        library.impl(name, implementation, "CPU")
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = flash_attn_package()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    yield
    library._destroy()


def make_inputs() -> list[torch.Tensor]:
    shapes = (2, 4, T, D), (2, 2, T, D), (2, 2, T, D), (4,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


CASES = [
    *((name, None, False) for name in ("flash_attn", "flash", "cudnn", "efficient")),
    *(
        (name, window, documents)
        for name in ("flash_attn", "flash")
        for window in (None, 4)
        for documents in (False, True)
    ),
]


@pytest.mark.parametrize(("backend", "window", "has_documents"), CASES)
@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.usefixtures("gpu_operators")
def test_kernels_equal_the_reference(backend: str, window: int | None, has_documents: bool, has_sinks: bool) -> None:
    q, k, v, s = make_inputs()
    inputs = [q, k, v, s] if has_sinks else [q, k, v]
    documents, offsets = None, None
    if has_documents:
        start = find_documents((torch.rand(2, T) < 0.3).long(), "eos", 1).start_BT
        # These are more documents than `document_offsets` has room for in so small a batch.
        first = (start == torch.arange(T)).flatten()
        offsets = torch.cat((first.nonzero().flatten(), torch.tensor([2 * T] * 3))).int()
        documents = Documents(start)
    call = Call(0.4, True, window, 0.0)
    sink = s if has_sinks else None
    out = sinks._Flash.apply(q, k, v, sink, None, offsets, backend, call)
    expected = causal_attention(q, k, v, Softmax(sink, 0.4, backend="eager"), window, documents)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(("backend", "window", "has_documents"), [case for case in CASES if case[0] != "flash_attn"])
def test_operators_accept_the_arguments(backend: str, window: int | None, has_documents: bool) -> None:
    # The real schemas and the shapes their fake implementations promise.
    q, k, v = (torch.empty(2, heads, T, D, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    offsets = torch.empty(5, dtype=torch.int32, device="meta") if has_documents else None
    call, kernel = Call(0.4, True, window, 0.1), KERNELS[backend]
    out, lse, rest = kernel.forward(q, k, v, None, offsets, call)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    grads = kernel.backward(out, q, k, v, None, offsets, out, lse, rest, call)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def cuda_like(dtype: torch.dtype, head_size: int = 64) -> list[torch.Tensor]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        return [torch.empty(2, 4, T, head_size, dtype=dtype, device="cuda") for _ in range(3)]


def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capability, installed = (9, 0), False
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(backends, "flash_attn_installed", lambda: installed)
    half, single = cuda_like(torch.bfloat16), cuda_like(torch.float32)
    assert backends.choose_backend(*half) == "flash"
    assert backends.choose_backend(*half, forced="cudnn") == "cudnn"
    assert backends.choose_backend(*cuda_like(torch.bfloat16, 512)) == "efficient"
    assert backends.choose_backend(*cuda_like(torch.bfloat16, 63)) == "eager"
    assert backends.choose_backend(*single) == "efficient"
    assert backends.choose_backend(*half, mask=torch.ones(T, T)) == "eager"
    with pytest.raises(ValueError, match=r"'flash' cannot be used here: it has no torch.float32"):
        backends.choose_backend(*single, forced="flash")
    with pytest.raises(ValueError, match="flash-attn is not installed"):
        backends.choose_backend(*half, forced="flash_attn")
    with pytest.raises(ValueError, match="it works on cpu tensors, these are on cuda"):
        backends.choose_backend(*half, forced="flash_cpu")
    installed = True
    assert backends.choose_backend(*half) == "flash_attn"
    capability = (7, 5)
    assert backends.choose_backend(*half) == "efficient"


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backends._announce.cache_clear()
    inputs = [x.detach() for x in make_inputs()]
    with caplog.at_level("INFO", logger="litgpt_moe_ext.attention.kernels.backends"):
        for _ in range(3):
            sinks.sink_attention(*inputs, scale=0.4)
        sinks.sink_attention(*inputs, scale=0.4, backend="eager")
    assert caplog.messages == [
        "attention: flash_cpu for torch.float64 on cpu (chosen)",
        "attention: eager for torch.float64 on cpu (forced)",
    ]
    with pytest.raises(ValueError, match="attention_backend: 'flash' cannot be used here: it works on cuda tensors"):
        sinks.sink_attention(*inputs, scale=0.4, backend="flash")


def test_offsets_reach_the_kernel(gpu_operators: None) -> None:
    idx = torch.zeros(2, T, dtype=torch.long)
    q, k, v, s = make_inputs()
    offsets = document_offsets(find_documents(idx, "eos", 1).start_BT == torch.arange(T))
    out = sinks._Flash.apply(q, k, v, s, None, offsets, "flash", Call(0.4, True, None, 0.0))
    torch.testing.assert_close(out, sinks.sink_attention(q, k, v, s, scale=0.4, backend="eager"))
