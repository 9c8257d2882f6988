"""Real processes and real signals: Ctrl-C, kill -9, plain `litgpt` commands."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.runs import PATIENCE, logged, run_command, train, weights_of
from tests.training.processes import Training
from tests.training.signalling import wait_for_signal

pytestmark = pytest.mark.slow


def finish(process: Training, status: int = 0) -> str:
    output, _ = process.communicate()
    assert process.returncode == status, output
    return output


def wait_for_step(process: Training, step: int) -> str:
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(f"step {step}/"):
            return output
    raise AssertionError(f"ended before step {step}:\n{output}")


@pytest.fixture
def uninterrupted(recipe, tmp_path) -> dict[int, str]:
    whole = recipe("whole", out_dir=str(tmp_path / "whole"), train={"max_tokens": 40 * 128})
    assert train("--config", whole) == 0
    return logged(tmp_path / "whole", "loss")


def test_interrupted_terminated_and_killed_the_losses_stay(recipe, tmp_path, uninterrupted):
    """Ctrl-C after step 5, SIGTERM after step 15, kill -9 after step 25: the losses are those of an undisturbed run."""
    changes = {"train": {"max_tokens": 40 * 128, "save_interval": 8}}
    file = recipe(**changes, callbacks=wait_for_signal(5, 15, 25))
    out_dir = tmp_path / "out"

    process = Training("--config", file)
    wait_for_step(process, 5)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # as `timeout -s INT uv run` does
    output = finish(process, 130)
    assert "SIGINT received: finishing the step, then saving" in output
    assert "--resume auto continues" in output
    saved = sorted(out_dir.glob("step-*"))[-1]
    step = json.loads((saved / "training_state.json").read_text())["step"]
    assert step >= 5

    process = Training("--config", file, "--resume", "auto")
    output = wait_for_step(process, 15)
    assert f"Resuming from {saved}" in output
    process.send_signal(signal.SIGTERM)
    finish(process, 143)

    process = Training("--config", file, "--resume", "auto")
    wait_for_step(process, 25)
    process.send_signal(signal.SIGKILL)
    finish(process, -9)

    finish(Training("--config", recipe(**changes), "--resume", "auto"))
    assert logged(out_dir, "loss") == uninterrupted
    leftovers = [p.name for p in out_dir.iterdir() if p.name.startswith(".")]
    assert leftovers == []


def test_killed_while_saving(recipe, tmp_path):
    """Whatever moment the kill hits, what is found under a checkpoint's name is whole."""
    from litgpt_moe_ext.training.checkpoint.resume import problem_with

    file = recipe(train={"max_tokens": 100_000 * 128, "save_interval": 1}, eval={"interval": 100_000})
    process = Training("--config", file)
    wait_for_step(process, 3)
    time.sleep(0.137)
    process.send_signal(signal.SIGKILL)
    finish(process, -9)
    checkpoints = list((tmp_path / "out").glob("step-*"))
    assert len(checkpoints) >= 2
    assert [problem_with(checkpoint) for checkpoint in checkpoints] == [None] * len(checkpoints)


def test_plain_litgpt_commands(recipe, tmp_path):
    """`litgpt pretrain`, `generate`, `chat` and `convert_pretrained_checkpoint` know the classes by themselves."""
    file = recipe()
    content = file.read_text().replace("devices: 1", "devices: 1\nlogger_name: csv")
    file.write_text(content)
    litgpt = Path(sys.executable).parent / "litgpt"
    run = partial(run_command, litgpt, cwd=tmp_path, PYTHONPATH="")
    output = run("pretrain", "tiny", "--config", file, "--precision", "32-true").stdout
    assert "torch.compile: off (it gains little on cpu" in output
    rate = float(output.rpartition("Tok/sec       : ")[2].split()[0])
    assert rate > 0
    weights = weights_of(tmp_path / "out" / "final")
    assert weights["transformer.h.0.mlp.gate.e_score_correction_bias"].abs().max() > 0.005

    assert train("--config", recipe("ours", out_dir=str(tmp_path / "ours"))) == 0
    final = tmp_path / "ours" / "final"
    arguments = ("--prompt", "def ", "--max_new_tokens", "5", "--temperature", "0")
    assert "def " in run("generate", final, *arguments).stdout
    assert "Now chatting with tiny" in run("chat", final, "--max_new_tokens", "5", stdin="def \n\n").stdout
    run("convert_pretrained_checkpoint", final, tmp_path / "slim")
    slim = torch.load(tmp_path / "slim" / "lit_model.pth", weights_only=True)
    assert all(torch.equal(slim[name], weight) for name, weight in weights_of(final).items())
    switched_off = subprocess.run(
        [litgpt, "generate", final, *arguments],
        env={**os.environ, "PYTHONPATH": "", "LITGPT_MOE_EXT_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert switched_off.returncode != 0
    assert "_requires_litgpt_moe_ext" in switched_off.stderr
