"""Saving, linking, retention and recovery, killed at every place where they touch a file.

The training between two saves is left out, so that a kill costs milliseconds: a fork of this process saves ten
checkpoints as a run does, and ends without a word before, or between the halves of, its n-th change on the disk. The
next fork resumes from what is there, and is killed as well. `MOE_TEST_SAVE_KILLS` says how often, `MOE_TEST_SEED`
where.
"""

import itertools
import os
import random
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt_moe_ext.host.checkpoints import WEIGHTS_FILE
from litgpt_moe_ext.training.callbacks.retention import Retention
from litgpt_moe_ext.training.checkpoint import store
from litgpt_moe_ext.training.checkpoint.progress import newest_first, next_attempt, read_progress
from litgpt_moe_ext.training.checkpoint.resume import find_resume_file, problem_with
from litgpt_moe_ext.training.parallel.random_state import RankStreams
from litgpt_moe_ext.training.settings import CheckpointArgs
from tests.attack.killing import check_after_a_kill
from tests.attack.runs import watch

KILLS = int(os.environ.get("MOE_TEST_SAVE_KILLS", "25"))
SEED = int(os.environ.get("MOE_TEST_SEED", "0"))
LOSSES = (5.0, 4.0, 4.5, 3.0, 3.5, 3.6, 2.5, 2.0, 2.6, 2.7)
"""Validation losses after steps 1 to 10; the best comes with a checkpoint (8), and the one before it without (7)."""
STEPS = len(LOSSES)


class Fabric:
    """What saving asks of a fabric of one process."""

    is_global_zero, world_size = True, 1

    def __init__(self) -> None:
        self.attempt, self.step = 1, 0
        self.random_streams = RankStreams(self)
        self.retention: Retention

    def barrier(self) -> None:
        pass

    def broadcast(self, value: Any) -> Any:
        return value

    def print(self, *_values: Any) -> None:
        pass

    def call(self, _hook: str, directory: Path) -> None:
        (directory / "ema").mkdir()
        torch.save({"w": torch.tensor([self.step + 0.5])}, directory / "ema" / WEIGHTS_FILE)

    def callback_states(self) -> dict[str, Any]:
        return {"Retention": self.retention.state_dict()}


def train(out_dir: Path) -> None:
    """Do on the disk what a run does that saves after every other step, and after the last."""
    fabric = Fabric()
    out_dir.mkdir(exist_ok=True)
    store.recover(out_dir)
    found = find_resume_file("auto", out_dir, lambda _line: None)
    save = lambda name: save_state(fabric, out_dir / name)  # noqa: E731
    fabric.retention = Retention(CheckpointArgs(keep_last=2), out_dir, fabric, save)
    if found:
        fabric.attempt = next_attempt(out_dir, found.parent)
        content = torch.load(found, weights_only=True)
        fabric.step = content["step_count"]
        assert content["w"] == fabric.step
        if saved := content["callbacks"].get("Retention"):
            fabric.retention.load_state_dict(saved)
    fabric.retention.on_fit_begin(found.parent if found else None)
    while fabric.step < STEPS:
        fabric.retention.on_step_begin({"step_count": fabric.step})
        fabric.step += 1
        fabric.retention.on_logged({"val_loss": LOSSES[fabric.step - 1]})
        if fabric.step % 2 == 0:
            save(f"step-{fabric.step:08d}")
    save("final")


def save_state(fabric: Fabric, directory: Path) -> None:
    def save(_fabric: Any, state: dict, file: Path) -> None:
        file.parent.mkdir(parents=True)
        torch.save(state, file)
        for name in ("model_config.yaml", "hyperparameters.yaml", "tokenizer.json"):
            (file.parent / name).write_text(name)

    state = {
        "w": torch.tensor(float(fabric.step)),
        "optimizer": {},
        "step_count": fabric.step,
        "iter_num": fabric.step,
    }
    store.save_whole(save, fabric, state, directory / WEIGHTS_FILE)
    fabric.retention.on_checkpoint_saved(directory)


def in_a_fork(out_dir: Path, die_at: int | None) -> tuple[int, int]:
    """Return the exit status of a run, and how often it changed something on the disk; 9 where it was killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            count_changes(out_dir, writer, die_at)
            train(out_dir)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as counter:
        changes = len(counter.read())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), changes


def count_changes(out_dir: Path, writer: int, die_at: int | None) -> None:
    count, write_text = itertools.count(1), Path.write_text

    def touched(_event: str) -> None:
        os.write(writer, b".")
        if next(count) == die_at:
            os._exit(9)

    def write_in_halves(self: Path, text: str, **kwargs: Any) -> int:
        write_text(self, text[: len(text) // 2], **kwargs)
        touched("write_text")
        return write_text(self, text, **kwargs)

    Path.write_text = write_in_halves
    watch(str(out_dir), touched)


@pytest.fixture
def quiet(monkeypatch):
    """Leave out what needs a device, or the disk to be slow."""
    monkeypatch.setattr(RankStreams, "to_save", lambda _self: [])
    monkeypatch.setattr(store, "flush", lambda _path: None)
    monkeypatch.setattr(store, "flush_tree", lambda _path: None)


def check_end(out_dir: Path) -> None:
    assert read_progress(out_dir / "final").step == STEPS
    assert sorted(path.name for path in out_dir.iterdir()) == ["best", "final", "step-00000008", "step-00000010"]
    assert all(problem_with(path) is None for path in newest_first(out_dir))
    best = read_progress(out_dir / "best").step
    assert LOSSES[best - 1] == min(LOSSES)
    assert torch.load(out_dir / "best" / WEIGHTS_FILE, weights_only=True)["w"] == best
    assert torch.load(out_dir / "best" / "ema" / WEIGHTS_FILE, weights_only=True)["w"] == best + 0.5


def test_killed_while_saving(tmp_path, quiet):
    generator = random.Random(SEED)
    status, places = in_a_fork(tmp_path / "whole", None)
    assert status == 0
    check_end(tmp_path / "whole")
    kills = 0
    while kills < KILLS:
        out_dir, newest = tmp_path / "killed", (0, 0)
        for _ in range(generator.randint(1, 8)):
            status, _ = in_a_fork(out_dir, generator.randint(1, places))
            assert status in (0, 9)
            if status == 0:
                break
            kills += 1
            if out_dir.is_dir():
                newest = check_after_a_kill(out_dir, newest)
        assert in_a_fork(out_dir, None)[0] == 0
        check_end(out_dir)
        shutil.rmtree(out_dir)
