"""The example of a kernel from outside of the package runs as its docstring says."""

import subprocess
import sys
from pathlib import Path

import pytest

from litgpt_moe_ext.attention.kernels.registry import KERNELS, AttentionKernel, register_kernel

EXAMPLE = Path(__file__).parents[2] / "examples" / "add_an_attention_kernel.py"


def test_the_example_runs() -> None:
    result = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "all gradients are equal" in result.stdout
    assert "kernel blockwise" in result.stdout


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(KERNELS)
    kernel = AttentionKernel(name="mine", summary="", functions="nowhere", dtypes={})
    try:
        register_kernel(kernel, before="cudnn")
        names = list(KERNELS)
        assert names.index("mine") == names.index("cudnn") - 1
        assert names[-1] == "eager"
        with pytest.raises(ValueError, match="'mine': a kernel of this name is registered"):
            register_kernel(kernel)
        with pytest.raises(ValueError, match="before: 'nothing' must be one of flash_cpu, "):
            register_kernel(AttentionKernel(name="other", summary="", functions="nowhere", dtypes={}), before="nothing")
    finally:
        KERNELS.clear()
        KERNELS.update(before)
