"""The GPU kernels' wiring, without a GPU: their operators are given plain implementations on the CPU.

What this holds: which arguments go in, in which order and layout, what is kept for the backward, and that the gradient
with sinks comes out right. What only a GPU can show: that the real operators keep to their schemas.
"""

import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt_moe_ext.attention.causal_attention import causal_attention
from litgpt_moe_ext.attention.documents import Documents, document_offsets, find_documents, largest_extent
from litgpt_moe_ext.attention.flash import flash_attention
from litgpt_moe_ext.attention.kernels import choice
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs
from litgpt_moe_ext.attention.kernels.choice import choose, choose_kernel
from litgpt_moe_ext.attention.kernels.kernel import Workload
from litgpt_moe_ext.attention.kernels.registry import KERNELS, functions_of
from litgpt_moe_ext.attention.sinks import Softmax, fused_sink_attention
from litgpt_moe_ext.kernels.gpu import vendor_kind
from tests.attention.attend import sink_attention
from tests.fake_cuda import CAPABILITIES, fake_cuda

T, d = 12, 8


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
    """(B, H, T, d) in, out and lse (B, H, T)."""
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
    assert max_q == max_k == (T if cum_q is None else cum_q.diff().max())
    qh, kh, vh = map(heads_first, (q, k, v))
    seen = visible(cum_q, qh.size(2), causal, window_size_left, window_size_right)
    out, lse = attention(qh, kh, vh, seen, scale)
    return heads_last(out, q.dim() == 3), lse[0] if q.dim() == 3 else lse, RNG, RNG[:0], q[:0]


def flash_backward(dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng, unused, *, scale=None,
                   window_size_left=None, window_size_right=None):  # fmt: skip
    assert max_q == max_k == (T if cum_q is None else cum_q.diff().max())
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
    assert mask == [True, True, True, False], "the gradients that are computed"
    grads = attention_backward(dout, q, k, v, out, lse[..., :T], visible(None, T, causal, None, None), scale)
    return (*grads, None)


def flash_attn_package() -> types.ModuleType:
    """A stand-in for `flash_attn.flash_attn_interface` 2.8 with its signatures, which takes integers only."""

    def sides(left, right):
        assert type(left) is type(right) is int, "-1 is all keys"
        return {"window_size_left": left, "window_size_right": right}

    def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal, window_size_left=-1,
                       window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False):  # fmt: skip
        window = sides(window_size_left, window_size_right)
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
                               scale=softmax_scale, **sides(window_size_left, window_size_right))  # fmt: skip
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    def varlen_backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, max_q, max_k, dropout_p, softmax_scale, causal,
                        window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
                        rng_state=None):  # fmt: skip
        grads = flash_backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, causal, rng_state, None,
                               scale=softmax_scale, **sides(window_size_left, window_size_right))  # fmt: skip
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)

    module = types.ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_forward, module._flash_attn_backward = forward, backward
    module._flash_attn_varlen_forward, module._flash_attn_varlen_backward = varlen_forward, varlen_backward
    return module


def flash_attn_4_package() -> types.ModuleType:
    """A stand-in for `flash_attn.cute.interface` of 4.0.0b36 with the names of the arguments that are used."""

    def forward(q, k, v, *, softmax_scale, causal, window_size_left, window_size_right, return_lse, cu_seqlens_q=None,
                cu_seqlens_k=None, max_seqlen_q=T, max_seqlen_k=T):  # fmt: skip
        assert return_lse
        window = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        out, lse, *_ = flash_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal,
                                     False, scale=softmax_scale, **window)  # fmt: skip
        return out, lse, None, None, None

    def backward(q, k, v, out, dout, lse, *, softmax_scale, causal, window_size_left, window_size_right, deterministic,
                 cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=T, max_seqlen_k=T):  # fmt: skip
        window = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        return flash_backward(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0,
                              causal, RNG, None, scale=softmax_scale, **window)  # fmt: skip

    module = types.ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
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
    package.cute = types.ModuleType("flash_attn.cute")
    package.cute.interface = flash_attn_4_package()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package.cute)
    yield
    library._destroy()


def make_inputs() -> list[torch.Tensor]:
    shapes = (2, 4, T, d), (2, 2, T, d), (2, 2, T, d), (4,)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


CASES = [
    *((name, None, False) for name in ("flash_attn", "flash", "flash_hip", "flash_attn_4", "cudnn", "efficient")),
    *(
        (name, window, documents)
        for name in ("flash_attn", "flash", "flash_attn_4")
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
    documents, offsets, longest = None, None, None
    if has_documents:
        start = find_documents((torch.rand(2, T) < 0.3).long(), "eos", 1).start_BT
        first = (start == torch.arange(T)).flatten()
        offsets = torch.cat((first.nonzero().flatten(), torch.tensor([2 * T] * 3))).int()
        documents, longest = Documents(start), int(offsets.diff().max())
    sink = s if has_sinks else None
    out = flash_attention(Call(backend, 0.4, True, window, 0.0, longest), sink, Inputs(q, k, v, None, offsets))
    expected = causal_attention(q, k, v, Softmax(sink, 0.4, backend="eager"), window, documents)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize(
    ("backend", "window", "has_documents"), [case for case in CASES if not case[0].startswith("flash_attn")]
)
def test_operators_accept_the_arguments(backend: str, window: int | None, has_documents: bool) -> None:
    # The real schemas and the shapes their fake implementations promise.
    q, k, v = (torch.empty(2, heads, T, d, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    offsets = torch.empty(5, dtype=torch.int32, device="meta") if has_documents else None
    call, inputs, kernel = Call(backend, 0.4, True, window, 0.1), Inputs(q, k, v, None, offsets), functions_of(backend)
    result = kernel.forward(inputs, call)
    assert result.out_BHTd.shape == q.shape
    assert result.lse_BHT.shape == q.shape[:3]
    grads = kernel.backward(result.out_BHTd, inputs, result, call)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


def on_card(
    capability: tuple[int, int], *needs: str, dtype: str = "bfloat16", head_size: int = 64, forced: str | None = None
) -> str:
    return choose(Workload("cuda", capability, dtype, head_size, needs), forced)


@pytest.fixture
def _torch_has_all(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    choice._missing.cache_clear()
    yield
    choice._missing.cache_clear()


@pytest.mark.usefixtures("_torch_has_all")
def test_choice_by_card() -> None:
    chosen = {capability: on_card(capability, "gradient") for capability in CAPABILITIES}
    assert chosen == {
        (7, 5): "eager", (8, 0): "flash", (8, 6): "flash", (8, 9): "flash", (9, 0): "cudnn", (10, 0): "cudnn",
        (12, 0): "flash",
    }  # fmt: skip
    for need in ("window", "documents", "dropout"):
        assert on_card((9, 0), "gradient", need) == "flash"
    # Before Ampere there is no bfloat16 kernel.
    assert on_card((7, 5), dtype="float16") == on_card((7, 5), dtype="float32") == "efficient"
    assert on_card((8, 6), dtype="float32") == "efficient"
    assert on_card((8, 6), dtype="float64") == "eager"
    assert on_card((8, 6), head_size=512) == "efficient"
    assert on_card((8, 6), head_size=63) == "eager"
    assert on_card((8, 6), "mask") == "eager"
    assert on_card((7, 5), "window", dtype="float16") == "eager"


@pytest.mark.usefixtures("_torch_has_all")
@pytest.mark.parametrize(
    ("module", "name", "found", "reason"),
    [
        (torch.backends.cudnn, "version", 91500, "it needs cuDNN 9.15.1, this is 91500"),
        (torch.backends.cudnn, "is_available", False, "built without cuDNN"),
    ],
)
def test_cudnn_where_torch_would_not_choose_it(monkeypatch, module, name, found, reason) -> None:
    """Older versions than torch trusts."""
    monkeypatch.setattr(module, name, lambda: found)
    assert on_card((9, 0), "gradient") == on_card((10, 0)) == "flash"
    with pytest.raises(ValueError, match=reason):
        on_card((9, 0), forced="cudnn")


@pytest.mark.usefixtures("_torch_has_all")
@pytest.mark.parametrize(
    ("name", "card", "dtype", "kernel", "instead"),
    [
        ("cudnn", (9, 0), "bfloat16", "cudnn", "flash"),
        ("flash", (8, 6), "bfloat16", "flash", "cudnn"),
        ("mem_efficient", (8, 6), "float32", "efficient", "eager"),
    ],
)
def test_what_a_user_has_switched_off(monkeypatch, name, card, dtype, kernel, instead) -> None:
    """As `F.scaled_dot_product_attention` takes it, at any time: to go around a fault of a kernel."""
    assert on_card(card, "gradient", dtype=dtype) == kernel
    monkeypatch.setattr(torch.backends.cuda, f"{name}_sdp_enabled", lambda: False)
    assert on_card(card, "gradient", dtype=dtype) == instead
    with pytest.raises(ValueError, match=f"torch.backends.cuda.enable_{name}_sdp has switched it off"):
        on_card(card, "gradient", dtype=dtype, forced=kernel)


def test_flash_attention_is_switched_off_on_cpus() -> None:
    q = torch.randn(1, 2, 8, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert choose_kernel(q, q, q) == "eager"
    assert choose_kernel(q, q, q) == "flash_cpu"


@pytest.mark.usefixtures("_torch_has_all")
@pytest.mark.parametrize(("n_query", "chosen"), [(1, "eager"), (2, "cudnn")])
def test_one_query_is_not_cudnn_s(n_query: int, chosen: str) -> None:
    """Forced or not: it has wrong numbers for one on Blackwell."""
    with fake_cuda((10, 0)):
        q = torch.empty(1, 2, n_query, 64, device="cuda", dtype=torch.bfloat16)
        assert choose_kernel(q, q, q) == choose_kernel(q, q, q, forced="cudnn") == chosen


@pytest.mark.usefixtures("_torch_has_all")
@pytest.mark.parametrize("has_kernels", [True, False])
def test_choice_on_amd(monkeypatch: pytest.MonkeyPatch, has_kernels: bool) -> None:
    # To torch such a card is a CUDA device of capability 9.4 with cuDNN, which is MIOpen.
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda parameters: has_kernels)
    probe = torch.empty(1, 1, 8, 64, device="meta")
    monkeypatch.setattr(torch, "empty", lambda *size, **_: probe)
    device = torch.device("cuda")
    assert choice.capability_of(device) == (0, 0)

    def chosen(*needs: str, dtype: str = "bfloat16", forced: str | None = None) -> str:
        return choose(Workload(vendor_kind(device), (0, 0), dtype, 64, needs), forced)

    assert chosen("gradient", "dropout") == ("flash_hip" if has_kernels else "eager")
    assert chosen("gradient", "window") == chosen("documents") == chosen(dtype="float32") == "eager"
    for kernel in ("flash", "cudnn", "efficient"):
        with pytest.raises(ValueError, match="it works on cuda tensors, these are on hip"):
            chosen(forced=kernel)


@pytest.mark.usefixtures("_torch_has_all")
@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (12, 0), (12, 1)])
def test_wide_heads_have_no_flash_backward_on_small_cards(capability: tuple[int, int]) -> None:
    assert on_card(capability, "gradient", head_size=192) == "flash"
    assert on_card(capability, "gradient", head_size=224) == "efficient"
    assert on_card(capability, "gradient", head_size=256) == "flash"
    assert on_card(capability, "gradient", "dropout", head_size=256) == "efficient"
    assert on_card(capability, head_size=224) == "flash"
    assert on_card((8, 0), "gradient", head_size=224) == "flash"


@pytest.mark.usefixtures("_torch_has_all")
def test_forced_choice_says_why_not() -> None:
    assert on_card((8, 0), forced="cudnn") == "cudnn"
    for arguments, reason in (
        ({"dtype": "float32", "forced": "flash"}, "'flash' cannot be used here: it has no float32"),
        ({"forced": "flash_attn"}, "flash-attn is not installed"),
        ({"forced": "flash_attn_4", "head_size": 256}, "its head size must be a multiple of 8 up to 128, this is 256"),
        ({"forced": "flash_cpu"}, "it works on cpu tensors, these are on cuda"),
    ):
        with pytest.raises(ValueError, match=reason):
            on_card((9, 0), **arguments)
    with pytest.raises(ValueError, match=r"it needs compute capability 8\.0 for bfloat16"):
        on_card((7, 5), forced="efficient")


@pytest.mark.usefixtures("_torch_has_all")
def test_flash_attn_4_alone_is_not_flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    (tmp_path / "flash_attn" / "cute" / "interface.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    _forget_flash_attn()
    try:
        assert KERNELS["flash_attn"].missing() is not None
        assert KERNELS["flash_attn_4"].missing() is None
        assert on_card((8, 0)) == "flash"
    finally:
        _forget_flash_attn()


def _forget_flash_attn() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


def test_one_call_computes_windows_and_documents_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel can; what has neither, or no offsets, needs no such call."""
    q, k, v = (torch.randn(1, heads, T, 8) for heads in (4, 2, 2))
    softmax, start_BT = Softmax(torch.zeros(4), 0.4), torch.arange(T)[None] // 4 * 4
    offsets, overflow = document_offsets(start_BT == torch.arange(T), largest_extent(1, T))
    packed = Documents(start_BT, offsets=offsets, longest=T, overflow=overflow)
    expected = causal_attention(q, k, v, softmax, 3), causal_attention(q, k, v, softmax)
    result: torch.Tensor | None = torch.empty(0)
    monkeypatch.setattr(sys.modules[causal_attention.__module__], "fused_sink_attention", lambda *_: result)
    assert torch.equal(causal_attention(q, k, v, softmax, 3), expected[0]), "not on a CPU"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(sys.modules[flash_attention.__module__], "_has_epilogue", lambda *_: False)
    assert causal_attention(q, k, v, softmax, 3) is result
    assert causal_attention(q, k, v, softmax, documents=packed) is result
    assert causal_attention(q, k, v, softmax, T - 1, packed) is result
    for window, documents in ((None, None), (T, None), (None, Documents(torch.zeros_like(start_BT)))):
        torch.testing.assert_close(causal_attention(q, k, v, softmax, window, documents), expected[1])
    result = None
    assert torch.equal(causal_attention(q, k, v, softmax, 3), expected[0])


@pytest.mark.parametrize(
    ("backend", "window", "fuses"),
    [(None, 3, True), ("flash", 3, True), ("flash", None, True), ("cudnn", 3, False), ("cudnn", None, True)],
)
def test_a_forced_kernel_without_windows_fuses_none(backend: str | None, window: int | None, fuses: bool) -> None:
    choice._missing.cache_clear()
    with fake_cuda((9, 0)):
        q, k, v = (torch.empty(2, heads, T, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        out = fused_sink_attention(q, k, v, Softmax(None, 0.4, backend=backend), window, None)
    assert (out is not None) == fuses
    choice._missing.cache_clear()


def test_choice_for_tensors_of_a_card() -> None:
    choice._missing.cache_clear()
    with fake_cuda((8, 6)):
        q, k, v = (torch.empty(2, heads, T, 224, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        assert choose_kernel(q, k, v) == "flash"
        assert choose_kernel(q.requires_grad_(), k, v) == "efficient"
        with torch.no_grad():
            assert choose_kernel(q, k, v) == "flash"
        assert choose_kernel(q, k.float(), v) == "eager"
    choice._missing.cache_clear()


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    choice._announce.cache_clear()
    inputs = [x.detach() for x in make_inputs()]
    with caplog.at_level("INFO", logger="litgpt_moe_ext.attention.kernels.choice"):
        for _ in range(3):
            sink_attention(*inputs, scale=0.4)
        sink_attention(*inputs, scale=0.4, backend="eager")
    assert caplog.messages == [
        "attention: flash_cpu for torch.float64 on cpu (chosen)",
        "attention: eager for torch.float64 on cpu (forced)",
    ]
    with pytest.raises(ValueError, match="attention_backend: 'flash' cannot be used here: it works on cuda tensors"):
        sink_attention(*inputs, scale=0.4, backend="flash")


def test_offsets_reach_the_kernel(gpu_operators: None) -> None:
    idx = torch.zeros(2, T, dtype=torch.long)
    q, k, v, s = make_inputs()
    first = find_documents(idx, "eos", 1).start_BT == torch.arange(T)
    offsets, overflow = document_offsets(first, largest_extent(2, T))
    assert overflow == 0
    out = flash_attention(Call("flash", 0.4, True, None, 0.0), s, Inputs(q, k, v, None, offsets))
    torch.testing.assert_close(out, sink_attention(q, k, v, s, scale=0.4, backend="eager"))
