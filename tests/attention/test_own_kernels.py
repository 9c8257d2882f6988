"""Attention kernels of other packages that are none: said where they are registered, or first used."""

import runpy
from types import SimpleNamespace

import pytest
import torch

from litgpt_moe_ext.attention.kernels import registry
from litgpt_moe_ext.attention.kernels.calls import Result
from litgpt_moe_ext.attention.kernels.kernel import AttentionKernel
from litgpt_moe_ext.attention.kernels.registry import KERNELS, register_kernel
from litgpt_moe_ext.attention.sinks import Softmax, sink_attention
from tests.runs import ROOT

Blockwise = runpy.run_path(str(ROOT / "examples" / "add_an_attention_kernel.py"))["Blockwise"]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """What is registered here is not for the tests after these."""
    monkeypatch.setattr(registry, "_loaded", registry._loaded.copy())
    before = dict(KERNELS)
    yield
    KERNELS.clear()
    KERNELS.update(before)


def kernel(**changes) -> AttentionKernel:
    fields = {"name": "mine", "summary": "", "functions": Blockwise, "device": "cpu", "dtypes": {"float32": (0, 0)}}
    return AttentionKernel(**fields | {"abilities": frozenset({"mask", "gradient"})} | changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (AttentionKernel, "'kernel': AttentionKernel must be an instance of AttentionKernel"),
        (kernel(name="my kernel"), "'my kernel' must be a name of letters"),
        (
            kernel(dtypes={torch.float32: (0, 0)}),
            "dtypes has torch.float32; known are bfloat16, float16, float32, float64",
        ),
        (kernel(dtypes={"float32"}), "dtypes must be a mapping to the lowest capability"),
        (kernel(dtypes=None), "dtypes must be a mapping to the lowest capability"),
        (
            kernel(abilities=frozenset({"gradients"})),
            "abilities has 'gradients'; known are documents, dropout, gradient",
        ),
        (kernel(abilities=["gradient"]), "abilities a frozenset"),
        (kernel(abilities=None), "abilities a frozenset"),
        (kernel(functions=None), "functions is None, which has no forward"),
        (kernel(functions=SimpleNamespace(forward=print)), "which has no backward"),
    ],
)
def test_what_is_no_kernel_is_not_registered(given, message):
    before = list(KERNELS)
    with pytest.raises(ValueError, match=message):
        register_kernel(given)
    assert list(KERNELS) == before


def test_a_kernel_without_gradients_needs_no_backward():
    register_kernel(kernel(functions=SimpleNamespace(forward=print), abilities=frozenset()))
    assert "mine" in KERNELS


def attend(changed_result=lambda result: result, changed_gradients=lambda gradients: gradients) -> None:
    """Compute attention with sinks and its gradients, with a kernel that returns something else."""
    functions = SimpleNamespace(
        forward=lambda inputs, call: changed_result(Blockwise.forward(inputs, call)),
        backward=lambda *given: changed_gradients(Blockwise.backward(*given)),
    )
    register_kernel(kernel(functions=functions))
    q, k, v = (torch.randn(1, heads, 20, 4, requires_grad=True) for heads in (4, 2, 2))
    sink_attention(q, k, v, Softmax(torch.zeros(4), 0.5, backend="mine")).sum().backward()
    assert q.grad.shape == q.shape


def test_what_is_a_result_is_taken():
    attend()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda r: tuple(r), "'mine': forward returns a tuple, not a Result"),
        (lambda r: r._replace(lse_BHT=None), "forward returns lse_BHT None, which is no tensor"),
        (lambda r: r._replace(out_BHTd=r.out_BHTd.mT), r"out_BHTd of shape \(1, 4, 4, 20\) .* not \(1, 4, 20, 4\)"),
        (lambda r: r._replace(out_BHTd=r.out_BHTd.half()), r"out_BHTd .* in torch.float16, not .* in torch.float32"),
        (lambda r: r._replace(lse_BHT=r.lse_BHT[..., None]), r"lse_BHT of shape \(1, 4, 20, 1\)"),
        (lambda r: Result(r.out_BHTd, r.lse_BHT.bfloat16()), "lse_BHT .* in torch.bfloat16, not .* in torch.float32"),
    ],
)
def test_what_is_no_result(changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        attend(changed)


@pytest.mark.parametrize("changed", [lambda g: g[:2], lambda g: (g[0], None, g[2]), list])
def test_what_are_no_gradients(changed):
    """One that is missing would train keys by nothing."""
    with pytest.raises(TypeError, match="'mine': backward must return a tuple of dq, dk and dv"):
        attend(changed_gradients=changed)
