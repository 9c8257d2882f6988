"""Both of torch's settings for float32 products, of which one cannot be read after the other was written."""

import pytest
import torch

from litgpt_moe_ext.kernels.precision import float32_precision
from litgpt_moe_ext.moe.layer import MoE
from tests.models import moe_config, randomize


@pytest.mark.parametrize(("setting", "gpu", "cpu"), [("highest", "ieee", "ieee"), ("high", "tf32", "tf32"),
                                                     ("medium", "tf32", "bf16")])  # fmt: skip
def test_the_older_setting(setting, gpu, cpu):
    torch.set_float32_matmul_precision(setting)
    assert (float32_precision("cuda"), float32_precision("cpu")) == (gpu, cpu)


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_the_newer_setting(setting):
    torch.backends.cuda.matmul.fp32_precision = setting
    assert float32_precision("cuda") == setting
    assert float32_precision("cpu") == "ieee"


@pytest.mark.parametrize("n_token", [1, 20])
def test_experts_work_after_the_newer_setting(n_token):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    moe = randomize(MoE(moe_config(mlp_class_name="MoE"))).eval()
    assert moe(torch.randn(1, n_token, 16)).isfinite().all()
