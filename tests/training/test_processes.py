"""Real processes and real signals: Ctrl-C, kill -9, two processes, plain `litgpt` commands."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.conftest import ROOT, RUN_TRAIN, logged

pytestmark = pytest.mark.slow


def start(*arguments: str | Path) -> subprocess.Popen:
    command = [*RUN_TRAIN, *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def wait_for_step(process: subprocess.Popen, step: int) -> str:
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(f"step {step}/"):
            return output
    raise AssertionError(f"ended before step {step}:\n{output}")


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def run(*arguments: str | Path, **options) -> str:
    process = subprocess.run(
        [str(a) for a in arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, **options
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture
def uninterrupted(recipe, tmp_path) -> dict[int, str]:
    run(
        *RUN_TRAIN,
        "--config",
        recipe("whole", out_dir=str(tmp_path / "whole"), train={"max_tokens": 40 * 128}),
        cwd=ROOT,
    )
    return logged(tmp_path / "whole", "loss")


def test_interrupted_terminated_and_killed_the_losses_stay(recipe, tmp_path, uninterrupted):
    """Ctrl-C after step 5, SIGTERM after step 15, kill -9 after step 25: the losses are those of an undisturbed run."""
    file = recipe(train={"max_tokens": 40 * 128, "save_interval": 8})
    out_dir = tmp_path / "out"

    process = start("--config", file)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGINT)
    output = finish(process, 130)
    assert "SIGINT received: finishing the step, then saving" in output
    assert "--resume auto continues" in output
    saved = sorted(out_dir.glob("step-*"))[-1]
    step = json.loads((saved / "training_state.json").read_text())["step"]
    assert step >= 5

    process = start("--config", file, "--resume", "auto")
    output = wait_for_step(process, 15)
    assert f"Resuming from {saved}" in output
    process.send_signal(signal.SIGTERM)
    finish(process, 143)

    process = start("--config", file, "--resume", "auto")
    wait_for_step(process, 25)
    process.kill()
    finish(process, -9)

    finish(start("--config", file, "--resume", "auto"))
    assert logged(out_dir, "loss") == uninterrupted
    leftovers = [p.name for p in out_dir.iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_killed_while_saving(recipe, tmp_path):
    """Whatever moment the kill hits, what is found under a checkpoint's name is whole."""
    from litgpt_moe_ext.training.checkpoints import problem_with

    file = recipe(train={"max_tokens": 400 * 128, "save_interval": 1}, eval={"interval": 1000})
    process = start("--config", file)
    wait_for_step(process, 3)
    time.sleep(0.137)
    process.kill()
    finish(process, -9)
    checkpoints = list((tmp_path / "out").glob("step-*"))
    assert len(checkpoints) >= 2
    assert [problem_with(checkpoint) for checkpoint in checkpoints] == [None] * len(checkpoints)


def test_two_processes_equal_one(recipe, tmp_path):
    """DDP over gloo: two processes of half the micro batch give the losses and the bias of one process."""
    # LitGPT's learning rate follows iterations, so both must have as many of them per step.
    one = recipe("one", out_dir=str(tmp_path / "one"), train={"micro_batch_size": 4, "max_tokens": 8 * 128})
    two = recipe("two", out_dir=str(tmp_path / "two"), train={"micro_batch_size": 2, "max_tokens": 8 * 128}, devices=2)
    run(*RUN_TRAIN, "--config", one, cwd=ROOT)
    run(*RUN_TRAIN, "--config", two, cwd=ROOT)
    models = [
        torch.load(tmp_path / name / "final" / "lit_model.pth", weights_only=True)["model"] for name in ("one", "two")
    ]
    for name, weight in models[0].items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(weight, models[1][name])
        else:
            torch.testing.assert_close(weight, models[1][name], atol=1e-4, rtol=1e-3)


def test_plain_litgpt_commands(recipe, tmp_path):
    """`litgpt pretrain`, `generate`, `chat` and `convert_pretrained_checkpoint` know the classes by themselves."""
    file = recipe()
    content = file.read_text().replace("devices: 1", "devices: 1\nlogger_name: csv")
    file.write_text(content)
    litgpt = Path(sys.executable).parent / "litgpt"
    environment = {**os.environ, "PYTHONPATH": ""}
    output = run(litgpt, "pretrain", "tiny", "--config", file, "--precision", "32-true", cwd=tmp_path, env=environment)
    assert "torch.compile: off (it does not pay on cpu" in output
    rate = float(output.rpartition("Tok/sec       : ")[2].split()[0])
    assert rate > 0
    weights = torch.load(tmp_path / "out" / "final" / "lit_model.pth", weights_only=True)["model"]
    assert weights["transformer.h.0.mlp.gate.e_score_correction_bias"].abs().max() > 0.005

    run(*RUN_TRAIN, "--config", recipe("ours", out_dir=str(tmp_path / "ours")), cwd=ROOT)
    final = tmp_path / "ours" / "final"
    arguments = ("--prompt", "def ", "--max_new_tokens", "5", "--temperature", "0")
    output = run(litgpt, "generate", final, *arguments, cwd=tmp_path, env=environment)
    assert "def " in output
    output = run(litgpt, "chat", final, "--max_new_tokens", "5", cwd=tmp_path, env=environment, input="def \n\n")
    assert "Now chatting with tiny" in output
    run(litgpt, "convert_pretrained_checkpoint", final, tmp_path / "slim", cwd=tmp_path, env=environment)
    slim = torch.load(tmp_path / "slim" / "lit_model.pth", weights_only=True)
    trained = torch.load(final / "lit_model.pth", weights_only=True)["model"]
    assert all(torch.equal(slim[name], weight) for name, weight in trained.items())
    switched_off = subprocess.run(
        [litgpt, "generate", final, *arguments],
        env={**environment, "LITGPT_MOE_EXT_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert switched_off.returncode != 0
    assert "_requires_litgpt_moe_ext" in switched_off.stderr
