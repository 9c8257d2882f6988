"""The Triton kernels of all rooms without a card, run by Triton's interpreter."""

import sys
from importlib.metadata import version

import pytest

from tests.runs import run_command

INTERPRETED = (
    "tests/interpreted_memory.py",
    *(
        f"tests/moe/kernels/interpreted_{name}.py"
        for name in ("triton", "router", "product", "orthogonality", "balancing", "fakes", "far")
    ),
    *(f"tests/attention/interpreted_{name}.py" for name in ("epilogue", "rotation")),
    "tests/loss/interpreted_cross_entropy.py",
    "tests/inspect/interpreted_tuning.py",
)


def interpret(examples, *arguments):
    """Run the interpreted tests in a process of their own, in which Triton starts as an interpreter."""
    plugins = ("-p", "no:cacheprovider", "-p", "tests.watched_memory")
    command = [sys.executable, "-m", "pytest", *INTERPRETED, "-x", "-q", *plugins, *arguments]
    try:
        run_command(*command, timeout=None, TRITON_INTERPRET="1", TRITON_EXAMPLES=str(examples))
    except AssertionError as error:
        if "only 0-dimensional arrays can be converted" not in str(error):
            raise
        # That of torch 2.10 and 2.11; the package itself does not care.
        versions = f"Triton {version('triton')} reads no number under NumPy {version('numpy')}"
        pytest.fail(f"the interpreter of {versions}: install 'numpy<2.5' or a newer torch", pytrace=False)


def test_interpreted_kernels_equal_the_loop():
    pytest.importorskip("triton")
    interpret(2)


@pytest.mark.slow
def test_interpreted_kernels_in_many_shapes():
    pytest.importorskip("triton")
    interpret(4, "-m", "slow or not slow")
