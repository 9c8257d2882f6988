"""Runs that share a machine: which device and how many threads each has, and what a page says of such runs."""

import csv
import io
import itertools
import os
import subprocess
import threading
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml
from litgpt.utils import save_config

from litgpt_moe_ext import __version__
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.inspect.runs.logs import TOKENS, RunLog
from litgpt_moe_ext.model_size import count_flops, count_parameters
from litgpt_moe_ext.software import code_version
from litgpt_moe_ext.study import launch, place
from litgpt_moe_ext.study.file import load_study
from litgpt_moe_ext.study.place import Places, TrainedOn
from litgpt_moe_ext.study.plan import BUDGET, Run, Study
from litgpt_moe_ext.study.report.page import COLUMNS, grouped, rows, study_page, verdicts
from litgpt_moe_ext.study.results import Result, csv_text, read_results
from litgpt_moe_ext.training.checkpoint.progress import Progress
from tests.models import moe_config
from tests.runs import PATIENCE

H100 = "NVIDIA H100"


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(place, "count_cores", lambda: 16)


@pytest.mark.parametrize(("places", "given", "number", "expected"), [
    (Places(4), {}, 0, {"OMP_NUM_THREADS": "4"}),
    (Places(4), {"OMP_NUM_THREADS": "2"}, 0, {"OMP_NUM_THREADS": "2"}),
    (Places(32), {}, 31, {"OMP_NUM_THREADS": "1"}),
    (Places(14, 1), {}, 13, {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}),
    (Places(4, 2), {}, 3, {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "1"}),
    (Places(4, 2), {"CUDA_VISIBLE_DEVICES": "5, GPU-7"}, 3, {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": "GPU-7"}),
    (Places(1, 1), {"CUDA_VISIBLE_DEVICES": "3"}, 0, {"OMP_NUM_THREADS": "16", "CUDA_VISIBLE_DEVICES": "3"}),
])  # fmt: skip
def test_each_place_has_its_device_and_its_share_of_the_cores(places, given, number, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", given)
    assert places.environment(number) == expected


@pytest.mark.parametrize(("places", "together"), [
    (Places(1), 1), (Places(16), 1), (Places(17), 2), (Places(8, 8), 1), (Places(14, 1), 14), (Places(3, 2), 2),
])  # fmt: skip
def test_how_many_runs_share_a_device(places, together):
    assert places.together == together


def test_a_finished_run_says_what_it_was_trained_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu: f"GPU {gpu}")
    trained_on = TrainedOn.here(Places(4, 2), 3)
    assert (trained_on.device, trained_on.together) == ("GPU 1", 2)
    assert TrainedOn.read({"trained_on": asdict(trained_on)}, None) == trained_on
    assert TrainedOn.read({"trained_on": asdict(trained_on)}, "bf16-true").precision == "bf16-true"
    assert TrainedOn.read({}, None) is None
    assert str(TrainedOn(H100, "bf16-mixed", 14)) == "NVIDIA H100, bf16-mixed, up to 14 runs at a time on a GPU"
    assert str(TrainedOn("CPU", "32-true", 1)) == "CPU, 32-true, each run alone on a core"


def test_the_commit_is_that_of_the_repository_that_tracks_the_package(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, "-C", tmp_path, *arguments], capture_output=True, check=True, text=True
        )

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    assert code_version(package) == __version__, "no repository"
    git("init", "-q")
    assert code_version(package) == __version__, "an installation in somebody's repository is not part of it"
    git("add", ".")
    assert code_version(package) == __version__, "nothing is committed yet"
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").stdout[:12]
    (tmp_path / "notes.txt").touch()
    assert code_version(package) == f"{__version__}, commit {commit}"
    (package / "more.py").touch()
    assert code_version(package) == f"{__version__}, commit {commit}+changes"
    monkeypatch.setenv("PATH", "")
    assert code_version(package) == __version__, "git is not installed"


@pytest.mark.parametrize(("second", "said"), [("0.1.0, commit a", False), ("0.1.0, commit b", True)])
def test_a_page_says_which_code_trained_its_runs(second, said, tmp_path):
    where = [TrainedOn("CPU", "32-true", 1, f"litgpt_moe_ext {code}") for code in ("0.1.0, commit a", second)]
    results = [result(tmp_path, f"arm {seed}", seed, 2.0, one) for seed, one in enumerate(where)]
    page = study_page(Study("<small>", "", [one.run for one in results]), results, (), "")
    assert "<small>" not in page
    assert f"Trained with litgpt_moe_ext 0.1.0, commit a: {1 if said else 2} run" in page
    assert "commit b: 1 run." in page or not said
    assert ("Not all runs were trained with the same code" in page) == said


def test_training_loss_stands_beside_that_of_the_validation(tmp_path):
    one = result(tmp_path, "arm", 1, 2.5, None)
    one.log.columns["loss"][:] = [3.0, 1.25]
    row = rows(Study("small", "", [one.run]), grouped([one]))[0]
    assert (row[COLUMNS.index("validation loss")], row[COLUMNS.index("training loss, end")]) == ("2.500", "1.250")


def test_a_page_names_the_best_point_of_each_arm(tmp_path):
    rates = {0.001: np.nan, 0.01: 2.0, 0.1: 2.25}
    results = []
    for (rate, loss), arm in itertools.product(rates.items(), ("many", "few")):
        one = result(tmp_path, arm, 1, loss if arm == "many" else loss + rate, None)
        run = replace(one.run, point={"size": "small", "optimizer.lr": rate})
        results.append(replace(one, run=run))
    study = Study("small", "", [one.run for one in results], searched=("optimizer.lr",))
    said = verdicts(study, results)
    assert "Lowest of 3 points: many, size small, lr 0.01, 2.000." in said
    assert "Lowest of 3 points: few, size small, lr 0.01, 2.010." in said
    assert study_page(study, results, (), "").count("<h2>Search</h2>") == 1


def test_runs_begin_together_and_one_has_all_cores(tmp_path, monkeypatch):
    """The corpus is locked while one of them prepares it."""
    study = tmp_path / "s.yaml"
    study.write_text(yaml.safe_dump({"seeds": [1, 2, 3]}))
    runs, threads, barrier = load_study(study).runs, [], threading.Barrier(3)

    def process(command, out_dir, environment, stopped):
        threads.append(environment["OMP_NUM_THREADS"])
        barrier.wait(timeout=PATIENCE)
        return 0

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launch, "_process", process)
    assert launch.train(runs, tmp_path, Places(8), say=lambda line: None).problems == []
    barrier = threading.Barrier(1)
    assert launch.train(runs[:1], tmp_path / "again", Places(8), say=lambda line: None).problems == []
    assert threads == ["5", "5", "5", "16"]


def result(tmp_path, arm, seed, loss, trained_on):
    tokens = np.array([100.0, 200.0])
    columns = {TOKENS: tokens, "loss": np.array([3.0, loss]), "val_loss": np.array([np.nan, loss]),
               "tokens_per_second": np.array([10.0, 10.0])}  # fmt: skip
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    return Result(Run(arm, {}, seed, recipe, {}), RunLog(arm, columns), 5, 30.0, 2.0, trained_on)


def test_what_a_run_reached(tmp_path):
    """Ten lines of a run; its end is the last fifth of them."""
    start = [np.nan] * 7
    columns = {
        "step": np.arange(10.0),
        TOKENS: 100.0 * np.arange(1, 11),
        "loss": np.arange(10.0, 0.0, -1.0),
        "val_loss": np.array([*start, 3.0, 2.5, 2.7]),
        "tokens_per_second": np.array([np.nan, 10.0, *[20.0] * 8]),
        "moe/max_vio": np.array([0.5, 0.05, 0.2, 0.1, *[0.05] * 6]),
        "moe_load_00/expert_00": np.array([*[2.0] * 8, 1.5, 0.7]),
        "moe_load_00/expert_01": np.array([*[0.0] * 8, 0.5, 1.3]),
        "moe_load_01/expert_00": np.full(10, 1.2),
        "moe_load_01/expert_01": np.full(10, 0.8),
    }
    (tmp_path / "recipe.yaml").write_text("{}")
    run = Run("a", {}, 1, tmp_path / "recipe.yaml", {})
    reached = Result(run, RunLog("a", columns), 5, 30.0, 2.0)
    assert (reached.val_loss, reached.train_loss, reached.tokens, reached.flops) == (2.7, 1.5, 1000, 30_000)
    assert reached.bits_per_byte == pytest.approx(2.7 / np.log(2) / 2)
    assert reached.seconds == pytest.approx(200 / 10 + 800 / 20)
    assert reached.curve("loss").seconds[0] == pytest.approx(100 / 10)
    assert (reached.late_max_vio, reached.even_after) == (pytest.approx(0.05), 400)
    assert reached.late_load_vio == pytest.approx(0.2), "the mean loads of the first layer are 1.1 and 0.9"


def test_steps_without_a_speed_take_as_long_as_those_beside_them(tmp_path):
    """The first lines have none yet, and the last step may have a line of its validation alone."""
    columns = {TOKENS: np.array([100.0, 200.0, 300.0, 400.0]), "val_loss": np.array([np.nan, np.nan, np.nan, 2.0])}
    columns["tokens_per_second"] = np.array([np.nan, 10.0, 20.0, np.nan])
    (tmp_path / "recipe.yaml").write_text("{}")
    reached = Result(Run("a", {}, 1, tmp_path / "recipe.yaml", {}), RunLog("a", columns), 5, 30.0, 2.0)
    assert reached.seconds == 200 / 10 + 100 / 20 + 100 / 20
    assert reached.curve("val_loss").seconds.tolist() == [reached.seconds]


def test_costs_are_those_of_the_checkpoint(tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    config, lengths = moe_config(), (16, 8)
    runs = [Run("a", {}, 1, tmp_path / "recipe.yaml", {"train.max_seq_length": length}) for length in lengths]
    for run, length in zip(runs, lengths, strict=True):
        final = tmp_path / run.key / "final"
        final.mkdir(parents=True)
        save_config(config, final)
        (final / "hyperparameters.yaml").write_text(f"train: {{max_seq_length: {length}}}")
        (final.parent / "finished.json").write_text("{}")
        (final.parent / "metrics-wide.csv").write_text("step,total_tokens,loss\n1,100,3.0\n")
    for reached, length in zip(read_results(runs, tmp_path), lengths, strict=True):
        assert reached.parameters == count_parameters(config).active
        assert reached.flops_per_token == count_flops(config, length, training=True) / length


_TABLE = "step,total_tokens,loss,val_loss\n2,200,3.0,2.9\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("finished.json", "", "finished.json is damaged"),
        ("finished.json", '{"trained_on": {"a": 1}}', "finished.json is damaged"),
        ("final/model_config.yaml", None, "must have a model_config.yaml"),
        ("final/hyperparameters.yaml", None, "hyperparameters.yaml is missing"),
        ("metrics-wide.csv", None, "with metrics-wide.csv"),
        ("metrics-wide.csv", f"{_TABLE}4,400,2.5,", "metrics-wide.csv has validations to step 2 only, of 4"),
        ("metrics-wide.csv", f"{_TABLE}4,400,2.5,1", "metrics-wide.csv has validations to step 2 only, of 4"),
    ],
)
def test_a_finished_run_that_was_changed_is_named_with_its_remedy(file, content, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text("{}")
    run = Run("a", {}, 1, tmp_path / "recipe.yaml", {})
    folder = tmp_path / run.key
    (folder / "final").mkdir(parents=True)
    save_config(moe_config(), folder / "final")
    (folder / "final" / "hyperparameters.yaml").write_text("{}")
    Progress(1, 4, 4, 1, 0.0).write(folder / "final")
    (folder / "finished.json").write_text("{}")
    (folder / "metrics-wide.csv").write_text(f"{_TABLE}4,400,2.5,2.4\n")
    assert [result.val_loss for result in read_results([run], tmp_path)] == [2.4]
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(
        SettingsError, match=f"^study: {folder} is a finished .*{message}.*; remove it to train it again$"
    ):
        read_results([run], tmp_path)


def test_a_family_of_budgets_gives_a_multiplier(tmp_path):
    """The MoE reaches the loss of 1.3 times its compute; time counts for the largest runs alone."""
    results = []
    for (arm, gain, *ends), size in itertools.product((("moe", 1.3, 0.1, 2.5), ("dense", 1.0, 9.0, 2.0)), (1, 2)):
        one = result(tmp_path, arm, 1, ends[size - 1], None)
        one.log.columns[TOKENS] *= size
        one.log.columns["val_loss"][-1] = 10 * (gain * one.flops) ** -0.1
        results.append(replace(one, run=replace(one.run, point={BUDGET: size})))
    said = verdicts(Study("s", "", [one.run for one in results], {"moe": "moe", "dense": "dense"}), results)
    assert said[0].startswith("Compute multiplier 1.30 (1.30 to 1.30): the dense family needs")
    assert said[1].startswith("In seconds, the MoE is never ahead within the run")


def page_of(tmp_path, trained_on):
    results = [result(tmp_path, "experts, many", 1, 2.0, trained_on), result(tmp_path, "dense", 1, 2.5, trained_on)]
    study = Study("small", "Which?", [one.run for one in results], {"moe": "experts, many", "dense": "dense"})
    seconds = [row[COLUMNS.index("seconds")] for row in rows(study, grouped(results))]
    return study_page(study, results, (), "litgpt-moe study"), verdicts(study, results), seconds, csv_text(results)


def test_runs_that_shared_a_gpu_are_no_evidence_about_seconds(tmp_path):
    page, said, seconds, text = page_of(tmp_path, TrainedOn(H100, "bf16-mixed", 14))
    assert said == []
    assert seconds == ["-", "-"]
    whole = '<span class="whole">bf16-mixed,</span>'  # not broken after the hyphen
    assert f"Trained on: NVIDIA H100, {whole} up to 14 runs at a time on a GPU." in page
    assert "shared a device" in page
    line = list(csv.DictReader(io.StringIO(text)))[0]
    assert (line["arm"], line["trained_on"]) == ("experts, many", str(TrainedOn(H100, "bf16-mixed", 14)))


@pytest.mark.parametrize("trained_on", [TrainedOn(H100, "bf16-mixed", 1), None])
def test_a_run_that_was_alone_is_timed_and_every_cell_stands_under_its_head(trained_on, tmp_path):
    page, said, seconds, text = page_of(tmp_path, trained_on)
    assert said == ["In seconds, the MoE is ahead from 10 s on (training loss, on the machine that trained both)."]
    assert seconds == ["20", "20"]
    assert "shared a device" not in page
    assert ("Trained on" in page) == (trained_on is not None)
    assert page.count(">experts, many</td>") == 2, "the table of arms and that of runs"
