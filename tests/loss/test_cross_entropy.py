"""The Triton kernels for the loss without a card: compiled, counted, and where they are used."""

from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt.utils import chunked_cross_entropy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from litgpt_moe_ext.kernels import launch
from litgpt_moe_ext.loss import cross_entropy

pytest.importorskip("triton")

from litgpt_moe_ext.loss import cross_entropy_kernels as kernels
from tests.moe.kernels.test_triton_compiles import AMD_CHIPS, CAPABILITIES, Compiler, compiler_for_amd
from tests.moe.test_launches import Launches


def compile_all(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, width: int, T: int = 48
) -> None:
    """Compile both passes of the loss of logits, and what computes it together with the output head."""
    monkeypatch.setattr(kernels, "launch", compiler.launch)
    logits, targets = torch.empty(T, width, dtype=dtype), torch.zeros(T, dtype=torch.long)
    mean, normalizers, share = kernels.mean_loss(logits, targets)
    kernels.gradients(logits, targets, normalizers, (mean, share), logits)
    if dtype == torch.float32:
        half = torch.empty(T, width, dtype=torch.float16 if compiler.capability == (7, 5) else torch.bfloat16)
        kernels.gradients(logits, targets, normalizers, (share, share), half)


def test_they_compile_for_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = Compiler(monkeypatch, (8, 6))
    compile_all(compiler, monkeypatch, torch.bfloat16, 49152)
    assert compiler.check(tmp_path) == 3
    for (name, kernel), read, written in zip(compiler.kernels, (True, False, True), (False, False, True), strict=True):
        # Sixteen bytes of logits in one instruction.
        ptx = kernel.asm["ptx"]
        assert not read or "ld.global.v4.b32" in ptx, name
        assert not written or "st.global.v4.b32" in ptx, name
    # In the loop over a row no thread waits for others.
    loop = compiler.kernels[0][1].asm["ptx"].partition("ld.global.v4")[2].partition("bra")[0]
    assert "ex2.approx" in loop
    assert "bar.sync" not in loop


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_they_compile_for_every_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: tuple[int, int]
) -> None:
    compiler = Compiler(monkeypatch, capability)
    half = torch.float16 if capability == (7, 5) else torch.bfloat16
    for dtype in (half, torch.float32):
        for width in (49152, 50257, 2048, 65):
            compile_all(compiler, monkeypatch, dtype, width)
    assert compiler.check(tmp_path) == 4 * (3 + 4)


@pytest.mark.slow
@pytest.mark.parametrize("chip", AMD_CHIPS)
def test_they_compile_for_amd(monkeypatch: pytest.MonkeyPatch, chip: str) -> None:
    compiler = compiler_for_amd(monkeypatch, chip)
    compile_all(compiler, monkeypatch, torch.bfloat16, 49152)
    assert compiler.check_shared_memory() == 3


def test_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card that has Triton, unless something wants to see operators."""
    logits, targets = torch.empty(3, 5, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.long)

    def used(logits: Tensor = logits, targets: Tensor = targets) -> bool:
        return cross_entropy.has_kernel(logits, targets)

    assert not used()
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(launch, "triton_works_on", lambda device: True)
    assert used()
    assert used(logits.float())
    assert not used(logits.double())
    assert not used(targets=targets.int())
    assert not used(targets=targets.to("meta"))
    assert not used(targets=torch.nn.Parameter(targets, requires_grad=False))
    with FlopCounterMode(display=False):
        assert not used()
    monkeypatch.setattr(launch, "triton_works_on", lambda device: False)
    assert not used()


def test_launches_of_a_loss_and_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forward and one backward, and nothing of torch beside them."""
    names = []
    monkeypatch.setattr(kernels, "launch", lambda kernel, *_: names.append(kernel.fn.__name__))
    logits, targets = torch.empty(3, 5, requires_grad=True), torch.zeros(3, dtype=torch.long)
    with Launches() as launches:
        loss = cross_entropy.mean_cross_entropy(logits, targets)
        torch.autograd.grad(loss, logits, torch.empty(()))
    assert names == ["_lose", "_add_up", "_differentiate"]
    assert launches.names == []


def test_logits_cannot_be_read_after_their_gradient_has_replaced_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "launch", lambda *_: None)
    logits = torch.randn(3, 5, requires_grad=True) * 2.0
    squares = logits.square()
    cross_entropy.mean_cross_entropy(logits, torch.zeros(3, dtype=torch.long)).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators of torch read and write, of tensors with a row for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("nll_loss"):  # which looks at one number of a row, and writes a row of zeros backward
            args = ()
        if name not in ("view", "detach", "split", "empty", "alias", "_unsafe_view"):
            self.total += sum(x.nbytes for x in tree_leaves((args, result)) if isinstance(x, Tensor) and x.ndim == 2)
        return result


def test_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes for each logit of bfloat16 training in both passes, as `benchmarks/RESULTS.md` has them."""
    T, V = 256, 1000
    logits, targets = torch.randn(T, V, dtype=torch.bfloat16, requires_grad=True), torch.randint(V, (T,))
    with Traffic() as litgpts:
        chunked_cross_entropy(logits.float(), targets).backward()
    assert litgpts.total == 44 * T * V

    ours = 0

    def launched(kernel: Any, grid: tuple[int, ...], arguments: tuple, *_: int) -> None:
        nonlocal ours
        ours += sum(x.nbytes for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.ndim == 2)

    monkeypatch.setattr(kernels, "launch", launched)
    cross_entropy.mean_cross_entropy(logits, targets).backward()
    assert ours == 6 * T * V
