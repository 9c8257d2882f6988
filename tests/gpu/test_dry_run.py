"""The suite for cards on a CPU: it can be collected, and what does not need a card works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_suite_runs_on_a_cpu():
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider"]
    environment = os.environ | {"GPU_TESTS_DEVICE": "cpu"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-6000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout
