"""Tensors without memory against torch's fake tensors, and counted operations against torch's counter."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from litgpt import GPT
from torch._subclasses.fake_tensor import FakeTensorMode

from litgpt_moe_ext.inspect.cost import memory
from litgpt_moe_ext.inspect.cost.layers import shorten
from litgpt_moe_ext.inspect.cost.memory import Step, inference_memory, training_memory
from litgpt_moe_ext.model_size import count_flops
from litgpt_moe_ext.training.callbacks.activation_checkpointing import recomputed_in_backward
from tests.inspect.live_memory import LiveMemory
from tests.models import HAS_FUSED_LOSS, moe_config
from tests.runs import run_command
from tests.subsets import soon

LENGTH = 32
MODELS = {
    "sinks": {"attention_class_name": "SinkAttention", "n_shared_expert": 1},
    "layer_norm": {"norm_class_name": "LayerNorm", "bias": True},
    "noisy": {"mlp_class_name": "NoisyTopKMoE", "mlp_activation": "relu", "router_z_loss_coef": 0.1},
    "windows": {"sliding_window_size": 8, "sliding_window_indices": [1, 0]},
    "scaled": {"scale_embeddings": True, "router_type": "hash"},
    "llama_moe": {"mlp_class_name": "LLaMAMoE"},
}
STEPS = (
    Step("32-true", 2, LENGTH, activation_checkpointing="full"),
    Step("bf16-mixed", 2, LENGTH),
    Step("bf16-mixed", 2, LENGTH, activation_checkpointing="selective", fused_cross_entropy=HAS_FUSED_LOSS),
    Step("bf16-true", 2, LENGTH, activation_checkpointing="selective"),
)


@contextlib.contextmanager
def fake():
    with FakeTensorMode(), LiveMemory() as live:
        yield live


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["in turns", "all"])
@pytest.mark.parametrize("name", soon(MODELS, ("sinks", "noisy", "windows")))
def test_fake_tensors_and_torchs_checkpoints_take_the_same(name, every, monkeypatch):
    """To the byte, in training and in reading a prompt. Models take turns with the steps and the types."""
    short = shorten(moe_config(padded_vocab_size=512, **MODELS[name]))
    first = list(MODELS).index(name) % every

    def measure() -> list:
        return [
            *(training_memory(short, step) for step in STEPS[first::every]),
            *(inference_memory(short, dtype) for dtype in (torch.float32, torch.bfloat16)[first::every]),
        ]

    ours = measure()
    monkeypatch.setattr(memory, "weightless", fake)
    monkeypatch.setattr(memory, "recomputed", recomputed_in_backward)
    assert ours == measure()


def test_a_process_that_has_padded_rows_describes_models_alike(monkeypatch):
    short = shorten(moe_config(padded_vocab_size=512))
    expected = training_memory(short, STEPS[1])
    monkeypatch.setattr("litgpt_moe_ext.tokens.padding._accepted", True)
    assert training_memory(short, STEPS[1]) == expected


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_operations_are_those_of_torchs_counter(settings):
    config = moe_config(**settings)
    with torch.device("meta"):
        model, ids = GPT(config), torch.zeros(1, LENGTH, dtype=torch.int64)
    expected = measure_flops(model, lambda: model(ids), lambda logits: logits.sum())
    assert count_flops(config, LENGTH, training=True) == expected


# What was marked for the time of the description is as before.
COMPILE = """
import torch
assert torch.compile(torch.sin, backend='eager')(torch.zeros(2)).tolist() == [0, 0]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "then"),
    [
        (["model-card"], COMPILE),
        (["doctor"], ""),
        (["schedule", "--out=schedule.png"], ""),
        (["twin", "twin.yaml"], ""),
    ],
    ids=["model-card", "doctor", "schedule", "twin"],
)
def test_commands_that_describe_load_nothing_needless(arguments, then, tmp_path):
    command, *others = arguments
    recipe = str(Path("configs/quickstart.yaml").resolve())
    code = (
        "import sys\n"
        "from litgpt_moe_ext.cli.main import main\n"
        f"sys.argv[1:] = {[command, recipe, *others]!r}\n"
        "assert main() == 0\n"
        "needless = {'torch._dynamo', 'torch._refs', 'sympy', 'lightning', 'litgpt.utils', 'transformers'}\n"
        "loaded = needless & set(sys.modules)\n"
        "assert not loaded, loaded\n" + then
    )
    run_command(sys.executable, "-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_all_kinds_of_models_do_without_the_kernels_in_python():
    code = (
        "import sys\n"
        "from litgpt_moe_ext.meta import registrations\n"
        "registrations.postpone()\n"
        "from tests.inspect.test_model_card import DEEP, costs\n"
        "from tests.inspect.test_weightless import MODELS, STEPS\n"
        "from tests.models import moe_config\n"
        "for settings in (*MODELS.values(), *DEEP.values()):\n"
        "    costs(moe_config(padded_vocab_size=512, **settings), STEPS)\n"
        "    assert 'torch._refs' not in sys.modules, settings\n"
    )
    run_command(sys.executable, "-c", code)
