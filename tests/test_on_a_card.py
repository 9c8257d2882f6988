"""What a card said is kept, however the script ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.runs import PATIENCE, ROOT

COMMAND = [sys.executable, ROOT / "tools" / "on_a_card.py", "--device", "cpu", "--only", "tests", "--out"]


@pytest.mark.parametrize(("kind", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted(tmp_path, kind, status):
    """The part is ended, and the report is there, without a traceback."""
    process = subprocess.Popen([*COMMAND, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tool = psutil.Process(process.pid)
    while not any("pytest" in part.cmdline() for part in tool.children()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(kind)
    shown, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == status
    assert "Traceback" not in shown
    (part,) = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert (part["part"], part["ended"]) == ("tests", "interrupted")
    assert re.search(r"\| tests \| \d+ \| interrupted \|", (tmp_path / "report.md").read_text())


@pytest.mark.parametrize("name", ["report.json", "benchmark.json"])
def test_figures_of_an_earlier_call_are_not_taken_for_new_ones(tmp_path, name):
    (tmp_path / name).write_text("{}")
    ended = subprocess.run([*COMMAND, tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.endswith(f"--out: {tmp_path} has the {name} of an earlier call; name another folder\n")
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.slow
def test_a_part_that_fails_is_in_the_exit_status(tmp_path):
    command = [*COMMAND[:2], "--only", "benchmark", "--out", tmp_path]
    without_card = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=without_card, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "--device: cuda must be there" in ended.stdout
    assert "| benchmark |" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_what_cannot_be_measured_here_is_no_failure(tmp_path):
    """As blocks on a card where torch computes the experts."""
    command = [*COMMAND[:2], "--only", "blocks", "--out", tmp_path]
    without_card = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=without_card, capture_output=True, text=True, check=False)
    assert ended.returncode == 0
    report = (tmp_path / "report.md").read_text()
    assert report.count(" | refused |") == 2
    assert "\nblocks-code-moe-60m: " in report
    assert "tune: needs a GPU" in report
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix == ".json") == ["report.json"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    ended = subprocess.run([*COMMAND, tmp_path / "file"], capture_output=True, text=True, check=False)
    assert ended.stderr.splitlines()[-1].endswith("cannot be written to (File exists); name another folder")
