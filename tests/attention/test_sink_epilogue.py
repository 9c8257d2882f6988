"""The Triton kernels for sinks without a card: compiled for cards that are not there, and counted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe_ext.attention import flash
from litgpt_moe_ext.attention.kernels.calls import Call, Inputs
from litgpt_moe_ext.kernels import launch

pytest.importorskip("triton")

from litgpt_moe_ext.attention.kernels import sink_epilogue
from tests.moe.kernels.test_triton_compiles import AMD_CHIPS, CAPABILITIES, Compiler, compiler_for_amd
from tests.moe.test_launches import Launches

FLASH = Call("flash_cpu", 0.4, True, None, 0.0)


def tensors(d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return gradient, output, log-sum-exp and sinks as a kernel lays them out."""
    dout, out = (torch.empty(2, 48, 4, d, dtype=dtype).transpose(1, 2) for _ in range(2))
    return dout, out, torch.empty(2, 4, 48), torch.empty(4)


def compile_both(compiler: Compiler, monkeypatch: pytest.MonkeyPatch, d: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(sink_epilogue, "launch", compiler.launch)
    dout, out, lse, sinks = tensors(d, dtype)
    sink_epilogue.add_sinks(out, lse, sinks)
    sink_epilogue.sink_gradients(dout, out, lse, sinks)


def test_they_compile_for_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = Compiler(monkeypatch, (9, 0))
    compile_both(compiler, monkeypatch, 64, torch.bfloat16)
    assert compiler.check(tmp_path) == 2
    # Sixteen bytes in one instruction, both ways.
    scale, gradients = (kernel.asm["ptx"] for _, kernel in compiler.kernels)
    assert "ld.global.v4.b32" in scale
    assert "st.global.v4.b32" in scale
    assert "ld.global.v4.b32" in gradients


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_they_compile_for_every_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int]
) -> None:
    compiler = Compiler(monkeypatch, capability)
    for d, dtype in ((64, torch.float16), (72, torch.bfloat16), (256, torch.bfloat16), (72, torch.float32)):
        compile_both(compiler, monkeypatch, d, dtype)
    assert compiler.check(tmp_path) == 8


@pytest.mark.slow
@pytest.mark.parametrize("chip", AMD_CHIPS)
def test_they_compile_for_amd(monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    compiler = compiler_for_amd(monkeypatch, chip)
    compile_both(compiler, monkeypatch, 64, torch.bfloat16)
    assert compiler.check_shared_memory() == 2


def test_launches_beside_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward; one and the sum of its blocks backward."""
    inputs = [torch.randn(shape).requires_grad_() for shape in ((1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), (4,))]
    q, k, v, sinks = inputs
    with Launches() as launches:
        monkeypatch.setattr(flash, "_has_epilogue", lambda out, lse: True)
        monkeypatch.setattr(sink_epilogue, "launch", lambda kernel, *_, **__: launches.names.append(kernel.fn.__name__))
        out = flash.flash_attention(FLASH, sinks, Inputs(q, k, v))
        assert [name for name in launches.names if "flash" not in name] == ["_add_sinks"]
        launches.names.clear()
        torch.autograd.grad(out, inputs, torch.ones(1, 4, 5, 8))
    assert [name for name in launches.names if "flash" not in name] == ["ones", "_sum_gradients", "sum"]


def test_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that has Triton, unless something wants to see operators or the tensors are not what kernels return."""
    _, out, lse, _ = tensors(64, torch.bfloat16)
    assert not flash._has_epilogue(out, lse)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(launch, "triton_works_on", lambda device: True)
    assert flash._has_epilogue(out, lse)
    assert not flash._has_epilogue(out.mT, lse)
    assert not flash._has_epilogue(torch.nn.Parameter(out), lse)
    assert not flash._has_epilogue(out, lse.double())
    with FlopCounterMode(display=False):
        assert not flash._has_epilogue(out, lse)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not flash._has_epilogue(out, lse)
    monkeypatch.setattr(launch, "triton_works_on", lambda device: False)
    assert not flash._has_epilogue(out, lse)
