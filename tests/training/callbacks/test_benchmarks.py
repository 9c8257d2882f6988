"""Benchmarks while training: the right scores at the right steps, and a training that does not notice."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import datasets
import pytest
import torch
from litgpt import Tokenizer

from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.hellaswag import as_question, evaluate, load_items
from litgpt_moe_ext.evaluation.loading import load_model
from litgpt_moe_ext.evaluation.tokenization import encoder
from litgpt_moe_ext.training.callbacks.benchmarks import TrainingBenchmarks
from litgpt_moe_ext.training.parallel.strategies import make_strategy
from litgpt_moe_ext.training.phases.equip import choose_equipment
from litgpt_moe_ext.training.settings import DistributedArgs, EvaluateArgs, Settings
from tests.models import moe_config
from tests.runs import logged, refused, train, weights_of
from tests.training.processes import train_in_ranks, trained_in_ranks

ENDINGS = ["return x", "pass", "def f", "import os", "if a", "else", "self", "is not"]
# Draws tokens, whose generators are those of the training.
TASK = """
task: continuation
dataset_path: json
dataset_kwargs:
  data_files:
    test: documents.json
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs:
  until: ["~"]
  max_gen_toks: 4
  do_sample: true
  temperature: 1.0
metric_list:
  - metric: exact_match
"""
NOISY = {"mlp_class_name": "NoisyTopKMoE", "norm_topk_prob": None, "router_bias_update_rate": None}


@pytest.fixture(scope="module")
def hellaswag_file(tmp_path_factory) -> Path:
    questions = [
        {
            "ind": i,
            "activity_label": "code",
            "ctx_a": f"for i in range({i}):",
            "ctx_b": "",
            "ctx": f"for i in range({i}):",
            "endings": [ENDINGS[(i + k) % len(ENDINGS)] for k in range(4)],
            "label": i % 4,
        }
        for i in range(10)
    ]
    path = tmp_path_factory.mktemp("hellaswag") / "hellaswag_val.jsonl"
    path.write_text("\n".join(json.dumps(question) for question in questions))
    return path


@pytest.fixture
def task_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "documents.json").write_text("\n".join(json.dumps({"text": f"x = {i}"}) for i in range(3)))
    path = tmp_path / "task.yaml"
    path.write_text(TASK)
    return path


def test_the_last_step_is_evaluated_once():
    """Where it has just been, after a number of steps or a validation."""
    benchmark = Mock()
    benchmark.scores.return_value = {}
    callback = TrainingBenchmarks([benchmark], every_steps=3)
    fabric = MagicMock(device=torch.device("cpu"))
    fabric.agree_on_interruption.return_value = 0
    callback.on_after_setup(fabric, SimpleNamespace(module=torch.nn.Linear(1, 1)))
    callback.on_step_begin({"step_count": 3})
    callback.on_last_step({"step_count": 3})
    assert benchmark.scores.call_count == 1
    callback.on_last_step({"step_count": 4})
    assert benchmark.scores.call_count == 2


def score_of(checkpoint: Path, file: Path, limit: int | None = None) -> float:
    """Return acc_norm by the rule of lm-eval of a checkpoint in full precision."""
    encode = encoder(Tokenizer(checkpoint))
    questions = [as_question(item, "lm-eval", encode) for item in load_items(file, limit)]
    answers = evaluate(load_model(checkpoint, torch.device("cpu")), questions, 4, lambda done: None)
    return sum(answer.acc_norm for answer in answers) / len(answers)


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, NOISY], ids=["bias", "noisy"])
def test_the_training_does_not_notice(recipe, finished, tmp_path, hellaswag_file, task_file, capsys, model):
    """Losses, gradients and weights are those without benchmarks, bit for bit; noise is drawn in every step."""
    plain = recipe("plain", out_dir=str(tmp_path / "plain"), model_config=model)
    wanted = {"hellaswag": str(hellaswag_file), "tasks": [str(task_file)], "every_steps": 3, "batch_size": 8}
    evaluated = recipe("evaluated", out_dir=str(tmp_path / "evaluated"), model_config=model, evaluate=wanted)
    if model:
        assert train("--config", plain) == 0
    else:
        finished(tmp_path / "plain")
    assert train("--config", evaluated) == 0
    output = capsys.readouterr()
    for column in ("loss", "val_loss", "grad_norm", "learning_rate"):
        assert logged(tmp_path / "evaluated", column) == logged(tmp_path / "plain", column)
    ours, theirs = (weights_of(tmp_path / name / "final") for name in ("evaluated", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    scores = logged(tmp_path / "evaluated", "hellaswag/lm-eval/acc_norm")
    assert list(scores) == [3, 6, 9, 12]
    assert float(scores[12]) == score_of(tmp_path / "evaluated" / "final", hellaswag_file)
    assert list(logged(tmp_path / "evaluated", "lm_eval/continuation/exact_match")) == [3, 6, 9, 12]
    assert "hellaswag/lm-eval/acc " in output.out
    assert "it/s" not in output.err, "no bars of lm-eval"


@pytest.mark.slow
def test_two_processes_share_the_items(recipe, tmp_path, hellaswag_file, task_file):
    """Five of ten questions each, and an uneven three documents: the scores of one process with the same weights."""
    wanted = {"hellaswag": str(hellaswag_file), "tasks": [str(task_file)], "every_steps": 12, "batch_size": 8}
    file = recipe(devices=2, train={"micro_batch_size": 2}, evaluate=wanted)
    train_in_ranks(2, "--config", file, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    scores = logged(tmp_path / "out", "hellaswag/lm-eval/acc_norm")
    assert {step: float(score) for step, score in scores.items()} == {
        12: score_of(tmp_path / "out" / "final", hellaswag_file)
    }
    assert list(logged(tmp_path / "out", "lm_eval/continuation/exact_match")) == [12]


def test_after_every_validation(recipe, tmp_path, hellaswag_file):
    """Also that before the first step; once where the last step is validated twice; and a resumed run goes on."""
    wanted = {"hellaswag": str(hellaswag_file), "hellaswag_rule": "build-nanogpt", "max_items": 3}
    file = recipe(evaluate=wanted, train={"log_interval": 3}, eval={"initial_validation": True})
    assert train("--config", file, "--train.max_steps", "6") == 0
    assert train("--config", file, "--resume", "auto") == 0
    assert list(logged(tmp_path / "out", "val_loss")) == [0, 4, 6, 8, 12]
    tokens = logged(tmp_path / "out", "total_tokens")
    assert {step: float(count) for step, count in tokens.items()} == {
        step: 128 * step for step in (0, 3, 4, 6, 8, 9, 12)
    }
    scores = logged(tmp_path / "out", "hellaswag/build-nanogpt/acc")
    assert list(scores) == [0, 4, 6, 8, 12]
    assert all(3 * float(score) == pytest.approx(round(3 * float(score))) for score in scores.values())


@pytest.mark.parametrize(
    ("place", "every_steps", "last"),
    [
        ("evaluate", 3, 6),
        pytest.param("generate", None, 8, marks=pytest.mark.slow),
        pytest.param("evaluate", None, 12, marks=pytest.mark.slow),
    ],
    ids=["hellaswag", "task", "last"],
)
def test_a_signal_waits_for_no_benchmark(
    recipe, finished, tmp_path, hellaswag_file, task_file, monkeypatch, capsys, place, every_steps, last
):
    """The run saves after the step that was to be judged, and judges it when it goes on."""
    from litgpt_moe_ext.evaluation.harness import model, training

    module = training if place == "evaluate" else model
    original, passes = getattr(module, place), []

    def interrupting(model, *arguments):
        if len(logged(tmp_path / "out", "loss")) == last and not passes:
            model.register_forward_hook(lambda *_: passes.append(None))
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, *arguments)

    wanted = {"hellaswag": str(hellaswag_file), "tasks": [str(task_file)], "every_steps": every_steps, "batch_size": 1}
    if place == "evaluate":
        wanted["batch_size"] = 8
    file = recipe(evaluate=wanted, eval={"final_validation": False})
    monkeypatch.setattr(module, place, interrupting)
    assert train("--config", file) == 128 + signal.SIGTERM
    assert 1 <= len(passes) <= 4, "those of a single batch"
    assert f"benchmarks stopped after step {last}" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").glob("step-*"))[-1] == f"step-{last:08d}"
    assert train("--config", file, "--resume", "auto") == 0
    steps = list(range(every_steps or 4, 13, every_steps or 4))
    assert list(logged(tmp_path / "out", "hellaswag/lm-eval/acc")) == steps
    assert list(logged(tmp_path / "out", "lm_eval/continuation/exact_match")) == steps
    finished(tmp_path / "plain")
    assert logged(tmp_path / "out", "loss") == logged(tmp_path / "plain", "loss")


# Sends the signal while an evaluation of a trained model builds its requests, and judges texts only.
JUDGE = """
import os, signal
from pathlib import Path

def ask(doc):
    table = Path(__file__).parent / "out" / "metrics.csv"
    if os.environ["RANK"] == os.environ["SIGNALLED"] and table.exists() and len(table.read_text().splitlines()) > 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return doc["text"]

def judge(doc, texts):
    return {"length": len(texts[0]) / len(texts[0])}
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_metric_sees_what_was_not_asked(recipe, tmp_path, task_file, ranks):
    """Where it fails on an empty text, a process that ends would leave the others waiting, and the run unsaved."""
    (tmp_path / "judge.py").write_text(JUDGE)
    task = TASK.replace('"{{text}}"', "!function judge.ask", 1).split("metric_list")[0]
    metric = "{metric: length, aggregation: mean, higher_is_better: true}"
    task_file.write_text(f"{task}process_results: !function judge.judge\nmetric_list: [{metric}]\n")
    (tmp_path / "documents.json").write_text("\n".join(json.dumps({"text": f"x = {i}"}) for i in range(4)))
    file = recipe(devices=ranks, evaluate={"tasks": [str(task_file)], "every_steps": 3, "batch_size": 1})
    environment = {"SIGNALLED": str(ranks - 1), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    outputs, statuses = trained_in_ranks(ranks, "--config", file, **environment)
    assert statuses == [143] * ranks, outputs
    assert "benchmarks stopped after step 3" in outputs[0]
    assert "failed after" not in outputs[0]


def test_a_failing_benchmark_is_not_worth_a_run(recipe, tmp_path, hellaswag_file, monkeypatch, capsys):
    from litgpt_moe_ext.evaluation.harness.training import HellaSwag

    def broken(*_args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(HellaSwag, "scores", broken)
    assert train("--config", recipe(evaluate={"hellaswag": str(hellaswag_file)})) == 0
    assert "HellaSwag failed after step 4: RuntimeError: out of luck" in capsys.readouterr().out
    assert len(logged(tmp_path / "out", "loss")) == 12


class TestWrongInputs:
    def test_files(self, recipe, tmp_path, capsys):
        error = refused(capsys, "--config", recipe(), "--evaluate.hellaswag", tmp_path / "none.jsonl")
        assert "evaluate.hellaswag" in error
        assert "none.jsonl' must be a file" in error
        (tmp_path / "bad.jsonl").write_text('{"ind": 1}')
        error = refused(capsys, "--config", recipe(), "--evaluate.hellaswag", tmp_path / "bad.jsonl")
        assert "lacks 'activity_label'" in error
        error = refused(capsys, "--config", recipe(evaluate={"tasks": [str(tmp_path / "none.yaml")]}))
        assert "evaluate.tasks: the file" in error
        assert not (tmp_path / "out" / "train.log").exists(), "before any work"

    def test_endings_that_do_not_fit(self, recipe, hellaswag_file, capsys):
        arguments = ("--evaluate.hellaswag", hellaswag_file, "--max-seq-length", "4")
        error = refused(capsys, "--config", recipe(), *arguments)
        assert "evaluate.hellaswag: an ending has" in error
        assert "the model reads 4 at once" in error

    def test_what_fails_with_the_first_batch(self, recipe, hellaswag_file, monkeypatch, capsys):
        from litgpt_moe_ext.evaluation.harness import training as benchmarks

        def broken(*_args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(benchmarks, "evaluate", broken)
        error = refused(capsys, "--config", recipe(), "--evaluate.hellaswag", hellaswag_file)
        assert "evaluate: HellaSwag does not work: CUDA out of memory" in error

    @pytest.mark.parametrize("mixed", [False, True])
    def test_no_tokenizer(self, recipe, tmp_path, hellaswag_file, capsys, mixed):
        """Also where only the prepared data know that there is none."""
        import numpy as np

        np.save(tmp_path / "train.npy", np.arange(3000, dtype=np.uint16) % 300)
        np.save(tmp_path / "val.npy", np.arange(300, dtype=np.uint16))
        data = {
            "class_path": "litgpt_moe_ext.data.TokenShards",
            "init_args": {"data_path": str(tmp_path), "vocab_size": 300},
        }
        if mixed:
            mixture = {"corpora": {"a": data}, "weights": {"a": 1}}
            data = {"class_path": "litgpt_moe_ext.data.Mixture", "init_args": mixture}
        file = recipe(data=data, evaluate={"hellaswag": str(hellaswag_file)})
        assert "evaluate: needs a tokenizer; give tokenizer_dir" in refused(capsys, "--config", file)

    def test_sharded_models(self, hellaswag_file):
        strategy = make_strategy("fsdp2", 2, 1, DistributedArgs(), "cpu")
        fabric, config = SimpleNamespace(strategy=strategy, device=torch.device("cpu"), world_size=2), moe_config()
        choose_equipment(SimpleNamespace(plan=SimpleNamespace(settings=Settings(), config=config), fabric=fabric))
        wanted = Settings(evaluate=EvaluateArgs(hellaswag=hellaswag_file))
        with pytest.raises(SettingsError, match="no process holds a whole model under strategy"):
            choose_equipment(SimpleNamespace(plan=SimpleNamespace(settings=wanted, config=config), fabric=fabric))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"hellaswag": Path("x"), "every_steps": 0}, "evaluate.every_steps: 0 must be an integer of at least 1"),
            ({"hellaswag": Path("x"), "max_items": 0}, "evaluate.max_items: 0 must be an integer of at least 1"),
            ({"hellaswag": Path("x"), "batch_size": 0}, "evaluate.batch_size: 0 must be an integer of at least 1"),
            ({"every_steps": 10}, "evaluate.every_steps: 10 evaluates nothing"),
        ],
        ids=str,
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            EvaluateArgs(**settings)
