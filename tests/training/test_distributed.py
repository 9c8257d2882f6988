"""Two and four real processes over gloo: the same training as one, under every strategy that runs on CPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.conftest import ROOT, RUN_TRAIN, logged

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--nnodes=1"]


def run(*command: str | Path, **environment: str) -> str:
    process = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint / "lit_model.pth", weights_only=True)["model"]


def assert_same_training(ours: Path, theirs: Path) -> None:
    for column in ("loss", "val_loss"):
        first, second = ({k: float(v) for k, v in logged(d, column).items()} for d in (ours, theirs))
        assert list(first) == list(second)
        assert first == pytest.approx(second, abs=2e-3)
    assert logged(ours, "learning_rate") == logged(theirs, "learning_rate")
    expected = weights(theirs / "final")
    for name, weight in weights(ours / "final").items():
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(weight, expected[name]), name
        else:
            torch.testing.assert_close(weight, expected[name], atol=5e-3, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_and_hand_over(recipe, tmp_path, strategy):
    """Two processes equal one; a checkpoint of two is resumed by one and by four, and one of one by two."""
    tokens = {"max_tokens": 6 * 128, "global_batch_size": 4, "save_interval": 3}
    extras = {"ema": {"decay": 0.5}, "eval": {"interval": 3, "max_iters": 2}}

    def file(name: str, processes: int) -> Path:
        train = {**tokens, "micro_batch_size": 4 // processes}
        out_dir = str(tmp_path / name)
        return recipe(name, out_dir=out_dir, train=train, devices=processes, strategy=strategy, **extras)

    run(*RUN_TRAIN, "--config", file("one", 1))
    run(*RUN_TRAIN, "--config", file("two", 2))
    assert_same_training(tmp_path / "two", tmp_path / "one")
    average, expected = (weights(tmp_path / name / "final" / "ema") for name in ("two", "one"))
    assert all(torch.allclose(average[name], expected[name], atol=5e-3) for name in expected)
    for source, name, processes in (("two", "two-one", 1), ("two", "two-four", 4), ("one", "one-two", 2)):
        start = tmp_path / source / "step-00000003"
        output = run(*RUN_TRAIN, "--config", file(name, processes), "--resume", start)
        assert ("they start anew" in output) is True
        for column in ("loss", "val_loss"):
            ours, theirs = ({k: float(v) for k, v in logged(tmp_path / n, column).items()} for n in (name, "one"))
            assert ours == pytest.approx({k: v for k, v in theirs.items() if k > 3 or k not in theirs}, abs=2e-3)
        assert (tmp_path / name / "final" / "ema" / "lit_model.pth").is_file()
