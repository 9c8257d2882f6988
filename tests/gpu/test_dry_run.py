"""What is for cards, on a CPU: the tests and the benchmark can be collected, and what does not need a card works."""

import json
import sys

import pytest

from tests.runs import run_command


def run(*command):
    return run_command(sys.executable, *command, timeout=None, GPU_TESTS_DEVICE="cpu").stdout


@pytest.mark.slow
def test_the_suite():
    assert " passed" in run("-m", "pytest", "tests/gpu", "-m", "gpu", "-x", "-p", "no:cacheprovider")


@pytest.mark.slow
def test_the_benchmark(tmp_path):
    run("benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    tables = {table["name"]: table for table in figures["tables"]}
    assert list(tables)[-1] == "compiled"  # which toys are not
    assert len(tables) == 10
    assert all(table["rows"] for name, table in tables.items() if name != "compiled")
    assert not any(table["notes"] for table in tables.values())
