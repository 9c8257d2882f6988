"""A module of LitGPT that is executed again, as by `importlib.reload` in a notebook, is extended again."""

import pytest

from tests.host.test_guest_rule import run

CODE = """
import importlib, sys, torch
import litgpt.pretrain
from litgpt import Config
from tests.models import moe_config

config = moe_config(first_k_dense_replace=1, intermediate_size=16)

def logits():
    torch.manual_seed(0)
    model = sys.modules["litgpt.model"].GPT(config)
    assert [type(block.mlp).__name__ for block in model.transformer.h] == ["FeedForward", "SharedExpertMoE"]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model(torch.arange(8)[None])

def again(name):
    return importlib.reload(sys.modules[name])

before = logits()
for name in ("litgpt.model", "litgpt.config", "litgpt.utils", "litgpt.pretrain"):
    module = again(name)
    torch.testing.assert_close(logits(), before, rtol=0, atol=0)
assert hasattr(sys.modules["litgpt.config"].Config, "attention_class_name")
del sys.modules["litgpt.model"]
importlib.import_module("litgpt.model")
torch.testing.assert_close(logits(), before, rtol=0, atol=0)

with_sinks = moe_config(attention_class_name="SinkAttention")
litgpt.model.GPT(with_sinks)
again("litgpt.model")
try:
    litgpt.model.GPT(with_sinks)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_module_that_is_executed_again_is_extended_again():
    ended = run(["-c", CODE])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("litgpt.model was executed again, as by importlib.reload")
