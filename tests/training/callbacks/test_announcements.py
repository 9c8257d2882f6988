"""What a run says before its first step: kernels, strategies that do not apply, a torch that is too old."""

import re

import pytest
import torch
from litgpt.model import GPT

from litgpt_moe_ext.attention.kernels import choice
from litgpt_moe_ext.training.callbacks.kernel_report import attention_line, experts_line
from litgpt_moe_ext.training.phases.checks import strategy_note
from litgpt_moe_ext.training.settings import DistributedArgs
from tests.fake_cuda import fake_cuda
from tests.models import attention_config, dense_config, initialized_model, moe_config
from tests.runs import train

CPU = torch.device("cpu")


@pytest.mark.parametrize("compiled", [False, True])
def test_experts(compiled):
    """The compiler is told what it will really be given."""
    model = initialized_model(moe_config(moe_intermediate_size=16))
    backend = "grouped_mm" if compiled else "grouped_cpu"
    assert experts_line(model, CPU, compiled) == f"experts: {backend} for torch.float32 on cpu (chosen)"
    with torch.autocast("cpu", torch.bfloat16):
        assert "for torch.bfloat16" in experts_line(model, CPU, compiled)


def test_forced():
    names = {"expert_backend": "loop", "attention_backend": "eager"}
    model = initialized_model(moe_config(attention_class_name="SinkAttention", **names))
    assert experts_line(model, CPU, compiled=False) == "experts: loop for torch.float32 on cpu (forced)"
    assert attention_line(model, CPU) == "attention: eager for torch.float32 on cpu (forced)"


def test_attention():
    model = initialized_model(moe_config(attention_class_name="SinkAttention"))
    assert attention_line(model, CPU) == "attention: flash_cpu for torch.float32 on cpu (chosen)"
    model = initialized_model(moe_config(attention_class_name="SinkAttention", attention_dropout=0.1))
    line = attention_line(model, CPU)
    assert line.startswith("attention: eager")
    assert "grow with the square" in line
    model = initialized_model(moe_config(attention_class_name="SinkAttention", attention_sinks=False))
    assert attention_line(model, CPU) == "attention: scaled_dot_product_attention for torch.float32 on cpu (chosen)"


WINDOW = {"sliding_window_size": 8}
SDPA = "scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("capability", "settings", "kernel"),
    [
        ((9, 0), {}, "cudnn"),
        ((9, 0), {"attention_sinks": False}, SDPA),
        ((9, 0), {"attention_sinks": False, "attention_backend": "flash"}, "flash"),
        ((9, 0), WINDOW, "flash"),
        ((9, 0), {**WINDOW, "sliding_window_indices": [0, 1]}, "cudnn and flash"),
        ((7, 5), WINDOW, "eager"),
        ((7, 5), {**WINDOW, "attention_sinks": False}, SDPA),
    ],
)
def test_attention_on_a_card(capability, settings, kernel):
    """One kernel for windows where there is one; otherwise each piece has a mask."""
    with torch.device("meta"):
        model = GPT(attention_config(head_size=16, **settings)).half()
    choice._missing.cache_clear()
    with fake_cuda(capability):
        assert attention_line(model, torch.device("cuda")).startswith(f"attention: {kernel} for torch.float16 on cuda")
        with pytest.raises(ValueError, match="'efficient' cannot be used here: it takes no mask tensor"):
            attention_line(GPT(attention_config(**WINDOW, attention_backend="efficient")), torch.device("cuda"))
    choice._missing.cache_clear()


def test_litgpts_own_layers_say_nothing():
    model = initialized_model(dense_config())
    assert experts_line(model, CPU, compiled=False) is None
    assert attention_line(model, CPU) is None


def test_a_run_says_it_once(recipe, capsys):
    strategy = {"strategy": "fsdp2", "distributed": {"cpu_offload": True}}
    file = recipe(train={"max_tokens": 2 * 128}, model_config={"n_expert_per_token": 1}, **strategy)
    assert train("--config", file) == 0
    output = capsys.readouterr().out
    for line in ("experts: grouped_cpu for torch.float32 on cpu", "attention: flash_cpu for torch.float32 on cpu"):
        assert output.count(line) == 1
    of_litgpt = r"^(Epoch|iter|Final|Validating|Saving|Resuming|Time to|Total|Measured|-|\|).*"
    assert re.search(of_litgpt, output, re.MULTILINE) is None, "lines that ours replace"
    note = "strategy: fsdp2 has nothing to shard in a single process: it becomes auto, and distributed.cpu_offload"
    assert output.count(note) == 1
    assert output.count("n_expert_per_token: 1 with norm_topk_prob: true makes every gate value 1") == 1


def test_a_slow_fallback_is_said_once(recipe, capsys, recwarn):
    choice._announce.cache_clear()
    file = recipe(train={"max_tokens": 2 * 128}, model_config={"attention_dropout": 0.1})
    assert train("--config", file) == 0
    assert capsys.readouterr().out.count(choice.FALLBACK_COST) == 1
    assert not [warning for warning in recwarn if choice.FALLBACK_COST in str(warning.message)]


def test_strategy_in_a_single_process():
    assert strategy_note("ddp", 1, DistributedArgs(), "cuda") is None
    assert strategy_note("fsdp_shard_grad_op", 1, DistributedArgs(), "cuda").endswith("it becomes auto")


def test_offloading_without_a_gpu():
    note = strategy_note("fsdp2", 2, DistributedArgs(cpu_offload=True), "cpu")
    assert note.startswith("distributed.cpu_offload: true has no effect without GPUs")


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_shard_grad_op", "fsdp2", "ddp", "deepspeed_stage_3"])
@pytest.mark.parametrize(("torch_version", "leaks"), [("2.11.0+cu130", True), ("2.12.0", False), ("2.15.0", False)])
def test_memory_that_torch_keeps_of_every_step(monkeypatch, strategy, torch_version, leaks):
    monkeypatch.setattr("importlib.metadata.version", lambda name: torch_version)
    note = strategy_note(strategy, 2, DistributedArgs(), "cuda")
    if leaks and "fsdp" in strategy:
        assert note.startswith(f"strategy: {strategy} with torch {torch_version} keeps half a KB")
    else:
        assert note is None


def test_fused_loss_without_its_operator(recipe, monkeypatch, capsys):
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert train("--config", recipe(), "--fused_cross_entropy", "true") == 2
    assert "fused_cross_entropy: true needs a torch that has" in capsys.readouterr().err
