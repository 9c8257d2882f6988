"""The Triton kernel for the rotary embedding without a card: compiled, counted, and where it is used."""

from pathlib import Path

import pytest
import torch
from lightning import Fabric
from litgpt import GPT
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe_ext.attention import layer as layers
from litgpt_moe_ext.attention import rotation as plain
from litgpt_moe_ext.attention.rope import build_rope_cache
from litgpt_moe_ext.kernels import launch
from tests.fake_cuda import fake_cuda
from tests.models import attention_config

pytest.importorskip("triton")

from litgpt_moe_ext.attention.kernels import rotation
from tests.moe.kernels.test_triton_compiles import AMD_CHIPS, CAPABILITIES, Compiler, compiler_for_amd
from tests.moe.test_launches import Launches


def heads(d: int, dtype: torch.dtype = torch.bfloat16, H: int = 4, G: int = 2) -> tuple[Tensor, Tensor]:
    """Return queries and keys as views of a projection."""
    qkv = torch.empty(2, 48, (H + 2 * G) * d, dtype=dtype)
    q, k, _ = qkv.split((H * d, G * d, G * d), dim=-1)
    return q.unflatten(-1, (-1, d)).transpose(1, 2), k.unflatten(-1, (-1, d)).transpose(1, 2)


def compile_both(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, q_and_k: tuple[Tensor, Tensor], n_elem: int, interleave: bool
) -> None:
    monkeypatch.setattr(rotation, "launch", compiler.launch)
    tables = torch.empty(1, 48, n_elem), torch.empty(1, 48, n_elem)
    targets = plain._empty(q_and_k[0]), plain._empty(q_and_k[1])
    rotation.rotate(q_and_k, targets, tables, interleave)
    gradients, memory = (*targets, targets[1]), (*q_and_k, q_and_k[1])
    rotation.rotate(gradients, memory, tables, interleave, backward=True)


def test_it_compiles_for_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = Compiler(monkeypatch, (9, 0))
    compile_both(compiler, monkeypatch, heads(64), 64, interleave=False)
    assert compiler.check(tmp_path) == 2
    for _, kernel in compiler.kernels:
        # Sixteen bytes in one instruction, and nothing passed on between threads.
        assert "ld.global.v4.b32" in kernel.asm["ptx"]
        assert "st.global.v4.b32" in kernel.asm["ptx"]
        assert kernel.metadata.shared == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_it_compiles_for_every_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int]
) -> None:
    compiler = Compiler(monkeypatch, capability)
    dtype = torch.float16 if capability == (7, 5) else torch.bfloat16
    compile_both(compiler, monkeypatch, heads(64, dtype), 64, interleave=False)
    compile_both(compiler, monkeypatch, heads(96, dtype, 6, 1), 24, interleave=False)
    if capability in ((7, 5), (9, 0)):
        compile_both(compiler, monkeypatch, heads(128, torch.float32), 64, interleave=True)
        compile_both(compiler, monkeypatch, heads(24, dtype), 2, interleave=False)
    assert compiler.check(tmp_path) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("chip", AMD_CHIPS)
def test_it_compiles_for_amd(monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    compiler = compiler_for_amd(monkeypatch, chip)
    compile_both(compiler, monkeypatch, heads(64), 64, interleave=False)
    compile_both(compiler, monkeypatch, heads(64), 64, interleave=True)
    assert compiler.check_shared_memory() == 4


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that has Triton, unless something wants to see operators or gradients of the tables."""
    q, k = heads(64)
    cos, sin = torch.empty(1, 48, 64), torch.empty(1, 48, 64)

    def used(cos: Tensor = cos, sin: Tensor = sin, n_elem: int = 64, q: Tensor = q, k: Tensor = k) -> bool:
        return plain._has_kernel((q, k), 48, plain.Rotary((cos, sin), n_elem, False))

    assert not used()
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(launch, "triton_works_on", lambda device: True)
    assert used()
    assert used(cos.expand(2, 48, 64), sin.expand(2, 48, 64))
    assert used(cos[..., :2], sin[..., :2], 2)
    assert not used(cos[..., :3], sin[..., :3], 3)
    assert not used(cos[..., :2], sin[..., :2], 1)
    assert not used(cos[..., :1], sin[..., :1], 0)
    assert not used(n_elem=32)
    assert not used(cos[:, :40], sin[:, :40])
    assert not used(sin=sin.mT.contiguous().mT)
    assert not used(cos.double(), sin.double())
    assert not used(sin=sin.half())
    assert not used(cos.to("meta"), sin.to("meta"))
    assert not used(cos.clone().requires_grad_())
    assert not used(sin=sin.clone().requires_grad_())
    assert not used(q=q.double(), k=k.double())
    assert not used(k=k.float())
    assert not used(k=torch.nn.Parameter(k))
    with FlopCounterMode(display=False):
        assert not used()
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not used()
    monkeypatch.setattr(launch, "triton_works_on", lambda device: False)
    assert not used()


def use_kernel(monkeypatch: pytest.MonkeyPatch, launches: Launches) -> None:
    monkeypatch.setattr(plain, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(rotation, "launch", lambda kernel, *_, **__: launches.names.append(kernel.fn.__name__))


def test_launches_of_a_layer_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts of the input and of two weights, two projections, attention, and one for the rotation."""
    with fake_cuda():
        with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True), torch.device("cuda"):
            model = GPT(attention_config(head_size=64, bias=False, attention_sinks=False, attention_backend="flash"))
            x = torch.empty(2, 32, 24, requires_grad=True)
        layer, tables = model.transformer.h[0].attn, (model.cos[:32][None], model.sin[:32][None])

        def names() -> list[str]:
            launches.names.clear()
            with torch.autocast("cuda", torch.bfloat16), launches:
                layer(x, *tables)
            return launches.names[:]

        launches = Launches()
        before = names()
        use_kernel(monkeypatch, launches)
        cast, attention = "_to_copy", "_scaled_dot_product_flash_attention"
        assert names() == [cast, cast, "mm", "_rotate", attention, cast, "mm"]
        assert len(before) == 6 + 12


def test_launches_of_a_rotation_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One each way, into the gradient of the projection. Beside norms another puts that together, without copies."""
    qkv = torch.empty(2, 48, 8 * 16, requires_grad=True)
    rotary = plain.Rotary((torch.empty(1, 48, 16), torch.empty(1, 48, 16)), 16, False)
    gradients = [torch.empty(2, 48, n, 16).transpose(1, 2) for n in (4, 2, 2)]
    launches = Launches()
    use_kernel(monkeypatch, launches)
    with launches:
        torch.autograd.grad(plain.rotate_projection(qkv, (4, 2), rotary), qkv, gradients)
        assert launches.names == ["_rotate", "_rotate"]
        launches.names.clear()
        q, k, v = (x.unflatten(-1, (-1, 16)).transpose(1, 2) for x in qkv.split((64, 32, 32), dim=-1))
        torch.autograd.grad((*plain.rotate_both(q, k, rotary), v), qkv, gradients)
        assert launches.names == ["_rotate", "_rotate", "cat"]


@pytest.mark.parametrize(
    ("changes", "whole"), [({}, True), ({"clip_qkv": 1.0}, False), ({"norm_qk": True}, False)], ids=str
)
def test_what_is_clipped_or_normed_does_not_rotate_with_its_projection(
    monkeypatch: pytest.MonkeyPatch, changes: dict, whole: bool
) -> None:
    projections: list[tuple] = []
    monkeypatch.setattr(layers, "rotate_projection", lambda *given: projections.append(given))
    layer = layers.SinkAttention(attention_config(**changes), 0)
    cos, sin = build_rope_cache(layer.config, 5)
    layer(torch.randn(1, 5, 24), cos[None], sin[None])
    assert bool(projections) == whole
