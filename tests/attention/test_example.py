"""The example of a kernel from outside of the package runs as its docstring says."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from litgpt_moe_ext.attention.kernels.kernel import AttentionKernel
from litgpt_moe_ext.attention.kernels.registry import KERNELS, register_kernel
from litgpt_moe_ext.attention.sinks import Softmax, sink_attention

EXAMPLE = Path(__file__).parents[2] / "examples" / "add_an_attention_kernel.py"


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    """What is registered here is not for the tests after these."""
    before = dict(KERNELS)
    yield
    KERNELS.clear()
    KERNELS.update(before)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "all gradients are equal" in printed
    assert "kernel blockwise" in printed


def test_registering() -> None:
    kernel = AttentionKernel(name="mine", summary="", functions="nowhere", dtypes={})
    register_kernel(kernel, before="cudnn")
    names = list(KERNELS)
    assert names.index("mine") == names.index("cudnn") - 1
    assert names[-1] == "eager"
    register_kernel(kernel)
    assert list(KERNELS) == names, "the same again is no conflict"
    with pytest.raises(ValueError, match="'mine': a kernel of this name is registered"):
        register_kernel(AttentionKernel(name="mine", summary="", functions="elsewhere", dtypes={}))
    with pytest.raises(ValueError, match="before: 'nothing' must be one of flash_cpu, "):
        register_kernel(AttentionKernel(name="other", summary="", functions="nowhere", dtypes={}), before="nothing")


def test_a_query_that_sees_nothing_has_gradients_of_zero() -> None:
    runpy.run_path(str(EXAMPLE))["register"]()
    query, key, value = (torch.randn(1, heads, 20, 4, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[17] = False
    output = sink_attention(query, key, value, Softmax(None, 0.5, backend="blockwise"), mask=mask)
    output.square().sum().backward()
    assert not output[:, :, 17].any()
    assert not query.grad[:, :, 17].any()
    assert all(x.grad.isfinite().all() for x in (query, key, value))
