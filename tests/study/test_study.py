"""A study: which runs it has, how they survive a SIGKILL, what their numbers say."""

import csv
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from litgpt import Config

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.cli.settings import litgpt_types, read_given
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files.lock import ProcessLock
from litgpt_moe_ext.inspect.runs.logs import RunLog
from litgpt_moe_ext.software import code_version
from litgpt_moe_ext.study import launch
from litgpt_moe_ext.study.file import load_study
from litgpt_moe_ext.study.place import Places
from litgpt_moe_ext.study.plan import BUDGET, Run, Study
from litgpt_moe_ext.study.report.analysis import (
    Interval,
    break_even,
    compute_multiplier,
    differences,
    first_below,
    mean_interval,
)
from litgpt_moe_ext.study.report.compare import compared, comparison, grouped, signed_interval
from litgpt_moe_ext.study.report.figures import balance_figure, loss_figure, search_figure, smooth
from litgpt_moe_ext.study.report.page import COLUMNS, rows, study_page, verdicts
from litgpt_moe_ext.study.results import MAX_VIO, Result
from litgpt_moe_ext.study.search import best_in_words, best_points, searched_points
from tests.runs import ROOT, run_command
from tests.settings import read_settings
from tests.subsets import soon

STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def write(path: Path, **content) -> Path:
    path.write_text(yaml.safe_dump({"seeds": [1, 2], **content}, sort_keys=False), encoding="utf-8")
    return path


def test_runs_are_arms_times_grid_times_seeds(tmp_path):
    arms = {"a": None, "b": {"train.max_norm": 2.0, "progress": False, "sample.prompts": ["a b"]}}
    study = load_study(write(tmp_path / "s.yaml", arms=arms, grid={"train.max_tokens": [10, 20]}))
    assert len(study.runs) == len({run.key for run in study.runs}) == 8
    assert study.runs[0].title == "a, max_tokens 10, seed 1"
    flags = study.runs[1].flags(Path("x"))
    assert {"--train.max_norm=2.0", "--train.max_tokens=10", "--seed=1", "--out_dir=x", "--resume=auto"} < set(flags)
    assert {"--progress=false", '--sample.prompts=["a b"]'} < set(flags)
    again = load_study(write(tmp_path / "t.yaml", arms={"c": arms["b"]}, grid={"train.max_tokens": [10]}))
    assert again.runs[0].key == study.runs[1].key, "equal settings are the same run, whatever the arm is called"
    (tmp_path / "plain.yaml").write_text("question: How good is the quickstart?")
    assert [run.title for run in load_study(tmp_path / "plain.yaml").runs] == [f"recipe, seed {i}" for i in (1, 2, 3)]


def test_another_recipe_of_the_same_name_makes_another_run(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    study = write(tmp_path / "s.yaml", recipe="recipe.yaml", arms={"a": {}})
    before = load_study(study).runs[0].key
    recipe.write_text(f"{recipe.read_text()}\nseed: 7\n")
    assert load_study(study).runs[0].key != before


def test_a_value_of_the_grid_may_be_settings_under_a_name(tmp_path):
    sizes = {"small": {}, "large": {"model_config.n_embd": 256, "model_config.n_layer": 6}}
    runs = load_study(
        write(tmp_path / "s.yaml", seeds=[1], grid={"size": sizes}, settings={"model_config.n_layer": 2})
    ).runs
    assert [(run.title, run.settings) for run in runs] == [
        ("recipe, size small, seed 1", {"model_config.n_layer": 2}),
        ("recipe, size large, seed 1", sizes["large"]),
    ]


def test_a_search_spreads_its_points_and_more_of_them_repeat_none(tmp_path):
    lr, layers, scores = {"low": 1e-3, "high": 1.0, "log": True}, {"low": 2, "high": 9}, ["sigmoid", "softmax"]
    search = {"optimizer.lr": lr, "model_config.n_layer": layers, "model_config.router_score_function": scores}
    few, many = (
        load_study(write(tmp_path / f"{points}.yaml", seeds=[1], search={"points": points, **search}))
        for points in (10, 30)
    )
    assert [run.key for run in few.runs] == [run.key for run in many.runs[:10]]
    assert many.searched == tuple(search)
    rates, depths, functions = ([run.settings[name] for run in many.runs] for name in search)
    for low in (1e-3, 1e-2, 1e-1):
        assert 8 <= sum(low <= rate < 10 * low for rate in rates) <= 12, "a third in each of three magnitudes"
    assert set(depths) == set(range(2, 10))
    assert all(isinstance(depth, int) for depth in depths)
    assert {functions.count(name) for name in scores} <= {13, 14, 15, 16, 17}
    assert few.runs[0].title == "recipe, lr 0.0316, n_layer 4, router_score_function sigmoid, seed 1"


def test_a_range_is_of_whole_numbers_where_both_ends_are(tmp_path):
    fractions = [2.0, 1.5, 2.5]
    for low, high, log, values in (
        *((1, 3, False, [2, 1, 3]), (1, 3.0, False, fractions), (1.0, 3, False, fractions)),
        *((1, 100, True, [10, 3, 32]), (1, 100.0, True, [10.0, 3.16, 31.6])),
    ):
        search = {"points": 3, "train.max_norm": {"low": low, "high": high, "log": log}}
        runs = load_study(write(tmp_path / "s.yaml", seeds=[1], search=search)).runs
        assert [run.settings["train.max_norm"] for run in runs] == values


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0.99013, 0.99987, False), (0.99013, 0.99987, True), (1000.137, 1000.9, False), (-0.12349, -0.1234, False)],
)
def test_points_of_a_narrow_range_are_different_and_in_it(low, high, log):
    """As of the decay of an average, which must be below 1."""
    search = {"points": 2000, "ema.decay": {"low": low, "high": high, "log": log}}
    found = [point["ema.decay"] for point in searched_points(search)]
    assert len(set(found[:50])) == 50
    assert low <= min(found) <= max(found) <= high
    if low == 0.99013:
        assert found[:3] == [0.995, 0.9926, 0.9974]


def test_a_search_of_few_values_trains_each_once(tmp_path):
    search = {"points": 9, "model_config.n_layer": {"low": 1, "high": 2}}
    runs = load_study(write(tmp_path / "s.yaml", search=search)).runs
    assert [run.title for run in runs] == [
        f"recipe, n_layer {layers}, seed {seed}" for layers in (2, 1) for seed in (1, 2)
    ]


@pytest.mark.parametrize(("content", "message"), [
    ({"arm": {}}, "has the key arm"),
    ({"seeds": 3}, "seeds: 3 must be a list"),
    ({"grid": {"seed": 3}}, "grid.seed: 3 must be a list"),
    ({"grid": {"size": {"large": 3}}}, "grid.size: .* settings by name"),
    ({"grid": {"size": {"small": {}, "large": 3}}}, "grid.size: .* settings by name"),
    ({"search": {"optimizer.lr": [1]}}, "search.points: None must be the number of points, from 1 to 10000"),
    ({"search": {"points": 10**19, "optimizer.lr": [1]}}, "search.points: 10000000000000000000 must be the number"),
    ({"search": {"points": 2}}, "must have 1 to 6 settings to search"),
    ({"search": {"points": 2, "a.b": {"low": 1, "high": 10**400}}}, "search.a.b: .* must have numbers .* below 2.*63"),
    ({"search": {"points": 2, "a.b": {"low": 1.0, "high": float("inf")}}}, "search.a.b: .* must have numbers low"),
    ({"arms": {"a": {"log.name": b"bytes"}}}, "line 6 gives arms.a.log.name as !!binary; write a plain value"),
    ({"settings": {"log.name": {"a"}}}, "gives settings.log.name as !!set; write a plain value"),
    ({"search": {"points": 2, "a.b": 3}}, "search.a.b: 3 must be"),
    ({"search": {"points": 2, "a.b": {"low": 1, "hi": 2}}}, "search.a.b: .* must be {low: 1, high: 9"),
    ({"search": {"points": 2, "a.b": {"low": 1, "high": 2, "step": 1}}}, "search.a.b: .* must be {low: 1, high: 9"),
    ({"search": {"points": 2, "a.b": {"low": "little", "high": 1}}}, "must have numbers low < high"),
    ({"search": {"points": 2, "a.b": {"low": 0, "high": 1, "log": True}}}, "above 0 where log is true"),
    ({"search": {"points": 2, "a.b": {"low": 1, "high": 2, "log": "no"}}}, "a.b.log: 'no' must be true or false"),
    ({"arms": {"a": 3}}, "arms.a: 3 must hold settings"),
    ({"arms": {"a": {"seed": 3}}}, "arms.a: seed would have no effect: seeds has those of all runs; leave it out"),
    ({"grid": {"seed": [1, 2]}}, "grid.seed: seed would have no effect"),
    ({"grid": {"where": {"here": {"out_dir": "here"}}}}, "grid.where: out_dir would have no effect: each run has a"),
    ({"settings": {"resume": False}}, "settings: resume would have no effect: each run goes on by itself"),
    ({"search": {"points": 2, "seed": [1, 2]}}, "search: seed would have no effect"),
    ({"arms": {"a": {}}, "compare": {"moe": "a", "dense": "b"}}, "must name two arms"),
    ({"arms": {"a": {}}, "control": "b"}, "control: b must be one of the arms: a"),
    ({"arms": {"a": {}}, "control": ["a"]}, "control: .* must be one of the arms: a"),
    ({"arms": {"a": {}}, "compare": {"moe": ["a"], "dense": "a"}}, "must name two arms"),
    ({"recipe": "nothing"}, "recipe: 'nothing' must be"),
    ({"seeds": [1, 2, 1]}, "seeds, grid: 'recipe, seed 1' occurs twice"),
    ({"grid": {"optimizer.lr": [0.001, 0.002, 0.001]}}, "'recipe, lr 0.001, seed 1' occurs twice"),
    ({"arms": {"a": {}, "b": {}}}, "'a, seed 1' and 'b, seed 1' have the same settings; leave out one"),
    ({"arms": {"a": {}}, "compare": {"moe": "a", "dense": "a"}}, "must name two arms"),
    (
        {"arms": {"a": {}, "b": {"train.max_tokens": 30}}, "grid": {"train.max_tokens": [10, 20]}},
        "arms.b: train.max_tokens would replace that of grid.train.max_tokens; leave it out of one of them",
    ),
    (
        {"arms": {"a": {"optimizer": {"lr": 0.1}}}, "search": {"points": 2, "optimizer.init_args.lr": [1, 2]}},
        "arms.a: optimizer.lr would replace that of search",
    ),
    (
        {"grid": {"size": {"s": {}, "l": {"train.max_tokens": 20}}, "train.max_tokens": [10, 20]}},
        "grid.train.max_tokens: train.max_tokens would replace that of grid.size",
    ),
    (
        {"arms": {"a": {}, "b": {"optimizer": {"class_path": "SGD"}}}, "grid": {"optimizer.lr": [0.1, 0.2]}},
        "arms.b: optimizer would replace that of grid.optimizer.lr",
    ),
    (
        {
            "arms": {"a": {}, "b": {"optimizer.lr": 0.3}},
            "grid": {"optimizer": [{"class_path": "SGD", "init_args": {"lr": lr}} for lr in (0.1, 0.2)]},
        },
        "arms.b: optimizer.lr would replace that of grid.optimizer",
    ),
])  # fmt: skip
def test_a_wrong_study_is_refused(content, message, tmp_path):
    with pytest.raises(SettingsError, match=message):
        load_study(write(tmp_path / "s.yaml", **content))


def test_settings_may_be_nested_as_in_a_recipe(tmp_path):
    data = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": {"data_path": "x"}}
    nested = {"train": {"max_tokens": 10}, "model_config": {"rope_adjustments": {"factor": 4.0}}, "data": data}
    nested |= {"optimizer.betas": {"one": 1}}  # under a dotted name, one value
    named = {"train.max_tokens": 10, "model_config.rope_adjustments.factor": 4.0, "data": data}
    named |= {"optimizer.betas": {"one": 1}}
    sizes = {"grid": {"size": {"s": {"train": {"max_norm": 1.0}}}}, "settings": {"eval": {"interval": 3}}}
    run = load_study(write(tmp_path / "s.yaml", seeds=[1], arms={"a": nested}, **sizes)).runs[0]
    assert run.settings == named | {"train.max_norm": 1.0, "eval.interval": 3}


def test_arms_may_set_what_a_class_of_the_grid_leaves_open(tmp_path):
    grid = {"optimizer": [{"class_path": "SGD"}, {"class_path": "AdamW"}]}
    runs = load_study(write(tmp_path / "s.yaml", seeds=[1], arms={"a": {"optimizer.lr": 0.1}}, grid=grid)).runs
    assert [run.settings["optimizer.lr"] for run in runs] == [0.1, 0.1]


def test_a_study_or_scale_that_is_named_alone_is_refused_with_its_path(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SettingsError, match=r"study: 'pays' .* did you mean studies/pays.yaml"):
        load_study(Path("pays"))
    with pytest.raises(SettingsError, match=r"scale: '60m' .* did you mean studies/scale/60m.yaml"):
        load_study(STUDIES[0], Path("60m"))


@pytest.mark.parametrize("path", soon(STUDIES, ("pays", "router"), lambda path: path.stem), ids=lambda path: path.stem)
def test_runs_of_the_shipped_studies_are_valid(path):
    study = load_study(path)
    assert study.question
    for run in {run.arm: run for run in study.runs}.values():
        settings = read_settings(run.flags(Path("x")))
        assert settings.seed == run.seed


@pytest.mark.parametrize(("scale", "budgets", "budget", "width"), [
    ("60m", {2**23, 2**24, 2**25}, 2**24, {512}),
    pytest.param("200m", {2**23, 2**24, 2**25}, 2**24, {768}, marks=pytest.mark.slow),
    pytest.param("long", {2880 * 1536, 2880 * 3072}, 2880 * 1536, {64, 128}, marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.slow
def test_shipped_scales_make_every_study_but_that_of_shapes_larger(scale, budgets, budget, width):
    budget_of, widths, known = {}, set(), litgpt_types()
    for study in [study for study in STUDIES if study.stem not in ("shape", "carried_rate")]:
        plan = load_study(study, ROOT / "studies" / "scale" / f"{scale}.yaml")
        assert plan.name == f"{study.stem}-{scale}"
        read_settings(plan.runs[0].flags(Path("x")))
        for run in {run.arm: run for run in plan.runs}.values():  # the arms' settings are valid; do they fit the scale?
            model = read_given(run.flags(Path("x")), run.recipe, known).tree["model_config"]
            widths.add(Config(**model).n_embd)
        budget_of[study.stem] = {run.settings["train.max_tokens"] for run in plan.runs}
    assert widths == width  # `long` trains the models of the studies themselves for longer
    assert budget_of["pays"] == budgets
    assert budget_of["router"] == {budget}


def test_the_whole_budget_is_that_of_the_quickstart():
    quickstart = read_settings(["--config", str(ROOT / "configs" / "quickstart.yaml")]).train
    for study, (scale, part) in itertools.product(STUDIES, {"whole": 1, "half": 2}.items()):
        if study.stem not in ("pays", "balance", "carried_rate"):
            plan = load_study(study, ROOT / "studies" / "scale" / f"{scale}.yaml")
            train = read_settings(plan.runs[0].flags(Path("x"))).train
            expected = (quickstart.max_tokens // part, quickstart.lr_warmup_steps)
            assert (train.max_tokens, train.lr_warmup_steps) == expected


def test_a_scale_changes_settings_and_the_values_of_the_grid(tmp_path):
    study = write(
        tmp_path / "s.yaml",
        seeds=[1],
        settings={"a.b": 1},
        arms={"arm": {"a.b": 3}, "plain": {}},
        grid={"train.max_tokens": [10, 20]},
    )
    scale = tmp_path / "big.yaml"
    scale.write_text("settings: {a: {b: 2}, c: 4}\ngrid: {train.max_tokens: [30], unknown: [1]}\n")
    runs = load_study(study, scale).runs
    assert [(run.arm, run.point, run.settings["a.b"], run.settings["c"]) for run in runs] == [
        ("arm", {"train.max_tokens": 30}, 3, 4),
        ("plain", {"train.max_tokens": 30}, 2, 4),
    ]
    with pytest.raises(SettingsError, match="scale: .* has the key seeds; known are settings, grid"):
        load_study(study, study)


def test_a_wrong_setting_of_any_arm_or_point_is_refused_before_a_run_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "_process", None)
    arms = {"right": {}, "wrong": {"model_config.n_exprt": 2}}
    study = write(tmp_path / "s.yaml", arms=arms)
    assert main(["study", str(study), "--out_dir", str(tmp_path / "out")]) == 2
    assert "error: wrong: model_config.n_exprt: no setting has this name" in capsys.readouterr().err
    study = write(tmp_path / "s.yaml", grid={"train.max_norm": [1.0, "much"]})
    assert main(["study", str(study), "--slurm", str(tmp_path / "array.sh")]) == 2
    assert "error: recipe, max_norm much: train.max_norm: 'much' must be" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [
    {"data": {"class_path": "PythonStdlib", "init_args": {"val_fraction": 7}}},
    {"train": {"max_tokens": 7}},
], ids=["parsed", "together"])  # fmt: skip
def test_a_wrong_setting_of_the_recipe_is_named_with_its_line(changes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "_process", None)
    recipe = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text()) | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = write(tmp_path / "s.yaml", seeds=[1], recipe="recipe.yaml")
    assert main(["study", str(study), "--out_dir", str(tmp_path / "out")]) == 2
    assert re.search(r"^error: recipe: (data|train)\..*: 7 .*\(.*recipe\.yaml:\d+\)$", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(("content", "message"), [
    ({"grid": {"train.max_tokens": [81920, 1000]}}, "recipe, max_tokens 1000: train.max_tokens: 1000 must be"),
    ({"settings": {"train.max_tokens": 4096}}, "train.log_interval: 10 must be at most the 2 steps of the run"),
    ({"settings": {"eval.final_validation": False, "eval.interval": 2000}}, "eval.final_validation: false must be"),
])  # fmt: skip
def test_a_run_that_would_leave_nothing_to_compare_is_refused(content, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "_process", None)
    study = write(tmp_path / "s.yaml", seeds=[1], recipe=str(ROOT / "configs" / "quickstart.yaml"), **content)
    assert main(["study", str(study), "--out_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("judge", [{}, {"eval.final_validation": False, "eval.interval": 10}], ids=["log", "eval"])
def test_one_line_and_one_validation_can_be_compared(judge, tmp_path):
    """Of ten steps, the last of which has them."""
    settings = {"train.max_tokens": 10 * 2048, **judge}
    recipe = str(ROOT / "configs" / "quickstart.yaml")
    launch.check(load_study(write(tmp_path / "s.yaml", seeds=[1], recipe=recipe, settings=settings)).runs)


def test_shipped_studies_name_no_place_of_one_machine():
    for file in (ROOT / "studies").rglob("*.yaml"):
        assert not re.search(r"^ .*(python3\.|: /)", file.read_text(encoding="utf-8"), re.M), file


@pytest.mark.parametrize("gpus", [0, 2])
def test_slurm_array_has_a_task_for_every_run(gpus, tmp_path, monkeypatch, capsys):
    """Each with a GPU; how to ask for one is said where the script is written on a machine without."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    script, study = tmp_path / "an array.sh", ROOT / "studies" / "qk_norm.yaml"
    assert main(["study", str(study), "--slurm", str(script)]) == 0
    assert f"#SBATCH --array=0-{len(load_study(study).runs) - 1}\n" in script.read_text()
    assert "\nsrun litgpt-moe study" in script.read_text(), "SLURM signals what srun started, and nothing beside it"
    assert '--only "$SLURM_ARRAY_TASK_ID"' in script.read_text()
    assert re.findall(r"#SBATCH --gres=(.*)", script.read_text()) == (["gpu:1"] if gpus else [])
    assert (f"`sbatch --gres=gpu:1 '{script}'`" in capsys.readouterr().out) == (not gpus)


def test_no_run_is_repeated_and_a_failed_one_is_tried_again(tmp_path, monkeypatch):
    calls = []

    def process(command, log, environment, stopped):
        calls.append(command[-1])
        with log.open("a") as output:
            output.write(f"step 1\nerror: fault {len(calls)}\n" if len(calls) == 2 else "")
        return {2: 1, 4: -signal.SIGKILL}.get(len(calls), 0)

    monkeypatch.setattr(launch, "_process", process)
    runs = load_study(write(tmp_path / "s.yaml", seeds=[1, 2, 3])).runs
    said = []
    (problem,) = launch.train(runs, tmp_path, Places(), say=said.append).problems
    assert "ended with status 1, saying 'error: fault 2'; see" in problem
    assert (len(calls), len(said)) == (3, 3)
    left = launch.unfinished([runs[1]], tmp_path) + launch.unfinished([runs[1]], tmp_path / "another")
    assert left == [f"{runs[1].title}: not finished, saying 'error: fault 2'", f"{runs[1].title}: not begun"]
    (problem,) = launch.train(runs, tmp_path, Places(), say=said.append).problems
    assert "was ended by SIGKILL, having said nothing, with " in problem, "what it says is not the last run's"
    assert launch.train(runs, tmp_path, Places(), 3600, said.append) == ([], 0)
    assert len(calls) == 5
    late = launch.train(load_study(STUDIES[0]).runs[:1], tmp_path, Places(), 0, said.append)
    assert "out of time" in late.problems[0]


def test_what_a_run_said_when_it_was_tried_before_is_kept(tmp_path):
    for word in ("first", "second"):
        command = [sys.executable, "-c", f"print({word!r})"]
        assert launch._process(command, tmp_path / "output.txt", dict(os.environ), lambda: "") == 0
    assert (tmp_path / "output.txt").read_text().split() == ["first", "second"]


def test_two_studies_share_the_runs(tmp_path, monkeypatch):
    """What the other trains is left to it, and what it has finished meanwhile is not trained again."""
    runs, trained = load_study(write(tmp_path / "s.yaml", seeds=[1, 2, 3])).runs, []

    def process(command, log, environment, stopped):
        trained.append(log.parent.name)
        (tmp_path / runs[2].key).mkdir(exist_ok=True)
        (tmp_path / runs[2].key / launch.FINISHED).touch()
        return 0

    monkeypatch.setattr(launch, "_process", process)
    (tmp_path / runs[0].key).mkdir()
    other = ProcessLock(tmp_path / runs[0].key / ".study.lock")
    assert other.take() is None
    (problem,) = launch.train(runs, tmp_path, Places(), say=lambda line: None).problems
    assert problem.startswith(f"{runs[0].title}: is trained by another study, process {os.getpid()} on ")
    assert trained == [runs[1].key]
    other.release()
    assert launch.train(runs, tmp_path, Places(), say=lambda line: None) == ([], 0)
    assert trained == [runs[1].key, runs[0].key]
    assert not list(tmp_path.rglob(".study.lock*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_runs_save_and_none_begins(number, tmp_path, monkeypatch):
    monkeypatch.setattr(
        launch,
        "_TRAIN",
        (
            "-c",
            f"""
import os, pathlib, signal, sys, time
def save(*_):
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
os.kill({os.getpid()}, {int(number)})
time.sleep(30)
""",
        ),
    )
    runs = load_study(write(tmp_path / "s.yaml", seeds=[1, 2])).runs
    problems, received = launch.train(runs, tmp_path, Places(), say=lambda line: None)
    assert received == number
    assert (tmp_path / "saved").is_file()
    assert f"stopped, {number.name}; the same command goes on" in problems[0]
    assert f"Not begun, {number.name}: 1 run; " in problems[1]


def test_interval_is_students():
    # scipy.stats.t.ppf(0.975, 2) = 4.302653
    value, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (value, low, high) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert np.isnan(mean_interval([1.0]).low)


def test_difference_of_two_arms_is_that_of_the_paired_t_test():
    control, arm = {1: 4.0, 2: 5.0, 3: 6.5}, {3: 6.0, 1: 3.8, 2: 4.9}
    known = mean_interval([-0.2, -0.1, -0.5])
    found = differences({"arm": arm, "control": control}, "control")
    assert found == {"arm": pytest.approx(known)}
    assert differences({"arm": {**arm, 4: 9.0}, "control": {**control, 7: 1.0}}, "control") == {
        "arm": pytest.approx(known)  # a seed that only one has says nothing of the difference
    }


def test_differences_take_the_noise_from_all_arms():
    # Seeds 1 and 2 differ by 1. Residuals are 0.05 in a and the control, 0 in b; at 2 degrees of freedom the quantile
    # of t is 4.302653: half widths are 4.302653 * sqrt(4 * 0.05^2 / 2) * sqrt(2 / 2).
    arms = {"control": {1: 4.05, 2: 4.95}, "a": {1: 4.15, 2: 5.25}, "b": {1: 3.0, 2: 4.0}}
    half = 4.302653 * (4 * 0.05**2 / 2) ** 0.5
    found = differences(arms, "control")
    assert found["a"] == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert found["b"] == pytest.approx((-1.0, -1.0 - half, -1.0 + half))
    wider = differences(arms, "control", 0.975)["a"]
    assert wider.high - wider.value == pytest.approx(6.205347 * half / 4.302653)  # t.ppf(0.9875, 2)


def test_differences_need_a_seed_in_common_and_one_to_spare():
    assert differences({"a": {2: 1.0}, "control": {1: 4.0}}, "control") == {}
    assert differences({"a": {1: 1.0}}, "control") == {}
    value, low, high = differences({"a": {1: 3.0}, "control": {1: 4.0}}, "control")["a"]
    assert value == pytest.approx(-1)
    assert np.isnan(low)
    assert np.isnan(high)
    assert signed_interval(Interval(value, low, high), 2) == "-1.00"
    assert signed_interval(Interval(value, -1.5, 0.5), 2) == "-1.00 (-1.50 to +0.50)"


def test_compute_multiplier_of_a_known_power_law():
    budgets = [1e12, 2e12, 4e12]
    dense = [(c, 10 * c**-0.1) for c in budgets]
    moe = [(c, 10 * (1.3 * c) ** -0.1) for c in budgets]
    assert compute_multiplier(dense, moe) == pytest.approx((1.3, 1.3, 1.3))
    noisy = [(c, loss * (1 + 0.01 * (-1) ** i)) for i, (c, loss) in enumerate(moe * 3)]
    found = compute_multiplier(dense, noisy)
    assert found.low < 1.3 < found.high
    with pytest.raises(ValueError, match="two budgets"):
        compute_multiplier(dense[:1], moe)
    with pytest.raises(ValueError, match="falls with compute"):
        compute_multiplier([(1, 1.0), (2, 2.0)], moe)


def reached(arm: str, place: int, seed: int, loss: float) -> SimpleNamespace:
    """What a run reached, as far as the comparison with the control looks at it."""
    run = SimpleNamespace(arm=arm, label=f"{arm} {place}", point={"place": place}, seed=seed)
    return SimpleNamespace(run=run, val_loss=loss)


def test_all_intervals_together_are_wider_than_one_alone():
    """By Bonferroni, of two differences with 2 degrees of freedom; an arm meets the control at its own place."""
    from scipy.stats import t

    losses = {("control", 0): (3.0, 3.1), ("control", 1): (5.0, 5.2), ("a", 0): (3.2, 3.31), ("a", 1): (5.4, 5.62)}
    results = [reached(*where, seed, loss) for where, pair in losses.items() for seed, loss in enumerate(pair)]
    results += [reached("a", 0, 2, float("nan")), reached("control", 0, 2, 3.2)]  # one of which came to nothing
    found = compared(SimpleNamespace(control="control"), grouped(results))
    assert [difference.pairs for difference in found.values()] == [
        pytest.approx([0.2, 0.21]),
        pytest.approx([0.4, 0.42]),
    ]
    for difference in found.values():
        alone, together = (interval.high - interval.value for interval in (difference.alone, difference.together))
        assert together / alone == pytest.approx(t.ppf(1 - 0.025 / 2, 2) / t.ppf(0.975, 2))


def test_words_say_which_arms_differ_beyond_chance():
    losses = {
        "control": (3.0, 3.1, 3.2),
        "better": (2.5, 2.7, 2.7),
        "weak": (2.87, 2.95, 3.11),  # by 0.12, where an interval is 0.11 wide to each side alone, 0.15 with the others
        "worse": (3.6, 3.6, 3.8),
        "alike": (3.05, 3.1, 3.1),
    }

    def said(*arms):
        results = [reached(arm, 0, seed, loss) for arm in arms for seed, loss in enumerate(losses[arm])]
        return " ".join(comparison(SimpleNamespace(control="control"), grouped(results)))

    words = said(*losses)
    assert "Beyond chance, all 4 comparisons taken together: better 0; worse 0." in words
    assert words.endswith("Beyond chance if it were the only comparison: weak 0.")
    assert said("control", "alike").endswith("Beyond chance: no.")
    assert said("control", "worse").endswith("Beyond chance: worse 0.")
    assert not said("control"), "there is nothing to compare"


def test_balance_is_drawn_as_far_as_all_seeds_of_an_arm_went():
    def run(tokens, values):
        log = {"total_tokens": np.array(tokens, float), MAX_VIO: np.array(values, float)}
        return SimpleNamespace(log=RunLog("run", log))

    dense = SimpleNamespace(log=RunLog("dense", {"total_tokens": np.array([1.0])}))
    moe = [run([1, 2, 3], [0.4, np.nan, 0.2]), run([1, 3, 5], [0.6, 0.4, 0.1])]
    axes = balance_figure({"dense": [dense], "moe": moe}).axes[0]
    drawn = [line for line in axes.lines if len(line.get_xdata()) and line.get_linestyle() == "-"]
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn] == [([1, 3], [0.5, pytest.approx(0.3)])]
    assert drawn[0].get_color() == "C1", "an arm has the same colour in every picture"


def test_a_point_that_came_to_nothing_is_not_the_best():
    @dataclass(frozen=True)
    class Point:
        point: dict[str, float]
        label: str = "arm"

    groups = {
        str(rate): [SimpleNamespace(run=Point({"rate": rate}), val_loss=loss) for loss in losses]
        for rate, losses in ((1, (2.0, float("nan"))), (2, (3.0,)), (3, (2.0, 3.0)))
    }
    assert list(best_points(["rate"], groups)) == ["3"]
    assert best_in_words(["rate"], groups)[0] == "Lowest of 3 points: 3, 2.500."


@pytest.mark.parametrize("searched", [(), ("lr",)])
@pytest.mark.parametrize("lost", soon([1, 2, 8], [8]))
def test_runs_that_came_to_nothing_are_on_the_page(searched, lost):
    """Their losses are infinite in the log."""
    places = [(arm, rate, seed) for arm in ("moe", "dense") for rate in (1, 2) for seed in (1, 2)]
    recipe = ROOT / "configs" / "quickstart.yaml"
    runs = [Run(arm, {"lr": rate}, seed, recipe, {}) for arm, rate, seed in places]
    study = Study("study", "", runs, {"moe": "moe", "dense": "dense"}, "dense", searched)
    results = [result_of(run, math.inf if i < lost else 3 + i / 10) for i, run in enumerate(runs)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = study_page(study, results, (), "")
        lines = verdicts(study, results)
    assert "inf" in page
    assert not any("In seconds, the MoE" in line for line in lines)
    assert rows(study, grouped(results))[0][3] == ("3.100 to inf" if lost == 1 else "inf to inf")


@pytest.mark.parametrize("losses", [(2.0, float("nan")), (float("nan"), 2.0)])
def test_a_range_with_a_run_that_came_to_nothing(losses):
    runs = [Run("a", {}, seed, Path("recipe"), {}) for seed in (1, 2)]
    results = [result_of(run, 2.0, val_loss=loss) for run, loss in zip(runs, losses, strict=True)]
    (row,) = rows(Study("study", "", runs, control="a"), grouped(results))
    assert row[2:5] == ("nan", "nan to nan", "-")


def result_of(run, loss: float, speed: float = 100.0, val_loss: float | None = None) -> Result:
    """What a run reached whose training loss ended where its validation loss is."""
    end = float(run.settings.get("train.max_tokens", 1000))
    log = {
        "total_tokens": np.array([end / 2, end]),
        "loss": np.array([2 * loss, loss]),
        "val_loss": np.array([np.nan, loss if val_loss is None else val_loss]),
        "tokens_per_second": np.array([np.nan, speed]),
    }
    return Result(run, RunLog(run.title, log), 1, 1.0, 4.0)


@pytest.fixture
def pays(tmp_path):
    """A study of two arms at two budgets."""
    arms = {"moe": {}, "dense": {"train.max_norm": 2.0}}
    grid = {"train.max_tokens": [1000, 2000]}
    return load_study(
        write(tmp_path / "s.yaml", seeds=[1], arms=arms, grid=grid, compare={"moe": "moe", "dense": "dense"})
    )


def test_a_page_of_runs_that_are_not_finished_yet(pays):
    results = [result_of(run, 4.0) for run in pays.runs if (run.arm, run.point[BUDGET]) != ("dense", 2000)]
    page = study_page(pays, results, ["dense: not finished, saying 'nan'"], "again")
    assert "Not finished, and left out of all that follows: 1 of 4 runs" in page
    assert "dense: not finished, saying &#x27;nan&#x27;" in page
    many = study_page(pays, results, [f"run {i}" for i in range(30)], "again")
    assert ("run 19" in many, "run 20" in many, "And 10 more." in many) == (True, False, True)
    assert not any("In seconds" in line for line in verdicts(pays, results)), "no dense run is as long as the MoE's"


def test_the_table_says_what_each_arm_reached(tmp_path):
    study = load_study(write(tmp_path / "s.yaml", arms={"a": {}, "b": {"train.max_norm": 2.0}}, control="b"))
    results = [result_of(run, {"a": 3.0, "b": 3.5}[run.arm] + 0.25 * (run.seed == 2)) for run in study.runs]
    table = [dict(zip(COLUMNS, row, strict=True)) for row in rows(study, grouped(results))]
    assert [(row["arm"], row["seeds"], row["validation loss"], row["range"]) for row in table] == [
        ("a", "2", "3.125", "3.000 to 3.250"),
        ("b", "2", "3.625", "3.500 to 3.750"),
    ]
    assert [row["minus control (95 % interval)"] for row in table] == ["-0.500 (-0.500 to -0.500)", "control"]


def test_runs_whose_speed_is_unknown_say_nothing_about_seconds(pays):
    lines = [verdicts(pays, [result_of(run, 4.0, speed) for run in pays.runs]) for speed in (100.0, np.nan)]
    assert [sum(line.startswith("In seconds") for line in some) for some in lines] == [1, 0]


def test_a_run_that_came_to_nothing_has_no_part_in_the_multiplier(pays):
    losses = {("dense", 1000): 4.0, ("dense", 2000): 2.0, ("moe", 1000): 2.0, ("moe", 2000): np.inf}
    results = [result_of(run, 3.0, val_loss=losses[run.arm, run.point[BUDGET]]) for run in pays.runs]
    lines = verdicts(pays, results)
    assert any(line.startswith("Compute multiplier 2.00") for line in lines), lines
    assert "Compute multiplier 2.00" in study_page(pays, results, (), "again"), "nor in the pictures"
    none = [
        result_of(run, 3.0, val_loss=np.inf if run.arm == "moe" else losses["dense", run.point[BUDGET]])
        for run in pays.runs
    ]
    assert not any("multiplier" in line for line in verdicts(pays, none)), "nor have all of one side"


def test_values_of_a_grid_and_of_a_search_may_be_lists(tmp_path):
    betas = [[0.9, 0.95], [0.9, 0.99]]
    grid = load_study(
        write(tmp_path / "grid.yaml", arms={"a": {}, "b": {"train.max_norm": 2.0}}, grid={"optimizer.betas": betas})
    )
    results = [result_of(run, 4.0 + run.seed * (run.arm == "b")) for run in grid.runs]
    assert [d.alone.value for d in compared(grid, grouped(results)).values()] == pytest.approx([1.5, 1.5])
    search = load_study(write(tmp_path / "search.yaml", search={"points": 2, "optimizer.betas": betas}))
    figure = search_figure(search.searched, grouped([result_of(run, 4.0) for run in search.runs]))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["[0.9, 0.99]", "[0.9, 0.95]"]


def test_losses_are_drawn_over_what_they_cost(pays):
    one = replace(result_of(pays.runs[0], 4.0), flops_per_token=3.0)
    costs = (one.tokens, 3 * one.tokens, one.seconds)
    for axes, cost in zip(loss_figure(grouped([one])).axes, costs, strict=True):
        curve, dots = axes.lines
        assert (curve.get_xdata()[-1], dots.get_xdata().tolist()) == (cost, [cost])


@pytest.mark.parametrize("length", [1, 2, 10, 25, 60])
def test_a_smoothed_curve_does_not_lag(length):
    straight = 7.0 - 0.5 * np.arange(length)
    assert smooth(straight) == pytest.approx(straight)


def test_two_models_that_are_level_at_any_time_are_so_however_slow_the_steps_of_one():
    slow, fast = ((seconds := np.arange(0.0, 120, each), smooth(6 * np.exp(-seconds / 60))) for each in (3, 2))
    assert np.interp(slow[0], *fast) == pytest.approx(slow[1], abs=0.03)


def test_a_smoothed_curve_has_the_mean_of_nine_values_and_ends_where_they_do():
    values = np.random.default_rng(0).normal(size=40)
    assert smooth(values)[10] == pytest.approx(values[6:15].mean())
    assert smooth(values)[-1] == pytest.approx(np.polyval(np.polyfit(range(9), values[-9:], 1), 8))
    assert smooth(values[:9]) == pytest.approx(values[:9]), "too few"
    assert np.isinf(smooth(np.array([1.0, 2.0, np.inf, 1.0]))).tolist() == [False, False, True, True]


def test_switches_that_were_searched_are_drawn_by_name(tmp_path):
    search = load_study(write(tmp_path / "s.yaml", search={"points": 4, "train.tie_embeddings": [True, False]}))
    axes = search_figure(search.searched, grouped([result_of(run, 4.0) for run in search.runs])).axes[0]
    assert {label.get_text() for label in axes.get_xticklabels()} == {"True", "False"}


@pytest.mark.parametrize(("points", "scale"), [(2, "linear"), (8, "log")])
def test_magnitudes_that_were_searched_are_drawn_as_such(points, scale, tmp_path):
    rates = {"low": 1e-4, "high": 1e-2, "log": True}
    study = load_study(write(tmp_path / "s.yaml", seeds=[1], search={"points": points, "optimizer.lr": rates}))
    figure = search_figure(study.searched, grouped([result_of(run, 4.0) for run in study.runs]))
    assert figure.axes[0].get_xscale() == scale


def test_break_even_of_two_lines():
    seconds = np.array([0.0, 10.0, 20.0])
    dense = (seconds, np.array([5.0, 4.0, 3.5]))
    assert break_even(dense, (seconds, np.array([6.0, 4.0, 3.0]))) == 10.0
    assert break_even(dense, (seconds, np.array([4.0, 3.0, 3.0]))) == 0.0
    assert break_even(dense, (seconds, np.array([4.0, 3.0, 3.6]))) is None
    assert break_even(dense, (np.array([30.0, 40.0]), np.array([1.0, 1.0]))) is None
    ahead_behind_ahead = (np.append(seconds, 30.0), np.array([6.0, 3.0, 4.0, 3.0]))
    often, seldom = np.array([0.0, 4.0, 8.0, 12.0]), np.array([0.0, 12.0])
    assert break_even((seldom, np.array([5.0, 3.5])), (often, np.array([6.0, 4.0, 3.0, 3.0]))) == 4.0
    assert break_even((often, np.array([5.0, 4.5, 4.0, 3.5])), (seldom, np.array([6.0, 3.0]))) == 8.0
    assert break_even((ahead_behind_ahead[0], np.array([5.0, 4.0, 3.5, 3.2])), ahead_behind_ahead) == 30.0


def test_first_below():
    assert first_below(np.array([0.3, 0.05, 0.2, 0.1, 0.05]), 0.1) == 3
    assert first_below(np.array([0.05]), 0.1) == 0
    assert first_below(np.array([0.05, np.nan, 0.05]), 0.1) == 2
    assert first_below(np.array([0.05, 0.2]), 0.1) is None


@pytest.mark.slow
def test_a_killed_study_goes_on_and_repeats_nothing(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for name in "abcdefgh":
        (source / f"{name}.py").write_text("\n".join(f"def {name}{i}(x):\n    return x + {i}\n" for i in range(500)))
    model = {
        "name": "tiny", "block_size": 16, "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 300,
        "padded_vocab_size": 300, "mlp_class_name": "MoE", "n_expert": 4, "n_expert_per_token": 2,
        "moe_intermediate_size": 8,
    }  # fmt: skip
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump({
        "model_config": model,
        "data": {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": {
            "source_path": str(source), "data_path": str(tmp_path / "data"), "vocab_size": 300, "val_fraction": 0.3,
        }},
        "train": {"global_batch_size": 2, "micro_batch_size": 2, "save_interval": 5, "log_interval": 3},
        "eval": {"interval": 1000, "max_iters": 2, "final_validation": True},
    }))  # fmt: skip
    # Runs may have several processes.
    two = {"devices": 2, "train.micro_batch_size": 1}
    arms = {"MoE": {}, "dense": {"dense_twin": "flops", **two}}
    compare, grid = {"moe": "MoE", "dense": "dense"}, {"train.max_tokens": [640, 1280]}
    study = write(tmp_path / "small.yaml", seeds=[1], recipe=str(recipe), arms=arms, compare=compare, grid=grid)
    out = tmp_path / "out"
    code = "import sys; from litgpt_moe_ext.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "study", str(study), "--out_dir", str(out), "--jobs", "1"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    finished = out / "runs" / load_study(study).runs[0].key / launch.FINISHED
    second = finished.parents[1] / load_study(study).runs[1].key / "output.txt"
    while not second.is_file():
        assert first.poll() is None
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = os.stat(finished).st_mtime_ns
    run_command(*command)
    assert os.stat(finished).st_mtime_ns == before, "the finished run was trained again"
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["arm"], int(float(row["tokens"]))) for row in rows] == [
        ("MoE", 640), ("dense", 640), ("MoE", 1280), ("dense", 1280),
    ]  # fmt: skip
    moe, dense = (float(row["flops"]) for row in rows[:2])
    assert dense == pytest.approx(moe, rel=0.005)
    page = (out / "report.html").read_text()
    assert all(0 < float(row["bits_per_byte"]) < float(row["val_loss"]) / 0.69 for row in rows)
    assert all(0 <= float(row["late_load_vio"]) <= float(row["late_max_vio"]) + 1e-9 for row in rows[::2])
    assert all(row["late_load_vio"] == "nan" for row in rows[1::2])
    assert "minus control" in page
    assert "data:image/png" in page
    assert "data:text/csv" in page
    assert json.loads(finished.read_text())["arm"] == "MoE"
    assert all(
        float(row["train_loss"]) > 0
        and row["software"] == f"litgpt_moe_ext {code_version()}, torch {torch.__version__}"
        for row in rows
    )
