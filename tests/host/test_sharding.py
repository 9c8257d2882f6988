"""LitGPT's finetuning under FSDP loads training checkpoints, and keeps the balancing bias in float32."""

from types import SimpleNamespace

import litgpt.utils
import pytest
import torch
from lightning.fabric.plugins.precision import FSDPPrecision
from lightning.fabric.strategies import FSDPStrategy
from litgpt import GPT

from litgpt_moe_ext.host.sharding import keep_biases_exact
from tests.models import dense_config, moe_config, randomize


def sharding_fabric(precision: str = "32-true") -> SimpleNamespace:
    return SimpleNamespace(strategy=FSDPStrategy(precision=FSDPPrecision(precision)), world_size=2)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("config", [moe_config(), dense_config()], ids=["moe", "dense"])
def test_the_weights_in_a_training_checkpoint_are_found(config, strict, tmp_path):
    """With `strict=False`, as for adapters, LitGPT would leave them out without a word."""
    saved, model = randomize(GPT(config)), GPT(config)
    torch.save({"model": saved.state_dict(), "iter_num": 3}, tmp_path / "lit_model.pth")
    litgpt.utils.load_checkpoint(sharding_fabric(), model, tmp_path / "lit_model.pth", strict=strict)
    torch.testing.assert_close(model.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_adapters_go_on_with_their_own_weights(tmp_path):
    saved, model = randomize(GPT(dense_config())), GPT(dense_config())
    adapter = {"lm_head.weight": torch.full_like(saved.lm_head.weight, 2)}
    torch.save({"model": saved.state_dict()}, tmp_path / "lit_model.pth")
    torch.save(adapter, tmp_path / "adapter.pth")
    files = tmp_path / "adapter.pth", tmp_path / "lit_model.pth"
    litgpt.utils.load_checkpoint_update(sharding_fabric(), files[0], model, files[1], strict=False)
    torch.testing.assert_close(model.state_dict(), saved.state_dict() | adapter, rtol=0, atol=0)


def test_weights_alone_are_left_to_litgpt(tmp_path):
    calls, fabric = [], sharding_fabric()
    fabric.load_raw = lambda *args, **kwargs: calls.append((*args, kwargs))
    model, file = GPT(moe_config()), tmp_path / "lit_model.pth"
    torch.save(model.state_dict(), file)
    litgpt.utils.load_checkpoint(fabric, model, file)
    assert calls == [(file, model, {"strict": True})]


@pytest.mark.parametrize(("make", "buffers"), [(moe_config, None), (dense_config, torch.bfloat16)])
def test_buffers_of_this_packages_models_keep_their_precision(make, buffers):
    loop = SimpleNamespace(main=lambda fabric, config: fabric.strategy.mixed_precision_config)
    keep_biases_exact(loop)
    found = loop.main(sharding_fabric("bf16-mixed"), make())
    assert (found.buffer_dtype, found.param_dtype) == (buffers, torch.bfloat16)
