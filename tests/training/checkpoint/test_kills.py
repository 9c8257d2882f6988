"""Killed again and again at random moments, a run gives the losses of the uninterrupted one, bit for bit.

`MOE_TEST_KILLS` sets how often; continuous integration kills a few times, two processes once (starting a process costs
most of the time), before a release it should be twenty.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.training.conftest import ROOT, RUN_TRAIN, logged
from tests.training.processes import Training

KILLS = {processes: int(os.environ.get("MOE_TEST_KILLS", default)) for processes, default in ((1, 3), (2, 1))}

pytestmark = pytest.mark.slow


def start(processes: int, file: Path, *arguments: str) -> Training | subprocess.Popen:
    if processes == 1:
        return Training("--config", file, *arguments)
    # The first process starts the second by its own command line.
    return subprocess.Popen(
        [*RUN_TRAIN, "--config", str(file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def kill_at_a_random_moment(process: Training | subprocess.Popen, generator: random.Random) -> bool:
    """Kill the process and its children a little after a random line of its output; False if it ended before."""
    lines = generator.randrange(2, 12)
    for line in process.stdout:
        if line.startswith(("step ", "  saved", "  validation")):
            lines -= 1
        if not lines:
            time.sleep(generator.uniform(0.0, 0.1))
            break
    ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    return not ended


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_many_times(recipe, tmp_path, processes):
    kills = KILLS[processes]
    steps = 8 * kills
    changes = {
        "train": {"max_tokens": steps * 128, "save_interval": 2, "micro_batch_size": 2 // processes},
        "eval": {"interval": 3, "max_iters": 2},
        "devices": processes,
        "ema": {"decay": 0.9},
        "checkpoint": {"keep_last": 3},
    }
    whole = start(processes, recipe("whole", out_dir=str(tmp_path / "whole"), **changes))
    output, _ = whole.communicate(timeout=280)
    assert whole.returncode == 0, output

    generator = random.Random(processes)
    file = recipe("killed", out_dir=str(tmp_path / "killed"), **changes)
    killed = 0
    for _ in range(kills):
        killed += kill_at_a_random_moment(start(processes, file, "--resume", "auto"), generator)
    assert killed >= max(1, kills - 1)
    last = start(processes, file, "--resume", "auto")
    output, _ = last.communicate(timeout=280)
    assert last.returncode == 0, output

    for column in ("loss", "val_loss", "grad_norm", "learning_rate"):
        assert logged(tmp_path / "killed", column) == logged(tmp_path / "whole", column)
    for folder in ("final", "final/ema"):
        ours, theirs = (
            torch.load(tmp_path / name / folder / "lit_model.pth", weights_only=True)["model"]
            for name in ("killed", "whole")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
