"""Two processes, of which the first starts the second, are killed and give the losses of the undisturbed run.

`tests/attack/test_kills.py` kills far more often, in ranks that a launcher has started. `MOE_TEST_KILLS` sets how often
here; starting processes costs most of the time.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.runs import PATIENCE, ROOT, RUN_TRAIN, logged, weights_of
from tests.training.signalling import wait_for_signal

KILLS = int(os.environ.get("MOE_TEST_KILLS", "1"))


def start(file: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*RUN_TRAIN, "--config", str(file), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def kill_at_a_random_moment(process: subprocess.Popen, generator: random.Random) -> None:
    """Kill the process and its children a little after a random line of its output, before its end."""
    lines = generator.randrange(2, 12)
    for line in process.stdout:
        if line.startswith(("step ", "  saved", "  validation")):
            lines -= 1
        if not lines:
            time.sleep(generator.uniform(0.0, 0.1))
            break
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE)


@pytest.mark.slow
def test_killed_many_times(recipe, tmp_path):
    changes = {
        "train": {"max_tokens": 8 * KILLS * 128, "save_interval": 2, "micro_batch_size": 1},
        "eval": {"interval": 3, "max_iters": 2},
        "devices": 2,
        "ema": {"decay": 0.9},
        "checkpoint": {"keep_last": 3},
    }
    whole = start(recipe("whole", out_dir=str(tmp_path / "whole"), **changes))
    output, _ = whole.communicate(timeout=PATIENCE)
    assert whole.returncode == 0, output

    generator = random.Random(2)
    out_dir = str(tmp_path / "killed")
    file = recipe("killed", out_dir=out_dir, callbacks=wait_for_signal(8 * KILLS), **changes)
    for _ in range(KILLS):
        kill_at_a_random_moment(start(file, "--resume", "auto"), generator)
    last = start(recipe("last", out_dir=out_dir, **changes), "--resume", "auto")
    output, _ = last.communicate(timeout=PATIENCE)
    assert last.returncode == 0, output

    for column in ("loss", "val_loss", "grad_norm", "learning_rate"):
        assert logged(tmp_path / "killed", column) == logged(tmp_path / "whole", column)
    for folder in ("final", "final/ema"):
        ours, theirs = (weights_of(tmp_path / name / folder) for name in ("killed", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
