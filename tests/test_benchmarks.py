"""The scripts of `benchmarks/` but `gpu.py`, which `tests/gpu` runs: wrong arguments are told before anything runs."""

import subprocess
import sys

import pytest
import torch

from tests.runs import PATIENCE, ROOT, run_command


def refusal(script, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert ended.returncode == 2, ended.stderr
    assert not ended.stdout
    return ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("script", ["startup", "packing"])
def test_another_checkout_without_an_environment(tmp_path, script):
    message = f"argument --before: {tmp_path} has no .venv/bin/python; run `uv sync` there"
    assert refusal(script, "--before", tmp_path).endswith(message)


@pytest.mark.slow
def test_wrong_arguments(tmp_path):
    (tmp_path / "code-moe-60m").mkdir()
    assert "code-moe-60m must not exist yet" in refusal("full_size", "--out-dir", tmp_path)
    assert "must be a folder" in refusal("context_extension", "--out", tmp_path / "nowhere" / "a")
    assert "--rounds: 0 must be at least 1" in refusal("openmp_spin", "--rounds", "0")
    assert "--steps: 20 must be at least 100" in refusal("padding", "--steps", "20")
    dense = str(ROOT / "configs" / "gpt-dense-fineweb.yaml")
    assert f"{dense} has no experts" in refusal("train_step", "--recipes", dense)
    if not torch.cuda.is_available():
        assert "torch finds no card" in refusal("same_bits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "shown"),
    [
        ("train_step", "--parts hooks --steps 8 --pairs 1", "run_train.py over litgpt pretrain"),
        ("padding", "--steps 100 --seeds 1", "left out"),
        ("generation", "--rounds 1 --new-tokens 2 --prompt-length 4", "LLaMAMoE"),
        ("moe_layer", "--only memory --sizes TinyStories", "| TinyStories bf16 |"),
        ("attention", "--rounds 1", "| documents of 1000 |"),
        ("context_extension", "--steps 2 --tuning-steps 1 --seeds 1 --processes 1 --out OUT", "| on | YaRN, tuned |"),
        ("data", "--megabytes 0.5 --seconds 0.1", "| read, ours, length 2048 |"),
    ],
)
def test_it_measures(script, arguments, shown, tmp_path):
    """They reach into the package further than its users do, and nobody else calls them."""
    words = [word.replace("OUT", str(tmp_path / "out")) for word in arguments.split()]
    assert shown in run_command(sys.executable, f"benchmarks/{script}.py", *words).stdout


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py")))
def test_help_measures_nothing(script):
    assert f"usage: {script}.py" in run_command(sys.executable, f"benchmarks/{script}.py", "--help").stdout
