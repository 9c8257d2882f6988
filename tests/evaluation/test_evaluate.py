"""`litgpt evaluate` with the plugin's checkpoints and with local task files."""

import inspect
import json
import os
import resource
import sys
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import litgpt.eval.evaluate
import pytest
from datasets.exceptions import DatasetNotFoundError
from jsonargparse import CLI
from lm_eval.api.registry import METRIC_REGISTRY

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation import litgpt_evaluate
from litgpt_moe_ext.evaluation.harness import tasks
from litgpt_moe_ext.evaluation.harness.names import REPORTED
from litgpt_moe_ext.evaluation.harness.tasks import load_task_file, load_tasks
from litgpt_moe_ext.evaluation.litgpt_evaluate import EvaluateSettings, evaluate_checkpoint, wrap_convert_and_evaluate
from litgpt_moe_ext.training.callbacks.benchmarks import check_benchmarks
from litgpt_moe_ext.training.settings import EvaluateArgs
from tests.runs import run_command

LITGPTS_OWN = inspect.unwrap(litgpt.eval.evaluate.convert_and_evaluate)


@pytest.fixture
def original():
    return Mock()


@pytest.fixture
def wrapped(original):
    @wraps(LITGPTS_OWN)
    def convert_and_evaluate(*args, **kwargs):
        original(*args, **kwargs)

    return wrap_convert_and_evaluate(convert_and_evaluate)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Another working directory than those of task and checkpoint."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def accuracy(results_path: Path) -> float:
    return json.loads(results_path.read_text())["results"]["yes_or_no"]["acc,none"]


def test_local_task_has_the_known_accuracy(wrapped, original, moe_dir, task_file, elsewhere, tmp_path, capsys):
    relative = os.path.relpath(task_file, elsewhere)
    wrapped(moe_dir, tasks=relative, out_dir=tmp_path / "out", batch_size=3, device="cpu", force_conversion=True)

    original.assert_not_called()
    assert accuracy(tmp_path / "out" / "results.json") == 0.75
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["config"]["model"] == str(moe_dir)
    assert results["config"]["model_dtype"] == "torch.float32"
    assert results["max_length"] == 32
    assert results["n-samples"]["yes_or_no"] == {"original": 4, "effective": 4}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]  # no partial file, no conversion
    printed = capsys.readouterr().out
    assert "|yes_or_no|" in printed
    assert "force_conversion: has no effect" in printed


def test_command_line(wrapped, moe_dir, task_file, elsewhere, tmp_path):
    # What `litgpt evaluate` does with its arguments.
    arguments = ["evaluate", str(moe_dir), "--tasks", str(task_file), "--batch_size", "auto", "--limit", "2"]
    CLI({"evaluate": wrapped}, args=[*arguments, "--save_filepath", str(tmp_path / "deep" / "r.json"), "--device=cpu"])
    assert accuracy(tmp_path / "deep" / "r.json") == 1.0  # the wrong answer is the third


@pytest.mark.slow
def test_litgpt_command(moe_dir, task_file, elsewhere, tmp_path):
    command = [sys.executable, "-m", "litgpt", "evaluate", str(moe_dir), "--tasks", str(task_file)]
    run = run_command(*command, "--out_dir", "out", cwd=elsewhere, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert "without conversion" in run.stdout
    assert accuracy(elsewhere / "out" / "results.json") == 0.75


def test_results_go_beside_the_checkpoint_by_default(moe_dir, task_file):
    evaluate_checkpoint(EvaluateSettings(moe_dir, tasks=str(task_file), device="cpu", limit=1))
    assert accuracy(moe_dir / "evaluate" / "results.json") == 1.0


def test_wrapped_function_looks_like_the_original():
    function = wrap_convert_and_evaluate(LITGPTS_OWN)
    assert inspect.signature(function) == inspect.signature(LITGPTS_OWN)
    assert function.__doc__ == LITGPTS_OWN.__doc__
    assert list(inspect.signature(EvaluateSettings).parameters) == list(inspect.signature(LITGPTS_OWN).parameters)


def test_plugin_has_wrapped_litgpts_function():
    assert litgpt.eval.evaluate.convert_and_evaluate is not LITGPTS_OWN


def test_plain_checkpoints_and_listings_go_to_litgpt_unchanged(wrapped, original, llama_dir, moe_dir, tmp_path):
    wrapped(llama_dir, "hellaswag", batch_size=2)
    original.assert_called_with(llama_dir, "hellaswag", batch_size=2)
    wrapped(tmp_path / "missing", tasks="hellaswag,mmlu")
    original.assert_called_with(tmp_path / "missing", tasks="hellaswag,mmlu")
    wrapped("list")
    original.assert_called_with("list")
    wrapped(moe_dir)
    original.assert_called_with(moe_dir)


def test_plain_checkpoint_with_a_task_file_is_evaluated_here(wrapped, original, llama_dir, task_file, tmp_path):
    wrapped(llama_dir, str(task_file), out_dir=tmp_path, device="cpu")
    original.assert_not_called()
    assert 0 <= accuracy(tmp_path / "results.json") <= 1


@pytest.mark.parametrize(
    "index", [["hellaswag", "mmlu"], pytest.param(None, marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_plugin_checkpoint_with_a_task_name_is_evaluated_here(wrapped, original, moe_dir, monkeypatch, index):
    if index:  # lm-eval reads thousands of files for its own
        monkeypatch.setattr(tasks, "TaskManager", lambda include_defaults: Mock(task_index=index))
    with pytest.raises(ValueError, match=r"tasks: 'helaswag' is unknown to lm-eval; .*; did you mean hellaswag\?$"):
        wrapped(moe_dir, "helaswag", device="cpu")
    original.assert_not_called()


def test_a_full_disk_leaves_the_old_results(moe_dir, task_file, tmp_path, monkeypatch, capsys):
    report, (limit, most) = litgpt_evaluate._report, resource.getrlimit(resource.RLIMIT_FSIZE)

    def report_on_a_full_disk(*results):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
        try:
            report(*results)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))

    (tmp_path / "results.json").write_text("old")
    monkeypatch.setattr(litgpt_evaluate, "_report", report_on_a_full_disk)
    with pytest.raises(SettingsError, match="results.json cannot be written .File too large.; name another place"):
        evaluate_checkpoint(EvaluateSettings(moe_dir, tasks=str(task_file), out_dir=tmp_path, device="cpu", limit=1))
    assert "|acc" in capsys.readouterr().out
    assert (tmp_path / "results.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_directory_that_cannot_be_made_is_named(moe_dir, task_file, tmp_path):
    (tmp_path / "file").touch()
    for setting, path, message in (
        ("out_dir", "file", "cannot be made, because .* is a file; name another path"),
        ("save_filepath", "file/results.json", "cannot be made, because .* is a file; name another path"),
        ("save_filepath", ".", "is a folder; name a file"),
    ):
        settings = EvaluateSettings(moe_dir, tasks=str(task_file), device="cpu", **{setting: tmp_path / path})
        with pytest.raises(SettingsError, match=f"^{setting}: .* {message}"):
            evaluate_checkpoint(settings)


@pytest.mark.parametrize(("setting", "wrong"), [("limit", 0), ("limit", -0.5), ("num_fewshot", -1)])
def test_numbers_that_ask_for_nothing_are_refused(setting, wrong, tmp_path):
    with pytest.raises(SettingsError, match=f"^{setting}: {wrong} must be "):
        evaluate_checkpoint(EvaluateSettings(tmp_path, tasks="hellaswag", **{setting: wrong}))


def test_a_cache_that_cannot_be_written_is_named(task_file, tmp_path, monkeypatch):
    """As in a home directory that is read-only on the nodes of a cluster; the task and its data are right."""
    (tmp_path / "home").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "home" / "datasets"))
    with pytest.raises(SettingsError, match=r"^environment: HF_HOME: '.*home.*' cannot be written .*; set HF_HOME to"):
        load_task_file(task_file)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (None, "is not a directory"),
        ("lit_model.pth", "has no lit_model.pth"),
        ("model_config.yaml", "has no model_config.yaml"),
        ("tokenizer.json", "has no tokenizer"),
    ],
)
def test_incomplete_checkpoints_are_named(tmp_path, removed, message):
    folder = tmp_path / "checkpoint"
    if removed:
        folder.mkdir()
        for name in {"lit_model.pth", "model_config.yaml", "tokenizer.json"} - {removed}:
            (folder / name).touch()
    with pytest.raises(SettingsError, match=f"checkpoint_dir: .*{message}"):
        evaluate_checkpoint(EvaluateSettings(folder, tasks="some.yaml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"n_layer: [1\n", "cannot be read"), (b"\xff\xfe", "cannot be read"), (b"- 1\n", "holds no model configuration")],
)
def test_a_damaged_configuration_is_named(tmp_path, content, message):
    (tmp_path / "model_config.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"^checkpoint_dir: .*model_config.yaml {message}.*; copy it again"):
        litgpt.eval.evaluate.convert_and_evaluate(tmp_path, tasks="piqa")


def test_data_in_the_working_directory_is_found_too(task_file, elsewhere):
    (task_file.parent / "data").rename(elsewhere / "data")
    assert len(load_task_file(task_file).test_docs()) == 4


def test_task_file_may_include_another(task_file, elsewhere):
    other = task_file.with_name("other.yaml")
    other.write_text("include: yes_or_no.yaml\ntask: other\n")
    (task,), _ = load_tasks(f" {other} ,")
    assert task.config.task == "other"
    assert len(task.test_docs()) == 4


TASK = "task: a\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: good.json\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dataset_path: json\n", "lacks the key `task`"),
        ("task: [a, b]\ngroup: g\n", "lacks the key `task`"),
        ("- task\n", "lacks the key `task`"),
        ("task: [a\n", "is not valid YAML"),
        ("task: a\nclass: b\n", "Python class"),
        ("task: a\nmisspelt: 1\n", "does not accept: .*misspelt"),
        (
            "task: a\ndataset_path: json\ndataset_kwargs:\n  data_files: none.json\n",
            "names the data 'none.json'",
        ),
        ("task: a\ndataset_path: json\n", r"names no data; add it as dataset_kwargs: \{data_files: FILE\}"),
        ("task: a\ndataset_path: csv\ndataset_kwargs: {data_files: []}\n", "names no data"),
        ("task: a\ndataset_path: text\ndataset_kwargs: {data_files: [3]}\n", "names the data 3, which must be a path"),
        ("task: a\ndataset_path: text\ndataset_kwargs: x.txt\n", "dataset_kwargs: 'x.txt' must be settings by name"),
        (f"{TASK}test_split: other\n", r"cannot be used: 'other' \(KeyError\); correct it or its data"),
        (f"{TASK}test_split: test\ndoc_to_text: '{{{{absent}}}}'\n", "cannot be used: 'absent' is undefined"),
        (f"{TASK}output_type: other\n", "cannot be used: .*invalid output_type 'other'"),
        (TASK.replace("good", "broken"), r"cannot be used: .*Missing a closing .* \(ArrowInvalid\)"),
        (TASK.replace("good", "empty"), "cannot be used: "),
        (f"{TASK}metric_list: [acc]\n", "cannot be used: "),
        (f"{TASK}metric_list: acc\n", "cannot be used: "),
        (f"{TASK}filter_list: [{{name: f, filter: [regex]}}]\n", "does not accept: "),
    ],
)
def test_malformed_task_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    for name, text in (("good", '{"question": "so?"}\n'), ("broken", '{"question": "so?'), ("empty", "")):
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(SettingsError, match=f"tasks: .*bad.yaml.*{message}"):
        load_tasks(str(path))


def test_one_seed_is_that_of_all_random_numbers(monkeypatch):
    asked = Mock()
    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", asked)
    settings = EvaluateSettings(Path("checkpoint"), "a", num_fewshot=2, limit=3, seed=7)
    model = SimpleNamespace(device="cpu")
    litgpt_evaluate._evaluate(model, ["a"], None, settings)
    seeds = {"random_seed": 7, "numpy_random_seed": 7, "torch_random_seed": 7}
    asked.assert_called_once_with(
        model=model, tasks=["a"], task_manager=None, num_fewshot=2, batch_size=1, device="cpu", limit=3, **seeds
    )


def test_a_task_is_defined_once(monkeypatch):
    def named(file):
        return SimpleNamespace(config=SimpleNamespace(task=file.name[0]))

    monkeypatch.setattr("litgpt_moe_ext.evaluation.harness.tasks.load_task_file", named)
    check_benchmarks(EvaluateArgs(tasks=[Path("a.yaml"), Path("b.yaml")]))
    with pytest.raises(SettingsError, match="evaluate.tasks: the task a is defined in several files; rename it"):
        check_benchmarks(EvaluateArgs(tasks=[Path("a.yaml"), Path("b.yaml"), Path("a2.yaml")]))


CHOICE, TEXT = f"{TASK}output_type: multiple_choice\n", f"{TASK}output_type: generate_until\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{CHOICE}metric_list: [{{metric: accc, aggregation: mean}}]\n", "metric: 'accc' is not .*; did you mean acc"),
        (
            f"{CHOICE}metric_list: [{{metric: bleu}}]\n",
            "metric: 'bleu' .* multiple_choice; choose from acc, acc_mu",
        ),
        (
            f"{TEXT}metric_list: [{{metric: acc}}]\n",
            "'acc' .* generate_until; choose from bleu, chrf, exact_match",
        ),
        (f"{TEXT}metric_list: [{{metric: exact_macht}}]\n", "metric: 'exact_macht' .*; did you mean exact_match"),
        (f"{CHOICE}metric_list: [{{metric: acc, aggregation: meen}}]\n", "aggregation: 'meen' is unknown .* mean"),
        (f"{TEXT}filter_list: [{{name: f, filter: [{{function: regexx}}]}}]\n", "filter: 'regexx' .* mean regex"),
    ],
)
def test_what_is_not_reported_is_named(tmp_path, content, message, monkeypatch):
    """Before anything is evaluated; lm-eval would print a table without it, or fail at the end."""
    monkeypatch.setattr("evaluate.load", Mock(side_effect=FileNotFoundError))
    (tmp_path / "bad.yaml").write_text(content)
    (tmp_path / "good.json").write_text('{"question": "so?"}\n')
    with pytest.raises(SettingsError, match=f"^tasks: .*bad.yaml: .*{message}"):
        load_task_file(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("multiple_choice", [(-1.0, True), (-2.0, False)] * 2),
        ("loglikelihood", [(-1.0, True)]),
        ("loglikelihood_rolling", [-1.0]),
    ],
)
def test_what_is_reported(task_file, kind, answers):
    task = load_task_file(task_file)
    task.OUTPUT_TYPE, task.doc_to_target, task._metric_fn_list = kind, lambda doc: " yes", METRIC_REGISTRY
    assert sorted(task.process_results(task.task_docs[0], answers)) == list(REPORTED[kind])


@pytest.mark.slow  # lm-eval reads the files of all its tasks
@pytest.mark.parametrize("error", [ConnectionError("no hub"), DatasetNotFoundError("no hub")])
def test_data_of_lm_evals_own_tasks_may_be_out_of_reach(moe_dir, tmp_path, monkeypatch, error):
    def unreachable(**_):
        raise error

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(SettingsError, match=r"^tasks: 'arc_easy' needs data that cannot be loaded: no hub \(.*; eval"):
        evaluate_checkpoint(EvaluateSettings(moe_dir, "arc_easy", out_dir=tmp_path))


def test_missing_and_repeated_tasks_are_named(task_file):
    with pytest.raises(SettingsError, match=r"tasks: the file 'none.yaml' does not exist"):
        load_tasks("none.yaml")
    with pytest.raises(ValueError, match="tasks: ' , ' names no task"):
        load_tasks(" , ")
    copy = task_file.with_name("copy.yaml")
    copy.write_text(task_file.read_text())
    for other in (copy, task_file):
        with pytest.raises(ValueError, match="'yes_or_no' is given more than once"):
            load_tasks(f"{task_file},{other}")


def test_nothing_is_downloaded_for_data_on_a_hub(task_file, monkeypatch):
    # `data_files` of a data set from a hub lie there, so their paths stay as they are.
    config = task_file.read_text().replace("dataset_path: json", "dataset_path: someone/questions")
    task_file.write_text(config)
    calls = []

    def load_dataset(**kwargs):
        calls.append(kwargs)
        raise TypeError("seen")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ValueError, match="seen"):
        load_task_file(task_file)
    assert calls[0]["data_files"] == {"test": "data/questions.json"}
