"""Whole steps on the null GPU with the numbers that a GPU would come to, the CPU's rounding aside."""

import sys

import pytest

from tests import null_gpu
from tests.runs import run_command

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "tests",
    [
        "tests/null_gpu/computed_operators.py",
        "tests/null_gpu/computed_graphs.py",
        "tests/null_gpu/computed_streams.py",
        "tests/gpu/test_balancing.py",
        "tests/gpu/test_optimizers.py",
    ],
    ids=["operators", "graphs", "streams", "balancing", "optimizers"],
)
def test_on_the_gpu_that_is_not_there(gpu, tests):
    """In a process of its own: kernels go through Triton's interpreter, operators through their CPU kernels."""
    environment = null_gpu.environment(gpu, 89) | {"TRITON_INTERPRET": "1"}
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "tests.null_gpu.computing")
    command = [sys.executable, "-m", "pytest", tests, "-x", "-m", "gpu or not gpu", *plugins]
    ended = run_command(*command, timeout=None, **environment)
    assert "passed" in ended.stdout
    assert "skipped" not in ended.stdout
