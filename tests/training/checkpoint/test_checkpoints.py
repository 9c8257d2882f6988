"""Which checkpoints there are, and that no failure costs one."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import yaml
from litgpt.utils import save_config

from litgpt_moe_ext.data.tokenizer.opening import open_as_litgpt
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files import checksums, durable
from litgpt_moe_ext.files.durable import flush, flush_tree, rename
from litgpt_moe_ext.files.lock import ProcessLock
from litgpt_moe_ext.model_size import count_parameters
from litgpt_moe_ext.training.callbacks import retention
from litgpt_moe_ext.training.checkpoint import store as checkpoints
from litgpt_moe_ext.training.checkpoint import writer as writing
from litgpt_moe_ext.training.checkpoint.changes import resume_notes
from litgpt_moe_ext.training.checkpoint.compatibility import (
    require_same_groups,
    require_same_model,
    require_same_optimizer,
)
from litgpt_moe_ext.training.checkpoint.earlier import earlier_runs, limit_earlier_runs, set_aside
from litgpt_moe_ext.training.checkpoint.hyperparameters import read
from litgpt_moe_ext.training.checkpoint.progress import STATE_FILE, Progress, newest_first, next_attempt, read_progress
from litgpt_moe_ext.training.checkpoint.resume import damage_of, find_resume_file, problem_with
from litgpt_moe_ext.training.checkpoint.writer import CheckpointWriter
from litgpt_moe_ext.training.control import TrainingStopped
from litgpt_moe_ext.training.optim import parameter_groups
from litgpt_moe_ext.training.parallel import memory
from litgpt_moe_ext.training.parallel.facts import facts_of
from litgpt_moe_ext.training.settings import CheckpointArgs, DistributedArgs, ParameterGroupArgs
from tests.models import dense_config, moe_config
from tests.runs import logged, small_disk, train

MUON = "litgpt_moe_ext.training.optim.muon.MuonAdamW"


def directories(out_dir: Path) -> list[str]:
    return sorted(path.name for path in out_dir.iterdir() if path.is_dir())


def step_of(checkpoint: Path) -> int:
    return json.loads((checkpoint / "training_state.json").read_text())["step"]


def test_a_new_run_starts_without_what_an_earlier_one_left(tmp_path):
    """What it exported, and the batches of its anomalies, would be taken for the new run's."""
    out_dir = tmp_path / "out"
    left = ["metrics.csv", "metrics-wide.csv", "train.log", "logs/csv/version_0/metrics.csv"]
    left += ["exported/best-hf/config.json", "anomalies/step-00000003-rank-0.pt"]
    for name in left:
        (out_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (out_dir / name).touch()
    aside = set_aside(out_dir)
    assert aside == tmp_path / "out-earlier-1"
    assert all((aside / name).is_file() for name in left)
    assert [path for path in out_dir.rglob("*") if path.is_file()] == []


def test_a_file_system_that_flushes_no_folders(tmp_path, monkeypatch):
    """As some of FUSE and of Windows servers; everything else that goes wrong is still said. No file stays open."""
    fsync, opened = os.fsync, len(os.listdir("/dev/fd"))

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    (tmp_path / "file").touch()
    flush_tree(tmp_path)

    def refuse_all(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse_all)
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OSError, match="Input/output error"):
            flush(path)
    assert len(os.listdir("/dev/fd")) == opened


def test_keeps_the_last_and_the_best(recipe, tmp_path):
    """A learning rate that explodes after the first validations: the best is not the last."""
    file = recipe(train={"save_interval": 2}, eval={"interval": 2}, optimizer={"init_args": {"lr": 3.0}})
    assert train("--config", file, "--checkpoint.keep_last", "2", "--train.max_steps", "6") == 0
    out_dir = tmp_path / "out"
    assert directories(out_dir) == ["best", "final", "step-00000004", "step-00000006"]
    losses = {step: float(loss) for step, loss in logged(out_dir, "val_loss").items()}
    assert list(losses) == [2, 4, 6]
    assert step_of(out_dir / "best") == min(losses, key=losses.get) < 6
    assert problem_with(out_dir / "best") is None
    files = {path.name for path in out_dir.rglob("*") if path.name.startswith(".")}
    assert files == set(), "no lock and no half checkpoint is left"


def test_checkpoints_of_plain_litgpt_are_not_deleted(tmp_path):
    keeper = retention.Retention(CheckpointArgs(keep_last=1), tmp_path, SimpleNamespace(is_global_zero=True), print)
    for step in (1, 2, 3, 4):
        directory = tmp_path / f"step-{step:08d}"
        directory.mkdir()
        if step % 2:
            (directory / "lit_model.pth").touch()
        else:
            Progress(1, step, step, 1, 0.0).write(directory)
            keeper.on_checkpoint_saved(directory)
    assert directories(tmp_path) == ["step-00000001", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("link", ["step-latest", "step-00000000-link"])
def test_links_to_checkpoints_are_neither_counted_nor_deleted(tmp_path, link):
    keeper = retention.Retention(CheckpointArgs(keep_last=2), tmp_path, SimpleNamespace(is_global_zero=True), print)
    for step in (1, 2, 3, 4):
        directory = tmp_path / f"step-{step:08d}"
        directory.mkdir()
        Progress(1, step, step, 1, 0.0).write(directory)
        keeper.on_checkpoint_saved(directory)
        (tmp_path / link).unlink(missing_ok=True)
        (tmp_path / link).symlink_to(directory.name)
    assert directories(tmp_path) == sorted([link, "step-00000003", "step-00000004"])


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing(tmp_path, monkeypatch):
    said = []
    fabric = SimpleNamespace(is_global_zero=True, print=said.append)
    keeper = retention.Retention(CheckpointArgs(keep_last=1), tmp_path, fabric, print)
    monkeypatch.setattr(retention, "remove", Mock(side_effect=PermissionError(13, "Permission denied")))
    for step in (1, 2):
        directory = tmp_path / f"step-{step:08d}"
        directory.mkdir()
        Progress(1, step, step, 1, 0.0).write(directory)
        keeper.on_checkpoint_saved(directory)
    assert said == [f"  {tmp_path / 'step-00000001'} could not be deleted: [Errno 13] Permission denied"]


def test_the_best_shares_its_weights_and_nothing_that_people_edit(tmp_path):
    (tmp_path / "step-1" / "ema").mkdir(parents=True)
    names = ("lit_model.pth", "ema/lit_model.pth", "model_config.yaml")
    for name in names:
        (tmp_path / "step-1" / name).write_text(name)
    checkpoints.link(tmp_path / "step-1", tmp_path / "best")
    assert [os.path.samefile(*(tmp_path / d / name for d in ("step-1", "best"))) for name in names] == [1, 1, 0]


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_checkpoint_that_is_a_link_is_replaced_again_and_again(tmp_path, on_disk):
    """The user has moved it to another disk, which may be gone; what is there stays, and no link is left behind."""
    if on_disk:
        (tmp_path / "disk").mkdir()
        (tmp_path / "disk" / STATE_FILE).write_text("moved")
    out, staging = tmp_path / "out", tmp_path / "out" / ".final.incomplete"
    out.mkdir()
    (out / "final").symlink_to(tmp_path / "disk")
    for saved in ("first", "second"):
        staging.mkdir()
        (staging / STATE_FILE).write_text(saved)
        checkpoints.publish(staging, out / "final")
        assert (out / "final" / STATE_FILE).read_text() == saved
    assert directories(out) == ["final"]
    assert {path.name for path in out.iterdir()} == ({"final"} if on_disk else {"final-earlier-1", "final"})
    assert not on_disk or (tmp_path / "disk" / STATE_FILE).read_text() == "moved"


def test_links_that_a_killed_run_left_are_removed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out" / "final").mkdir(parents=True)
    for name in (".final.replaced", ".step-00000001.removed"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "disk")
    checkpoints.recover(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["final"]
    assert (tmp_path / "disk").is_dir()


def test_a_copy_on_a_full_disk_has_one_cause(tmp_path, monkeypatch):
    """`shutil` lists what went wrong with every file, each with both its names."""
    (tmp_path / "step-00000001").mkdir()
    for name in ("model_config.yaml", "tokenizer.json"):
        (tmp_path / "step-00000001" / name).touch()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tokenizer.json")
    monkeypatch.setattr(shutil, "copy2", Mock(side_effect=full))
    with pytest.raises(OSError, match=f"^{re.escape(str(full))}$"):
        checkpoints.link(tmp_path / "step-00000001", tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_best_between_two_checkpoints(recipe, tmp_path):
    """Validation at steps without a checkpoint saves one; a resumed run knows the best of the first."""
    still = {"model_config": {"router_bias_update_rate": 0.0}}  # which would move without learning
    file = recipe(train={"save_interval": 1000}, eval={"interval": 3}, **still)
    assert train("--config", file, "--train.max_steps", "6") == 0
    best = tmp_path / "out" / "best"
    assert step_of(best) == 6
    saved = torch.load(tmp_path / "out" / "final" / "lit_model.pth", weights_only=True)
    assert saved["callbacks"]["Retention"]["loss"] == min(map(float, logged(tmp_path / "out", "val_loss").values()))
    assert train("--config", file, "--resume", "auto", "--optimizer.lr", "0.0", "--train.min_lr", "0.0") == 0
    assert step_of(best) == 6, "nothing got better without learning"


def test_a_corpus_that_is_deleted_while_it_trains(recipe, corpus_settings, tmp_path, monkeypatch, capsys):
    """Its tokens stay in memory maps, and what else is needed of it is known."""
    save = writing.store.save_whole
    prepared = tmp_path / "prepared"

    def delete_and_save(*arguments):
        shutil.rmtree(prepared, ignore_errors=True)
        save(*arguments)

    monkeypatch.setattr(writing.store, "save_whole", delete_and_save)
    settings = corpus_settings | {"data_path": str(prepared)}
    data = {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": settings}
    assert train("--config", recipe(data=data)) == 0
    assert "a model of token frequencies alone" in capsys.readouterr().out
    final = tmp_path / "out" / "final"
    assert open_as_litgpt(final).eos_id == 0
    assert yaml.safe_load((final / "model_config.yaml").read_text())["name"] == "tiny"
    assert problem_with(final) is None


def test_a_tokenizer_is_written_once(tmp_path):
    """By us: LitGPT's copy keeps the mode, and no file that is read-only there could be written again."""
    tokenizer_dir = tmp_path / "tokenizer"
    tokenizer_dir.mkdir()
    for name in ("tokenizer.json", "config.json", "merges.txt"):
        (tokenizer_dir / name).write_text(name)

    def write(_fabric, _state, directory, file):
        assert directory is None
        file.parent.mkdir()

    fabric = SimpleNamespace(is_global_zero=True)
    writer = CheckpointWriter(SimpleNamespace(plan=None, fabric=fabric), tokenizer_dir, write)
    writer._write_files(fabric, {}, tmp_path / "final" / "lit_model.pth")
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == ["config.json", "tokenizer.json"]


def test_by_time(recipe, tmp_path):
    file = recipe(train={"save_interval": 1000, "max_tokens": 4 * 128}, eval={"interval": 1000})
    assert train("--config", file, "--checkpoint.every_minutes", "1e-6", "--checkpoint.best", "false") == 0
    names = directories(tmp_path / "out")
    assert names == ["final", "step-00000001", "step-00000002", "step-00000003"], "the last step's is final"


def test_a_save_by_time_that_failed_waits_for_its_time(tmp_path, monkeypatch):
    """It is not tried again before every step."""
    now = [0.0]
    monkeypatch.setattr(writing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoints, "save_whole", Mock(side_effect=checkpoints.SaveError("no space")))
    settings = SimpleNamespace(checkpoint=CheckpointArgs(every_minutes=1, on_save_error="continue"))
    plan, fabric = SimpleNamespace(out_dir=tmp_path, settings=settings), SimpleNamespace(state={}, print=print)
    writer = CheckpointWriter(SimpleNamespace(plan=plan, fabric=fabric), None, print)
    tried = []
    for seconds in (59, 61, 62, 120, 122):
        now[0] = seconds
        if writer.is_due:
            tried.append(seconds)
            writer.save("step-00000001")
    assert tried == [61, 122]
    settings.checkpoint.every_minutes = None
    now[0] = 1e9
    assert not writer.is_due


@pytest.mark.slow
def test_best_of_a_run_that_was_killed_before_it_was_linked(recipe, tmp_path, capsys):
    """`best` is made of the checkpoint that had the loss, or reported missing; never an older one."""
    file = recipe(model_config={"router_bias_update_rate": 0.0})
    still = ("--optimizer.lr", "0.0", "--train.min_lr", "0.0")  # nothing gets better
    assert train("--config", file, "--train.max_tokens", str(4 * 128)) == 0
    out_dir = tmp_path / "out"
    assert step_of(out_dir / "best") == 4
    shutil.rmtree(out_dir / "best")
    assert train("--config", file, "--resume", "auto", *still) == 0
    assert step_of(out_dir / "best") == 4
    assert json.loads((out_dir / "final" / "training_state.json").read_text())["attempt"] == 2
    shutil.rmtree(out_dir / "best")
    shutil.rmtree(out_dir / "step-00000004")
    capsys.readouterr()
    assert train("--config", file, "--resume", "auto", "--train.max_tokens", str(16 * 128), *still) == 0
    assert "after step 4) is missing: from here on the best is counted anew" in capsys.readouterr().out
    assert step_of(out_dir / "best") == 16


def test_untrained_weights_are_never_the_best(tmp_path):
    """Nor those without a loss, or with the same one; the first that were trained are."""
    fabric, saved = SimpleNamespace(step=0, attempt=1), []
    keeper = retention.Retention(CheckpointArgs(), tmp_path, fabric, saved.append)
    for fabric.step, loss in ((0, 1.0), (1, float("nan")), (2, 3.0), (3, 3.5)):
        keeper.on_logged({"val_loss": loss})
        keeper.on_step_begin({"step_count": fabric.step})
        assert saved == ["best"] * (fabric.step >= 2)
        if fabric.step == 2:
            keeper.load_state_dict({"loss": loss, "attempt": 1, "step": 2})
    keeper.on_logged({"val_loss": 3.0})
    keeper.on_step_begin({"step_count": 4})
    assert saved == ["best"]


@pytest.mark.parametrize(("save_interval", "how"), [(1000, "saved"), (2, "made of")], ids=["saved", "linked"])
def test_a_best_that_cannot_be_made_is_not_made_later(save_interval, how, recipe, tmp_path, monkeypatch, capsys):
    """Later weights never get the name of the best; nor does half of it stay."""
    original, failures = checkpoints.publish, []

    def publish(staging: Path, target: Path) -> None:
        if target.name == "best" and not failures:
            failures.append(target)
            raise OSError("no space left")
        original(staging, target)

    monkeypatch.setattr(checkpoints, "publish", publish)
    optimizer, intervals = (
        {"init_args": {"lr": 3.0}},
        {"train": {"save_interval": save_interval}, "eval": {"interval": 2}},
    )
    file = recipe(**intervals, optimizer=optimizer)
    stop = ("--train.max_steps", "6")
    assert train("--config", file, "--checkpoint.on_save_error", "continue", *stop) == 0
    losses = {step: float(loss) for step, loss in logged(tmp_path / "out", "val_loss").items()}
    assert len(failures) == 1
    assert re.findall(r"best could not be (saved|made of)", capsys.readouterr().out) == [how]
    del losses[2]
    best = min(losses, key=losses.get)
    assert step_of(tmp_path / "out" / "best") == best
    monkeypatch.setattr(checkpoints, "publish", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        checkpoints.link(tmp_path / "out" / "final", tmp_path / "out" / "best")
    assert step_of(tmp_path / "out" / "best") == best
    assert not list((tmp_path / "out").glob(".*.incomplete"))


def test_disk_full_while_saving(recipe, tmp_path, capsys):
    file = recipe()
    assert train("--config", file, "--train.max_steps", "4") == 0
    shutil.rmtree(tmp_path / "out" / "final")
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "step-00000004").rglob("*") if path.is_file()}
    with small_disk(100_000):
        status = train("--config", file, "--resume", "auto")
    assert status == 1
    error = capsys.readouterr().err
    assert "step-00000008 could not be saved: a file was cut off, as on a full disk. The checkpoints" in error
    assert f"the newest is {tmp_path / 'out' / 'step-00000004'}" in error
    assert "--checkpoint.on_save_error continue trains on without checkpoints" in error
    assert directories(tmp_path / "out") == ["best", "step-00000004"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert train("--config", file, "--resume", "auto") == 0
    assert step_of(tmp_path / "out" / "final") == 12


@pytest.mark.usefixtures("finished")  # has prepared the corpus, for which there would be no room
def test_disk_full_and_going_on(recipe, tmp_path, capsys):
    file = recipe()
    with small_disk(100_000):
        status = train("--config", file, "--checkpoint.on_save_error", "continue")
    output, error = capsys.readouterr()
    assert status == 1, "the final checkpoint is missing"
    assert "step-00000004 could not be saved" in output
    assert "step 12/12" in output
    assert "final could not be saved" in error
    assert "on_save_error" not in error, "it is set already"
    assert directories(tmp_path / "out") == []


def test_failing_final_validation_keeps_the_training(recipe, tmp_path, monkeypatch):
    import litgpt.pretrain

    original = litgpt.pretrain.validate
    calls = []

    def validate(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # after the sanity check and the one at step 4
            raise RuntimeError("broken validation")
        return original(*args, **kwargs)

    monkeypatch.setattr(litgpt.pretrain, "validate", validate)
    with pytest.raises(RuntimeError, match="broken validation"):
        train("--config", recipe(train={"max_tokens": 5 * 128}))
    assert step_of(tmp_path / "out" / "final") == 5
    assert problem_with(tmp_path / "out" / "final") is None


def test_failing_sample_costs_nothing(recipe, monkeypatch, capsys):
    from litgpt_moe_ext.training.callbacks import samples as sampling

    def broken(*args, **kwargs):
        raise RuntimeError("no sample today")

    monkeypatch.setattr(sampling, "generate", broken)
    assert train("--config", recipe(sample={"prompts": ["def "]})) == 0
    assert "sample | (failed: RuntimeError: no sample today)" in capsys.readouterr().out


def test_a_replacement_is_on_the_disk_first_and_deletes_nothing_of_others(tmp_path, monkeypatch):
    """What plain LitGPT has saved under the same name is set aside; an earlier checkpoint of this package goes."""
    final, staging, replaced = (tmp_path / name for name in ("final", ".final.incomplete", ".final.replaced"))
    flushed = []
    monkeypatch.setattr(checkpoints, "flush_tree", lambda path: flushed.append((path, path.is_dir())))
    monkeypatch.setattr(checkpoints, "flush", lambda path: flushed.append((path, staging.is_dir(), replaced.is_dir())))
    final.mkdir()
    (final / "lit_model.pth").touch()
    for step in (1, 2):
        staging.mkdir()
        Progress(1, step, step, 1, 0.0).write(staging)
        checkpoints.publish(staging, final)
        assert step_of(final) == step
    assert flushed[:2] == [(staging, True), (tmp_path, False, False)]
    assert flushed[2:] == [(staging, True), (tmp_path, False, True)], "its new name as well, before the earlier goes"
    assert directories(tmp_path) == ["final", "final-earlier-1"]
    assert (tmp_path / "final-earlier-1" / "lit_model.pth").is_file()


@pytest.mark.parametrize("held", [2, 9], ids=["lets go", "does not"])
def test_a_program_that_holds_a_checkpoint_on_windows(tmp_path, monkeypatch, held):
    """A scanner that lets go of what has been written costs nothing but a moment; one that does not, a message."""
    (tmp_path / "a").mkdir()
    replace, refusals = os.replace, iter(range(held))

    def refuse(path: Path, target: Path) -> None:
        if next(refusals, None) is not None:
            raise PermissionError(errno.EACCES, "Access denied")
        replace(path, target)

    monkeypatch.setattr(durable, "_ATTEMPTS", 4)
    monkeypatch.setattr(durable, "_PAUSE_SECONDS", 0)
    monkeypatch.setattr(os, "replace", refuse)
    with contextlib.nullcontext() if held == 2 else pytest.raises(PermissionError, match="Access denied"):
        rename(tmp_path / "a", tmp_path / "b")
    assert directories(tmp_path) == ["b" if held == 2 else "a"]
    assert len(list(refusals)) == max(0, held - 4)


@pytest.mark.parametrize("name", ["best", "final"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_that_are_not_finite_on_some_rank(tmp_path, monkeypatch, name, ranks):
    """Of two, this one has others."""
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = math.nan if ranks == 1 else 1
    other = {torch.distributed.ReduceOp.MIN: 0, torch.distributed.ReduceOp.MAX: 1, torch.distributed.ReduceOp.SUM: 1}
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda finite, op: finite.fill_(other[op]))
    plan, fabric = SimpleNamespace(out_dir=tmp_path), SimpleNamespace(world_size=ranks)
    writer = CheckpointWriter(SimpleNamespace(plan=plan, fabric=fabric), None, print)
    with pytest.raises(TrainingStopped, match=f"after step 3 are not finite, so they are not saved as {name}"):
        writer.save_checkpoint(fabric, {"model": model, "step_count": 3}, None, tmp_path / name / "lit_model.pth")


def test_who_saves_remembers_where(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_whole", lambda *_: None)
    plan, fabric = SimpleNamespace(out_dir=tmp_path), SimpleNamespace(call=lambda *_, **__: None)
    writer = CheckpointWriter(SimpleNamespace(plan=plan, fabric=fabric), None, print)
    writer.save_checkpoint(fabric, {}, None, tmp_path / "step-00000004" / "lit_model.pth")
    assert writer.last_saved == tmp_path / "step-00000004"


def writer_of(out_dir: Path, on_save_error: str = "stop", resume_dir: Path | None = None) -> CheckpointWriter:
    settings = SimpleNamespace(checkpoint=CheckpointArgs(on_save_error=on_save_error))
    plan, fabric = SimpleNamespace(out_dir=out_dir, settings=settings), SimpleNamespace(state={}, print=print)
    return CheckpointWriter(SimpleNamespace(plan=plan, fabric=fabric), None, print, resume_dir)


def test_what_a_run_ends_with_must_be_written_whatever_the_settings_say(tmp_path, monkeypatch):
    """As the checkpoint of a run that a signal has stopped."""
    monkeypatch.setattr(checkpoints, "save_whole", Mock(side_effect=checkpoints.SaveError("no space")))
    writer = writer_of(tmp_path, "continue")
    writer.save("step-00000001")
    with pytest.raises(TrainingStopped, match="no space"):
        writer.save("step-00000001", last=True)


def test_a_run_that_trains_nothing_leaves_its_last_checkpoint_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "save_whole", Mock(side_effect=AssertionError("is written again")))
    (tmp_path / "final").mkdir()
    Progress(1, 3, 3, 1, 0.0).write(tmp_path / "final")
    writer = writer_of(tmp_path, resume_dir=tmp_path / "final")
    writer.save_checkpoint(None, {"step_count": 3}, None, tmp_path / "final" / "lit_model.pth")
    assert writer.last_saved == tmp_path / "final"


def test_an_error_of_another_process_than_the_first_is_its_own():
    """The first knows nothing of it, and would have it go on."""
    fabric = SimpleNamespace(is_global_zero=False, broadcast=lambda problem: None)
    with pytest.raises(OSError, match="quota"):
        checkpoints._try_everywhere(fabric, Mock(side_effect=OSError("quota")), False)


def test_half_of_a_deleted_checkpoint_is_never_found(tmp_path, monkeypatch):
    """Killed while its files go, it has its name no more; and the next of its name can be deleted all the same."""
    final = tmp_path / "final"
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda path, **_: None)
        final.mkdir()
        (final / "lit_model.pth").touch()
        checkpoints.remove(final)
    assert directories(tmp_path) == [".final.removed"]
    final.mkdir()
    checkpoints.remove(final)
    assert directories(tmp_path) == []


def test_what_cannot_be_deleted_does_not_keep_the_next_checkpoint_from_its_name(tmp_path, monkeypatch):
    """As a file of NFS that somebody reads, whose deletion leaves another in its place."""
    out, unlink, busy = tmp_path / "out", os.unlink, []

    def refuse(path, **options):
        if Path(path).name == ".nfs1" and busy:
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    busy.append("read by an evaluation")
    for step in (1, 2, 3, 4):
        staging = out / ".best.incomplete"
        staging.mkdir(parents=True)
        Progress(1, step, step, 1, 0.0).write(staging)
        (staging / ".nfs1").touch()
        (staging / "lit_model.pth").touch()
        checkpoints.publish(staging, out / "best")
        assert step_of(out / "best") == step
    assert list(out.glob("*/*.pth")) == [out / "best" / "lit_model.pth"], "the rest is deleted"
    with pytest.raises(OSError, match="busy"):
        checkpoints.remove(out / "best")
    assert not (out / "best").exists()
    assert len(checkpoints.recover(out)) == 4
    busy.clear()
    assert checkpoints.recover(out) == []
    assert directories(out) == [], "and nothing half-deleted has become the best"


def test_settings_nested_too_deep_are_none(tmp_path):
    (tmp_path / "hyperparameters.yaml").write_text("[" * 1500)
    assert read(tmp_path) == {}


def test_what_is_being_written_or_deleted_is_no_checkpoint(tmp_path):
    for name in (".final.incomplete", ".step-00000002.removed", "step-00000001"):
        (tmp_path / name).mkdir()
        Progress(1, 1, 1, 1, 0.0).write(tmp_path / name)
    assert newest_first(tmp_path) == [tmp_path / "step-00000001"]


def test_of_checkpoints_of_one_step_the_end_comes_first_and_the_best_last(tmp_path):
    """Even of no step, as where a signal came before the first."""
    for name in ("best", "final", *(f"step-00000000-{letter}" for letter in "abcdefgh")):
        (tmp_path / name).mkdir()
        Progress(1, 0, 0, 1, 0.0).write(tmp_path / name)
    first, *others, last = (path.name for path in newest_first(tmp_path))
    assert (first, len(others), last) == ("final", 8, "best")
    assert read_progress(tmp_path / "final") == Progress(1, 0, 0, 1, 0.0)
    for attempt in (-1, True, 1.0):
        Progress(attempt, 0, 0, 1, 0.0).write(tmp_path / "final")
        assert read_progress(tmp_path / "final") is None


@pytest.mark.parametrize(("other", "own", "expected"), [(3, [1, 2], 4), (1, [3, 2], 4), (None, [], 1)])
def test_a_run_that_goes_on_is_the_attempt_after_all_others(tmp_path, other, own, expected):
    """After that of the checkpoint, which may be another run's, and after its own."""
    attempts = {"elsewhere": other, **{f"out/step-{i}": attempt for i, attempt in enumerate(own)}}
    (tmp_path / "out").mkdir()
    for name, attempt in attempts.items():
        (tmp_path / name).mkdir()
        if attempt is not None:
            Progress(attempt, 1, 1, 1, 0.0).write(tmp_path / name)
    assert next_attempt(tmp_path / "out", tmp_path / "elsewhere") == expected


@pytest.fixture
def written(tmp_path):
    """Write a checkpoint of a step, as runs do, or as plain LitGPT does it."""

    def write(name: str, step: int, plain: bool = False) -> Path:
        checkpoint = tmp_path / name
        checkpoint.mkdir()
        state = {"model": {"weight": torch.arange(2000.0)}, "optimizer": {}}
        torch.save(state, checkpoint / "lit_model.pth")
        (checkpoint / "model_config.yaml").write_text("name: tiny")
        if not plain:
            Progress(1, step, step, 1, 0.0).write(checkpoint)
            checksums.write(checkpoint)
        return checkpoint

    return write


def test_checkpoints_of_plain_litgpt_are_gone_on_from_in_their_order(written, tmp_path):
    """By the steps in their names, after those of runs that say when they were saved."""
    files = [written(f"step-{step:08d}", step, plain=True) / "lit_model.pth" for step in (8, 16)]
    said = []
    assert find_resume_file("auto", tmp_path, said.append) == files[1]
    ours = written("step-00000004", 4)
    assert find_resume_file("auto", tmp_path, said.append) == ours / "lit_model.pth"
    assert said == []


def test_who_has_lost_its_checksums_is_named_although_a_newer_one_is_whole(written, tmp_path):
    """Its own word about when it was saved is not trusted."""
    newest, other = written("step-00000008", 8), written("step-00000004", 4)
    (other / checksums.FILE_NAME).unlink()
    said = []
    assert find_resume_file("auto", tmp_path, said.append) == newest / "lit_model.pth"
    assert said == [f"Skipping checkpoint {other}: SHA256SUMS is missing"]


def test_numbers_are_read_where_they_are_to_be(written):
    """Names and sizes always; all numbers take long."""
    checkpoint = written("final", 1)
    file = checkpoint / "lit_model.pth"
    content = file.read_bytes()
    at = content.index(torch.arange(1000.0, 1010.0).numpy().tobytes())
    file.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    for problem in (problem_with, damage_of):
        assert "lit_model.pth differs from its checksum" in problem(checkpoint)
        assert problem(checkpoint, read_all=False) is None
        (checkpoint / checksums.FILE_NAME).rename(checkpoint / "kept")
        assert (problem(checkpoint, read_all=False) is None) == (problem is damage_of)
        (checkpoint / "kept").rename(checkpoint / checksums.FILE_NAME)


def test_leftovers_of_a_killed_run(tmp_path):
    """Killed between the two renames of a replacement, the old checkpoint gets its name back; the rest goes."""
    for name in (".final.replaced", ".final.incomplete", ".best.replaced", "best", ".step-00000001.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    assert len(checkpoints.recover(tmp_path)) == 1
    assert directories(tmp_path) == ["best", "final"]
    assert (tmp_path / "final" / "content").read_text() == ".final.replaced"
    assert (tmp_path / "best" / "content").read_text() == "best"


class TestLock:
    def test_second_run_is_refused(self, recipe, tmp_path, capsys):
        (tmp_path / "out").mkdir()
        script = (
            "import sys, time; from pathlib import Path\n"
            "from litgpt_moe_ext.files.lock import ProcessLock\n"
            "lock = ProcessLock(Path(sys.argv[1]) / '.lock'); print(lock.take(), flush=True); time.sleep(600)"
        )
        holder = subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout.readline() == "None\n"
            assert train("--config", recipe()) == 2
            assert f"is in use by process {holder.pid} on " in capsys.readouterr().err
        finally:
            holder.kill()
            holder.wait()
        assert train("--config", recipe(train={"max_tokens": 128})) == 0, "the lock died with its process"

    def test_release(self, tmp_path):
        first, second = ProcessLock(tmp_path / ".lock"), ProcessLock(tmp_path / ".lock")
        assert first.take() is None
        assert second.take() is not None
        second.release()
        assert ProcessLock(tmp_path / ".lock").take() is not None, "only its owner can give it back"
        first.release()
        assert list(tmp_path.iterdir()) == []

    def test_one_owner_whatever_the_moment(self, tmp_path):
        """A second process takes the lock the moment it is released; a third finds it taken."""
        first, second = ProcessLock(tmp_path / ".lock"), ProcessLock(tmp_path / ".lock")
        assert first.take() is None
        release, taken = first._lock.release, []

        def release_and_be_overtaken() -> None:
            release()
            taken.append(second.take())

        first._lock.release = release_and_be_overtaken
        first.release()
        assert taken == [None]
        assert ProcessLock(tmp_path / ".lock").take() is not None

    def test_a_file_that_is_deleted_while_it_is_being_locked(self, tmp_path, monkeypatch):
        """Its owner gives it back when a second process has opened it; a third finds another file there."""
        fcntl = pytest.importorskip("fcntl")
        first, second, third = (ProcessLock(tmp_path / ".lock") for _ in range(3))
        assert first.take() is None
        lock = fcntl.flock

        def lock_what_is_deleted(*arguments) -> None:
            monkeypatch.setattr(fcntl, "flock", lock)
            first.release()
            lock(*arguments)

        monkeypatch.setattr(fcntl, "flock", lock_what_is_deleted)
        assert [second.take(), third.take()].count(None) == 1


class TestManifest:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda content: b"", "SHA256SUMS does not list lit_model.pth, model_config.yaml"),
            (lambda content: content[:70] + b"\xff" + content[71:], "SHA256SUMS cannot be read"),
            (lambda content: b"zz" + content[2:], "SHA256SUMS is damaged in line 1"),
            (lambda content: content[:-30], "SHA256SUMS"),
            (lambda content: content.replace(b"model_config", b"model_c\x00nfig"), "does not list model_config.yaml"),
        ],
    )
    def test_damage_of_its_own_is_named(self, tmp_path, damage, message):
        torch.save({}, tmp_path / "lit_model.pth")
        (tmp_path / "model_config.yaml").write_text("")
        checksums.write(tmp_path)
        file = tmp_path / checksums.FILE_NAME
        file.write_bytes(damage(file.read_bytes()))
        assert message in problem_with(tmp_path)

    @pytest.mark.parametrize(
        "name", [" blank first", "line\u2028separator", "next\x85line", "größe", "two\nlines", "a\\nb\r\\"]
    )
    def test_files_of_any_name_are_listed(self, tmp_path, name):
        (tmp_path / name).write_text("whole")
        checksums.write(tmp_path)
        assert checksums.problem_with(tmp_path) is None
        if sums := shutil.which("sha256sum"):
            subprocess.run([sums, "--quiet", "-c", checksums.FILE_NAME], cwd=tmp_path, check=True)
        (tmp_path / name).write_text("other")
        assert checksums.problem_with(tmp_path) == f"{name} differs from its checksum in SHA256SUMS"

    def test_any_change_is_noticed(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "b.bin").write_bytes(b"content")
        (tmp_path / "c.txt").write_text("text")
        checksums.write(tmp_path)
        assert checksums.problem_with(tmp_path) is None
        if sums := shutil.which("sha256sum"):
            subprocess.run([sums, "--quiet", "-c", checksums.FILE_NAME], cwd=tmp_path, check=True)
        (tmp_path / "a" / "b.bin").write_bytes(b"cOntent")
        assert checksums.problem_with(tmp_path) == "a/b.bin differs from its checksum in SHA256SUMS"
        assert checksums.problem_with(tmp_path, only="c.txt") is None
        (tmp_path / "a" / "b.bin").unlink()
        assert "a/b.bin cannot be read" in checksums.problem_with(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in folders")
def test_a_pipe_in_a_checkpoint_is_not_waited_for(tmp_path):
    """As a callback may put there that listens."""
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "file").write_text("content")
    os.mkfifo(tmp_path / "staging" / "pipe")
    checksums.write(tmp_path / "staging")
    checkpoints.publish(tmp_path / "staging", tmp_path / "checkpoint")
    assert checksums.read(tmp_path / "checkpoint").keys() == {"file"}


def test_the_name_of_a_model_is_no_part_of_it(tmp_path):
    save_config(moe_config(), tmp_path)
    config = moe_config(name="another", hf_config={"org": "someone", "name": "another"})
    require_same_model("resume", tmp_path, config)
    config.n_layer = 3
    with pytest.raises(SettingsError, match="n_layer is 2 in the checkpoint and 3 now. --model_config .* takes"):
        require_same_model("resume", tmp_path, config)
    require_same_optimizer(tmp_path, {"optimizer": "AdamW"})  # which no file here says


@pytest.mark.parametrize("setting", ["resume", "initial_checkpoint_dir"])
def test_how_a_model_is_trained_and_computed_is_no_part_of_it(tmp_path, setting):
    """An error about a kernel that cannot work says to leave it out."""
    before = {"expert_backend": "loop", "router_z_loss_coef": 0.1, "expert_dropout": 0.1}
    save_config(moe_config(**before, router_bias_update_rate=0.01), tmp_path)
    require_same_model(setting, tmp_path, moe_config(router_importance_loss_coef=0.1))
    scheduled = moe_config(router_bias_update_schedule={"warmup_steps": 9})
    if setting == "resume":
        with pytest.raises(SettingsError, match="router_bias_update_schedule is None in the checkpoint and "):
            require_same_model(setting, tmp_path, scheduled)
    else:
        require_same_model(setting, tmp_path, scheduled)
    with pytest.raises(SettingsError, match="norm_topk_prob is "):
        require_same_model(setting, tmp_path, moe_config(norm_topk_prob=True))


def test_resume_notes(recipe, finished, tmp_path, capsys):
    file = recipe()
    checkpoint = finished(tmp_path / "out", step=8) / "step-00000008"
    saved = yaml.safe_load((checkpoint / "hyperparameters.yaml").read_text())
    assert resume_notes(checkpoint, saved) == []
    assert resume_notes(checkpoint, {**saved, "resume": "auto", "out_dir": "other"}) == []
    optimizer = {**saved["optimizer"], "init_args": {**saved["optimizer"]["init_args"], "lr": 0.5}}
    averaging = {"ema": {"decay": 0.9}, "evaluate": {**saved["evaluate"], "hellaswag": "questions.jsonl"}}
    data = {**saved["data"], "init_args": {**saved["data"]["init_args"], "train_count": 9}}
    changed = {**saved, "precision": "bf16-mixed", "optimizer": optimizer, "data": data, **averaging}
    rate = saved["optimizer"]["init_args"]["lr"]
    assert set(resume_notes(checkpoint, changed)[0].removeprefix("changed since the checkpoint: ").split(", ")) == {
        f"precision {saved.get('precision', 'null')} -> bf16-mixed",
        f"optimizer.lr {rate} -> 0.5",
        "data.train_count null -> 9",
        "ema.decay null -> 0.9",
        "evaluate.hellaswag null -> questions.jsonl",
    }
    of_another_version = {**saved, "ema": {"telepathy": 0.9}}
    assert resume_notes(checkpoint, of_another_version) == []
    again = ("--resume", "auto", "--seed", "1", "--model_config.router_z_loss_coef", "0.01")
    assert train("--config", file, *again) == 0
    output = capsys.readouterr().out
    assert "seed was 42 in the checkpoint and is 1 now: it has no effect" in output
    assert "changed since the checkpoint: model_config.router_z_loss_coef null -> 0.01" in output
    (checkpoint / "hyperparameters.yaml").write_text("seed: 2026-13-45")  # which YAML takes for a date
    assert resume_notes(checkpoint, saved) == [
        f"{checkpoint} has no readable hyperparameters.yaml: changed settings go unnoticed"
    ]
    assert train("--config", file, "--resume", "auto") == 0
    assert "This run is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "now", "name", "words"),
    [
        (*({"optimizer": {"init_args": {"eps": eps}}} for eps in (0.1, 0.5)), "eps", "optimizer.eps was 0.1"),
        (*({"optimizer": {"init_args": args}} for args in ({}, {"eps": 0.5})), "eps", "optimizer.eps was null"),
        (*({"parameter_groups": {"router_lr_factor": factor}} for factor in (0.1, 0.5)), "lr_factor", "was 0.1"),
        (*({"parameter_groups": {"no_weight_decay": kinds}} for kinds in ([], ["norms"])), "weight_decay", "was []"),
    ],
)
def test_what_the_state_of_the_optimizer_keeps(tmp_path, before, now, name, words):
    """As every optimizer of torch does when it loads a state; only the learning rate is set anew."""
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump(before))
    (note,) = resume_notes(tmp_path, now)
    assert words in note
    assert "it has no effect" in note
    parameter = torch.nn.Parameter(torch.zeros(1))
    made = [torch.optim.AdamW([{"params": [parameter], name: value}]) for value in (0.1, 0.5)]
    made[1].load_state_dict(made[0].state_dict())
    assert made[1].param_groups[0][name] == 0.1


@pytest.mark.parametrize(
    ("before", "now", "name"),
    [
        ({}, {"router_lr_factor": 0.5}, "router_lr_factor: 0.5 must be 1.0"),
        ({"router_lr_factor": 0.5}, {}, "router_lr_factor: 1.0 must be 0.5"),
        ({"router_lr_factor": 0.5}, {"router_lr_factor": 0.1}, None),
        ({}, {"no_weight_decay": ["norms"]}, r"no_weight_decay: \['norms'\] must be \[\]"),
        ({}, {"no_weight_decay": ["biases"]}, None),  # of which the model has none
    ],
)
@pytest.mark.parametrize("optimizer", ["AdamW", MUON])
def test_parameters_in_other_groups_than_those_of_the_checkpoint(tmp_path, before, now, name, optimizer):
    """Whose state the optimizer could not load, or would give to others."""
    saved, settings = (
        {"parameter_groups": asdict(ParameterGroupArgs(**args)), "optimizer": optimizer} for args in (before, now)
    )
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump(saved))
    refused = pytest.raises(SettingsError, match=rf"^parameter_groups\.{name}, as") if name else nullcontext()
    with refused:
        require_same_groups(tmp_path, settings, moe_config())
    # As another version might have it, which knew none of these settings.
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump({**saved, "parameter_groups": {}}))
    require_same_groups(tmp_path, settings, moe_config())


@pytest.mark.slow
def test_a_checkpoint_with_the_groups_of_another_version(recipe, tmp_path, monkeypatch, capsys):
    """As Muon's were when matrices of one row were among them: the remedy that is named works."""
    made = recipe(optimizer=MUON, model_config={"n_shared_expert": 1, "shared_expert_gate": True})
    with monkeypatch.context() as earlier:
        earlier.setattr(parameter_groups, "_matrix_parts", lambda name, _: 1 + name.endswith("gate_up_proj"))
        assert train("--config", made, "--train.max_steps", 2) == 0
    final = tmp_path / "out" / "final"
    capsys.readouterr()
    assert train("--config", made, "--resume", final) == 2
    error = capsys.readouterr().err
    assert "does not fit the present settings, or this version of the package: " in error
    assert error.endswith("start a new run from its weights with initial_checkpoint_dir and another out_dir.\n")
    assert train("--config", made, "--initial_checkpoint_dir", final, "--out_dir", tmp_path / "other") == 0


def test_matrices_are_a_group_for_muon_anyway(tmp_path):
    """So that of a dense model one group is left, with weight decay or without."""
    saved, settings = (
        {"parameter_groups": asdict(ParameterGroupArgs(no_weight_decay=kinds))}
        for kinds in ([], ["norms", "biases", "embeddings"])
    )
    (tmp_path / "hyperparameters.yaml").write_text(yaml.safe_dump(saved))
    require_same_groups(tmp_path, settings | {"optimizer": MUON}, dense_config())
    with pytest.raises(SettingsError, match="^parameter_groups.no_weight_decay"):
        require_same_groups(tmp_path, settings | {"optimizer": "AdamW"}, dense_config())


@pytest.mark.parametrize(("name", "value"), [("every_minutes", 0), ("keep_last", 0)])
def test_wrong_settings(name, value):
    with pytest.raises(ValueError, match=f"checkpoint.{name}: {value} must be"):
        CheckpointArgs(**{name: value})


class TestSetAside:
    """A second run in the same `out_dir` loses nothing of the first, wherever the directory lies."""

    @pytest.fixture
    def first_run(self, recipe, finished):
        def make(out_dir: Path) -> Path:
            finished(out_dir)
            return recipe(train={"max_tokens": 128})

        return make

    @pytest.mark.parametrize("error", [errno.EXDEV, errno.EACCES], ids=errno.errorcode.get)
    def test_where_nothing_can_be_moved_beside_it(self, first_run, tmp_path, monkeypatch, error):
        """As in the root of a disk, or in a folder that is not ours."""
        out_dir = tmp_path / "out"
        file = first_run(out_dir)
        rename = os.replace

        def within(path: Path, target: Path) -> None:
            if target.is_relative_to(out_dir) != path.is_relative_to(out_dir):
                raise OSError(error, os.strerror(error))
            rename(path, target)

        monkeypatch.setattr(os, "replace", within)
        for number in (1, 2):
            assert train("--config", file, "--out_dir", out_dir) == 0
            assert problem_with(out_dir / f"run-earlier-{number}" / "final") is None
        assert problem_with(out_dir / "final") is None
        assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"], "no empty folder is left"

    def test_a_signal_does_not_divide_it(self, first_run, tmp_path, monkeypatch):
        """All of it has moved when the signal counts."""
        out_dir, rename = tmp_path / "out", os.replace
        file = first_run(out_dir)
        found = {path.name for path in out_dir.iterdir()}

        def interrupted(path: Path, target: Path) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            rename(path, target)

        monkeypatch.setattr(os, "replace", interrupted)
        assert train("--config", file, "--out_dir", out_dir) == 143
        assert {path.name for path in (tmp_path / "out-earlier-1").iterdir()} == found

    def test_through_a_link_to_another_disk(self, first_run, tmp_path):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as disk:
            (Path(disk) / "out").mkdir()
            (tmp_path / "link").symlink_to(Path(disk) / "out")
            file = first_run(tmp_path / "link")
            assert train("--config", file, "--out_dir", tmp_path / "link") == 0
            assert problem_with(Path(disk) / "out-earlier-1" / "final") is None
            assert problem_with(tmp_path / "link" / "final") is None

    def test_a_mount_point(self, first_run, tmp_path):
        out_dir = tmp_path / "disk"
        out_dir.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", out_dir], capture_output=True).returncode:
            # Mounting takes a privilege that most machines do not give; the patched renames above stand in there.
            pytest.skip("mounting a tmpfs is not permitted here")
        try:
            file = first_run(out_dir)
            assert train("--config", file, "--out_dir", out_dir) == 0
            assert problem_with(out_dir / "run-earlier-1" / "final") is None
        finally:
            subprocess.run(["umount", out_dir], check=True)

    def test_nowhere(self, first_run, tmp_path, monkeypatch, capsys):
        out_dir = tmp_path / "out"
        file = first_run(out_dir)

        rename = os.replace

        def refuse_the_last(path: Path, target: Path) -> None:
            if path.name == "train.log":
                raise PermissionError(errno.EACCES, "Permission denied")
            rename(path, target)

        monkeypatch.setattr(os, "replace", refuse_the_last)
        assert train("--config", file, "--out_dir", out_dir) == 2
        assert "error: out_dir: " in capsys.readouterr().err
        assert problem_with(out_dir / "final") is None
        assert (out_dir / "metrics.csv").is_file()
        assert [path.name for path in tmp_path.glob("out*")] == ["out"]

    @pytest.fixture
    def earlier(self, tmp_path):
        """Three of them, the oldest by number with the latest date, and a folder of such a name that is none."""
        for number in (3, 2, 10):
            (tmp_path / f"out-earlier-{number}").mkdir()
            (tmp_path / f"out-earlier-{number}" / "metrics.csv").touch()
        (tmp_path / "out-earlier-1").mkdir()
        os.utime(tmp_path / "out-earlier-2", (2**33, 2**33))
        return tmp_path

    def test_which_folders_are_earlier_runs(self, tmp_path):
        """Beside a run's folder, or in it where nothing could be moved out; with a log of any kind, or a checkpoint."""
        out_dir = tmp_path / "out"
        places = {"out-earlier-1": "metrics-wide.csv", "out/run-earlier-2": "logs/csv", "out-earlier-3": "final"}
        places |= {"out-earlier-\u0664": "metrics.csv", "out-earlier-5": "notes.txt", "other-earlier-6": "metrics.csv"}
        for name, content in places.items():
            (tmp_path / name / content).mkdir(parents=True)
        (tmp_path / "out-earlier-3" / "final" / "lit_model.pth").touch()
        assert earlier_runs(out_dir) == [tmp_path / name for name in list(places)[:3]]

    def test_what_a_run_starts_from_stays_however_it_is_named(self, earlier, monkeypatch):
        (earlier / "link").symlink_to(earlier / "out-earlier-2")
        monkeypatch.chdir(earlier)
        needed = [Path("link", "final"), Path("out-earlier-3", "final")]
        assert "out-earlier-10" in limit_earlier_runs(earlier / "out", 0, needed)
        assert {path.name for path in earlier.glob("out-*")} == {"out-earlier-1", "out-earlier-2", "out-earlier-3"}

    def test_from_how_many_on_they_are_told(self, earlier):
        assert "There are 3 earlier runs now." in limit_earlier_runs(earlier / "out", None, ())
        shutil.rmtree(earlier / "out-earlier-3")
        assert limit_earlier_runs(earlier / "out", None, ()) is None

    def test_many_are_told_with_the_command_that_deletes_them(self, first_run, earlier, capsys):
        file = first_run(earlier / "out")
        assert train("--config", file) == 0
        output = capsys.readouterr().out
        assert "There are 4 earlier runs now." in output
        doomed = [str(earlier / f"out-earlier-{number}") for number in (2, 3, 10)]
        assert f"deleted by: rm -r {' '.join(doomed)};" in output
        assert (earlier / "out-earlier-2").exists()

    def test_the_oldest_are_deleted_if_a_setting_says_so(self, first_run, earlier):
        """What was set aside last stays, and so does what is no run, or has what this run starts from."""
        file = first_run(earlier / "out")
        shutil.copytree(earlier / "out", earlier / "out-earlier-3", dirs_exist_ok=True)
        weights = earlier / "out-earlier-3" / "final"
        options = ("--checkpoint.keep_earlier", 2, "--initial_checkpoint_dir", weights)
        assert train("--config", file, *options) == 0
        left = {path.name.removeprefix("out-earlier-") for path in earlier.glob("out-earlier-*")}
        assert left == {"1", "3", "10", "11"}

    def test_those_that_cannot_be_deleted_are_named(self, earlier):
        """Such as a link to another disk."""
        (earlier / "out-earlier-2").rename(earlier / "disk")
        (earlier / "out-earlier-2").symlink_to(earlier / "disk")
        assert limit_earlier_runs(earlier / "out", 1, []) == (
            f"Deleted the oldest earlier runs (checkpoint.keep_earlier): {earlier / 'out-earlier-3'}\n"
            f"Could not delete the oldest earlier runs (checkpoint.keep_earlier): {earlier / 'out-earlier-2'}"
        )
        assert (earlier / "disk" / "metrics.csv").exists()


def test_attempts_to_write_are_tidied_up(tmp_path):
    """A run that was killed while it tried whether `out_dir` can be written to leaves a file."""
    (tmp_path / ".write-test-abc").touch()
    assert checkpoints.recover(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def launched_on(device: str, strategy: str, precision: str) -> SimpleNamespace:
    """What the checks of memory know of a run on two nodes of three processes, of which this one speaks alone."""
    plan = SimpleNamespace(config=moe_config(), train=SimpleNamespace(tie_embeddings=False))
    plan.settings = SimpleNamespace(distributed=DistributedArgs(), strategy=strategy)
    facts = facts_of(strategy)
    kind = SimpleNamespace(precision=SimpleNamespace(precision=precision), facts=facts)
    kind.made_on_cpu = None if facts.zero_stage is not None else False
    fabric = SimpleNamespace(device=torch.device(device), world_size=6, strategy=kind, print=print)
    fabric.all_reduce = lambda here, reduce_op: here
    return SimpleNamespace(plan=plan, fabric=fabric, devices=3)


class TestMemory:
    def test_a_model_that_cannot_fit(self, recipe, capsys):
        assert train("--config", recipe(model_config={"n_embd": 2**22})) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: model_config: ")
        assert "million parameters need at least, on each process: weights " in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        ("strategy", "precision", "least"),
        [
            # Bytes for each parameter, of six processes on two nodes.
            ("ddp", "32-true", 4 + 4),
            ("ddp", "bf16-mixed", 4 + 4),
            ("ddp", "bf16-true", 2 + 2),
            ("fsdp2", "32-true", (4 + 4) / 6),
            ("fsdp", "bf16-mixed", (4 + 4) / 3),
            ("deepspeed_stage_1", "bf16-mixed", 2 + 2),
            ("deepspeed_stage_2", "16-mixed", 2 + 2 / 6),
            ("deepspeed_stage_3", "32-true", (4 + 4) / 6),
        ],
    )
    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    def test_the_least_are_weights_and_gradients(self, monkeypatch, device, strategy, precision, least):
        """Of a device that is its own; three processes share the memory of a CPU."""
        launched = launched_on(device, strategy, precision)
        needed = math.ceil(count_parameters(launched.plan.config, False).total * least)
        present = SimpleNamespace(total_memory=needed)
        monkeypatch.setattr(memory, "memory_bytes", lambda: 3 * present.total_memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: present)
        memory.check_memory(launched)
        present.total_memory -= 1
        with pytest.raises(SettingsError, match=r"model_config: .* need at least"):
            memory.check_memory(launched)
        for knob in ("cpu_offload", "offload_optimizer", "offload_parameters") if device == "cuda" else ():
            launched.plan.settings.distributed = SimpleNamespace(**{**vars(DistributedArgs()), knob: True})
            memory.check_memory(launched)

    @pytest.mark.parametrize(
        ("strategy", "sizes"),
        [
            ("ddp", (4.0, 8.0, 16.0)),
            # ZeRO also keeps a copy of the weights in float32.
            ("deepspeed_stage_2", (2.0, 2.3, 4.3)),
        ],
    )
    def test_what_each_process_needs_in_words(self, monkeypatch, strategy, sizes):
        parts = ("weights", "weights, gradients", "weights, gradients and two averages of AdamW")
        said = "; ".join(f"{part} {size} GiB" for part, size in zip(parts, sizes, strict=True))
        monkeypatch.setattr(memory, "_parameters", lambda _launched: 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(total_memory=0))
        with pytest.raises(SettingsError, match=f"on each process: {said}; a cuda here has"):
            memory.check_memory(launched_on("cuda", strategy, "bf16-mixed"))

    @pytest.mark.parametrize("width", [2, 4])
    def test_a_model_too_large_for_a_device_is_made_elsewhere(self, monkeypatch, width):
        """Only to be sharded; a tenth of a device is left for CUDA and the first shards."""
        monkeypatch.setattr(memory, "_parameters", lambda _launched: 9 * 2**20)
        present = SimpleNamespace(total_memory=10 * 2**20 * width, host=27 * 2**20 * width)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: present)
        monkeypatch.setattr(memory, "memory_bytes", lambda: present.host)
        launched = launched_on("cuda", "fsdp2", "bf16-true" if width == 2 else "bf16-mixed")
        memory.choose_place(launched)
        assert launched.fabric.strategy.made_on_cpu is False
        present.total_memory -= 1
        present.host -= 1
        memory.choose_place(launched)
        assert launched.fabric.strategy.made_on_cpu is False, "there is no room elsewhere, and it may just fit"
        present.total_memory = 9 * 2**20 * width - 1
        with pytest.raises(SettingsError, match=r"^model_config: 9.4 million .* start fewer processes on each node"):
            memory.choose_place(launched)
        present.host += 1
        memory.choose_place(launched)
        assert launched.fabric.strategy.made_on_cpu is True
        memory.choose_place(launched_on("cpu", "fsdp2", "32-true"))

    def test_zero_makes_the_model_on_the_device(self, monkeypatch):
        monkeypatch.setattr(memory, "_parameters", lambda _launched: 2**20)
        present = SimpleNamespace(total_memory=4 * 2**20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: present)
        launched = launched_on("cuda", "deepspeed_stage_3", "bf16-mixed")
        memory.choose_place(launched)
        present.total_memory -= 1
        with pytest.raises(SettingsError, match="before strategy: deepspeed_stage_3 could shard them, .* use fsdp2"):
            memory.choose_place(launched)

    def test_all_processes_make_it_in_the_same_place(self, monkeypatch):
        """Their devices may differ."""
        monkeypatch.setattr(memory, "_parameters", lambda _launched: 1)
        present = SimpleNamespace(total_memory=2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: present)
        launched = launched_on("cuda", "fsdp2", "32-true")
        answers = [1.0, 4.0]  # the least room of a device of others, and of a CPU
        launched.fabric.all_reduce = lambda _here, reduce_op: answers.pop(0)
        memory.choose_place(launched)
        assert launched.fabric.strategy.made_on_cpu is True

    def test_a_machine_that_does_not_say_its_memory(self, monkeypatch):
        """As on Windows."""
        monkeypatch.setattr(memory, "memory_bytes", lambda: None)
        memory.check_memory(launched_on("cpu", "ddp", "32-true"))

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (torch.OutOfMemoryError("CUDA out of memory"), "error: process 3: out of memory: 0.0 million parameters"),
            (RuntimeError("of another kind"), ""),
        ],
    )
    def test_each_of_several_processes_explains_its_lack_of_memory_alone(self, capsys, error, said):
        launched = launched_on("cpu", "ddp", "32-true")
        launched.fabric.global_rank = 3
        with pytest.raises(type(error), match=str(error)), memory.explaining_lack_of_memory(launched):
            raise error
        assert capsys.readouterr().err[: len(said) or None] == said

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
        ],
    )
    def test_memory_that_runs_out(self, recipe, monkeypatch, capsys, error):
        import litgpt.pretrain

        def fit(**_kwargs):
            raise error

        monkeypatch.setattr(litgpt.pretrain, "fit", fit)
        assert train("--config", recipe()) == 1
        said = capsys.readouterr().err
        assert "Stopped: out of memory: 0.0 million parameters need at least" in said
        assert "Lower train.micro_batch_size" in said
