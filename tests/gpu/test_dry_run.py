"""What is for cards, on a CPU: the tests and the benchmark can be collected, and what does not need a card works."""

import json
import sys

import pytest

from tests.runs import run_command

# Says of how many earlier models in training there is something left where the next is made.
WATCH = """
import gc, sys, weakref
sys.path.insert(0, "benchmarks")
import gpu
from gpu_tables import steps

made = []

class Watched(steps.Trainee):
    def __init__(self, *args):
        gc.collect()
        print("kept:", sum(trainee() is not None for trainee in made))
        super().__init__(*args)
        made.append(weakref.ref(self))

steps.Trainee = Watched
gpu.main()
"""

# Says of the first process that the card is lost to it; the one that goes on runs the command as it is.
LOSE = """
import sys
sys.path.insert(0, "benchmarks")
import gpu

gpu.is_lost = lambda bench: True
gpu.main()
"""


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
    assert len(tables) == 13
    assert all(table["rows"] for name, table in tables.items() if name != "compiled")
    assert not any(table["notes"] for table in tables.values())


@pytest.mark.slow
def test_no_model_takes_room_beside_the_next(tmp_path):
    """Whose peak of memory is measured."""
    shown = run("-c", WATCH, "--device", "cpu", "--tiny", "--only", "steps", "--out", str(tmp_path / "figures.json"))
    assert [line for line in shown.splitlines() if line.startswith("kept")] == 8 * ["kept: 0"]


@pytest.mark.slow
def test_a_lost_card_costs_one_table(tmp_path):
    out = tmp_path / "figures.json"
    run("-c", LOSE, "--device", "cpu", "--tiny", "--only", "gradients", "decoding", "--out", str(out))
    tables = json.loads(out.read_text())["tables"]
    assert [(table["name"], len(table["rows"])) for table in tables] == [("gradients", 1), ("decoding", 2)]
