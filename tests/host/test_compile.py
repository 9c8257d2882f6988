"""When models are compiled, on this machine and on others that are only described."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch

from litgpt_moe_ext.host.compile import compile_where_it_works
from litgpt_moe_ext.training import compilation
from litgpt_moe_ext.training.compilation import CompileDecision, compile_scope, decide, obstacle
from tests.models import dense_config, initialized_model, moe_config
from tests.runs import run_command

# Device type, system, whether it has Triton and a C++ compiler, and the capability of its GPU.
LINUX_GPU = ("cuda", "Linux", True, True, (9, 0))
LINUX_CPU = ("cpu", "Linux", True, True, None)
BARE_CPU = ("cpu", "Linux", False, False, None)
WINDOWS_GPU = ("cuda", "Windows", False, True, (8, 9))
WINDOWS_CPU = ("cpu", "Windows", False, False, None)
OLD_GPU = ("cuda", "Linux", True, True, (6, 1))

DENSE = dense_config()


def pretend(monkeypatch, machine) -> str:
    """Make this machine look like another; return the device type of models there."""
    device_type, system, has_triton, has_compiler, capability = machine
    monkeypatch.setattr(compilation.platform, "system", lambda: system)
    monkeypatch.setattr(compilation, "find_spec", lambda name: object() if has_triton else None)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name if has_compiler else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    return device_type


@pytest.mark.parametrize(
    ("requested", "config", "machine", "enabled", "reason"),
    [
        ("auto", DENSE, LINUX_GPU, True, "dense model on a GPU"),
        ("auto", moe_config(), LINUX_GPU, False, "gained an MoE model nothing"),
        ("auto", moe_config(mlp_class_name="LLaMAMoE"), LINUX_GPU, False, "loop over experts"),
        ("auto", DENSE, LINUX_CPU, False, "gains little on cpu"),
        ("auto", DENSE, WINDOWS_GPU, False, r"Triton is not installed \(pip install triton-windows\)"),
        ("auto", DENSE, WINDOWS_CPU, False, "MSVC's cl.exe was not found"),
        ("auto", DENSE, OLD_GPU, False, "needs compute capability 7.0, this GPU has 6.1"),
        (True, DENSE, LINUX_CPU, True, "as asked"),
        (True, moe_config(), LINUX_GPU, True, "as asked"),
        (True, DENSE, WINDOWS_CPU, False, "cl.exe was not found"),
        (True, DENSE, BARE_CPU, False, r"a C\+\+ compiler was not found"),
        (False, DENSE, LINUX_GPU, False, "as asked"),
    ],
)
def test_decisions(monkeypatch, requested, config, machine, enabled, reason):
    decision = decide(requested, config, pretend(monkeypatch, machine))
    assert decision.enabled is enabled
    assert re.search(reason, decision.reason)
    assert str(decision).startswith(f"torch.compile: {'on' if enabled else 'off'} (")


@pytest.mark.parametrize(("system", "compiler"), [("Windows", "cl"), ("Linux", "g++")])
def test_the_compiler_of_the_system_is_looked_for(monkeypatch, system, compiler):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compilation.platform, "system", lambda: system)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: name if name == compiler else None)
    assert obstacle("cpu") is None
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    assert obstacle("cpu") is not None


def test_switched_off_nothing_is_compiled():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    with compile_scope(CompileDecision(False, "test")):
        assert compiled(torch.zeros(1)).item() == 1
    assert not calls
    with compile_scope(CompileDecision(True, "test")):
        assert compiled(torch.zeros(1)).item() == 1
    assert calls


def test_the_loop_over_experts_is_not_compiled_anew_for_other_counts():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    layer = initialized_model(moe_config(expert_backend="loop")).transformer.h[-1].mlp
    compiled, numbers = torch.compile(layer, backend=backend), []
    with compile_scope(CompileDecision(True, "test")):
        for seed in range(4):
            x_BTD = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(compiled(x_BTD), layer(x_BTD))
            numbers.append(len(graphs))
    assert numbers[0] == numbers[-1], numbers


def test_a_failing_compiler_costs_a_warning_not_the_run():
    def backend(graph, inputs):
        raise RuntimeError("no such instruction")

    compiled = torch.compile(lambda x: x * 2, backend=backend)
    with compile_scope(CompileDecision(True, "test")):
        assert compiled(torch.ones(1)).item() == 2


def test_a_compiler_that_is_loaded_in_the_second_of_two_runs_compiles_after_it(monkeypatch):
    waiting = []
    monkeypatch.setattr(compilation, "when_imported", lambda _name, callback: waiting.append(callback))
    with compile_scope(CompileDecision(False, "test")):
        pass
    with compile_scope(CompileDecision(False, "test")):
        for callback in waiting:
            callback(torch._dynamo)
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    assert torch._dynamo.eval_frame._stance.stance == "default"


class Pretrain(SimpleNamespace):
    """Stands for the module `litgpt.pretrain`."""


@pytest.mark.parametrize(
    ("config", "machine", "message"),
    [
        (DENSE, LINUX_CPU, None),
        (DENSE, WINDOWS_CPU, "torch.compile: off (MSVC's cl.exe was not found on the path)"),
        (moe_config(), LINUX_CPU, "torch.compile: off (it gains little on cpu; --compile true tries it)"),
    ],
    ids=["LitGPT's own choice where it can work", "no compiler", "the plugin's model"],
)
def test_plain_litgpt_pretrain(monkeypatch, config, machine, message):
    pretend(monkeypatch, machine)
    said, stances = [], []

    def main(fabric, config):
        stances.append(torch._dynamo.eval_frame._stance.stance)

    pretrain = Pretrain(main=main)
    compile_where_it_works(pretrain)
    pretrain.main(SimpleNamespace(device=torch.device("cpu"), print=lambda text: said.append(str(text))), config)
    assert said == ([] if message is None else [message])
    assert stances == ["default" if message is None else "force_eager"]


def test_no_posix_only_import():
    """Windows has none of these modules; nothing of ours may need them to be imported."""
    code = (
        "import sys\n"
        "import pathlib\n"
        # psutil, which knows every system, needs `resource` on this one.
        "for name in ('fcntl', 'grp', 'pwd', 'termios'): sys.modules[name] = None\n"
        "for file in sorted(pathlib.Path('litgpt_moe_ext').rglob('*.py')):\n"
        "    text = file.read_text(encoding='utf-8')\n"
        "    guarded = 'win32' in text\n"
        "    for name in ('fcntl', 'grp', 'pwd', 'termios', *(() if guarded else ('resource',))):\n"
        "        assert f'import {name}' not in text and f'from {name}' not in text, (file, name)\n"
        "import litgpt_moe_ext.cli.train, litgpt_moe_ext.host.config, litgpt_moe_ext.data.pipeline.store.finished\n"
    )
    run_command(sys.executable, "-c", code)
