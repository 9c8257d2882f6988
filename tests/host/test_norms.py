"""RMSNorms of this package's models are one kernel on GPUs; on CPUs and in LitGPT's models they are LitGPT's own."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from litgpt.model import GPT, RMSNorm

from tests.models import dense_config, moe_config, randomize


def is_fused(config, dtype=torch.float32, x_dtype=None, on_gpu=True) -> bool:
    """Return whether a norm of the model runs as torch's operator; it always computes what LitGPT's own does."""
    norm = randomize(GPT(config)).to(dtype).transformer.ln_f
    x = torch.randn(2, 3, config.n_embd, dtype=x_dtype or dtype)
    with patch.object(torch.Tensor, "is_cuda", on_gpu), patch.object(F, "rms_norm", wraps=F.rms_norm) as operator:
        out = norm(x)
    expected = RMSNorm.forward.__wrapped__(norm, x)
    torch.testing.assert_close(out, expected)
    assert operator.called or torch.equal(out, expected)
    return operator.called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    settings = {"norm_eps": 0.1}
    assert is_fused(moe_config(**settings), dtype)
    assert is_fused(dense_config(**settings, attention_class_name="SinkAttention"), dtype)
    assert not is_fused(dense_config(**settings), dtype), "a guest's"
    assert not is_fused(moe_config(**settings, name="Gemma"), dtype), "which adds one to its weight"


def test_types_that_the_kernel_would_not_keep():
    config = moe_config()
    assert not is_fused(config, torch.float64)
    assert not is_fused(config, torch.float32, torch.bfloat16)


def test_a_compiler_fuses_better(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_fused(moe_config())


def test_on_a_cpu():
    assert not is_fused(moe_config(), on_gpu=False)
