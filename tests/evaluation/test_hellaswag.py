"""HellaSwag by both rules: against lm-eval itself, and against sums by hand."""

import json
import math
import random
import re
from types import SimpleNamespace

import datasets
import pytest
import torch

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation import hellaswag
from litgpt_moe_ext.evaluation.hellaswag import Item, as_question, evaluate, load_items
from litgpt_moe_ext.evaluation.loading import load_model, load_tokenizer
from litgpt_moe_ext.evaluation.scoring import Continuation, score_continuations, token_losses
from litgpt_moe_ext.evaluation.tokenization import encoder
from tests.evaluation.conftest import VOCABULARY_SIZE, write_checkpoint
from tests.models import moe_config

TASK = """
task: local_hellaswag
dataset_path: json
dataset_kwargs:
  data_files:
    validation: hellaswag_val.jsonl
validation_split: validation
output_type: multiple_choice
process_docs: !function local_utils.process_docs
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WORDS = "the quick brown fox jumps over lazy dog is so yes or no [header] [title] then [step] he runs.".split()  # noqa: SIM905


def questions(n: int) -> list[dict]:
    """Return questions of the real schema: WikiHow's marks, empty `ctx_b`, labels as numbers."""
    dice = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(dice.choice(WORDS) for _ in range(dice.randint(low, high)))

    made = []
    for ind in range(n):
        ctx_a, ctx_b = text(3, 7), text(1, 2) if ind % 3 else ""
        made.append(
            {
                "ind": ind,
                "activity_label": dice.choice(["Removing ice from car", "How to be quick"]),
                "ctx_a": ctx_a,
                "ctx_b": ctx_b,
                "ctx": f"{ctx_a} {ctx_b}".strip(),
                "split": "val",
                "split_type": "indomain",
                "label": ind % 4,
                "endings": [text(1, 6) for _ in range(4)],
                "source_id": f"activitynet~v_{ind}",
            }
        )
    return made


@pytest.fixture(scope="module")
def hellaswag_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("hellaswag") / "hellaswag_val.jsonl"
    path.write_text("\n".join(json.dumps(question) for question in questions(24)))
    return path


def test_a_file_without_questions_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="empty.jsonl' must be a file; give HellaSwag's hellaswag_val.jsonl"):
        load_items(tmp_path / "empty.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(SettingsError, match="empty.jsonl' holds no questions; give HellaSwag's hellaswag_val.jsonl"):
        load_items(tmp_path / "empty.jsonl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, moe_config(block_size=64, vocab_size=VOCABULARY_SIZE, padded_vocab_size=VOCABULARY_SIZE))
    return folder


def answers(checkpoint, file, rule, batch_size=16):
    encode = encoder(load_tokenizer(checkpoint))
    model = load_model(checkpoint, torch.device("cpu"))
    asked = [as_question(item, rule, encode) for item in load_items(file)]
    done: list[int] = []
    found = evaluate(model, asked, batch_size, done.append)
    assert sum(done) == 4 * len(asked)
    return found


def test_lm_eval_gives_the_same_item_by_item(checkpoint, hellaswag_file, tmp_path, monkeypatch):
    from lm_eval.evaluator import simple_evaluate

    from litgpt_moe_ext.evaluation.harness.model import LitGPTModel
    from litgpt_moe_ext.evaluation.harness.tasks import load_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "local_utils.py").write_text("from lm_eval.tasks.hellaswag.utils import process_docs\n")
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "hellaswag_val.jsonl").write_text(hellaswag_file.read_text())
    tasks, manager = load_tasks(str(tmp_path / "task.yaml"))
    results = simple_evaluate(
        model=LitGPTModel(checkpoint, device="cpu", batch_size=4), tasks=tasks, task_manager=manager, log_samples=True
    )
    samples = sorted(results["samples"]["local_hellaswag"], key=lambda sample: sample["doc_id"])
    ours = answers(checkpoint, hellaswag_file, "lm-eval")
    assert len(samples) == len(ours) == 24
    for sample, answer in zip(samples, ours, strict=True):
        assert [response[0] for response in sample["filtered_resps"]] == pytest.approx(answer.sums, abs=1e-4)
        assert (sample["acc"], sample["acc_norm"]) == (answer.acc, answer.acc_norm)
    assert {answer.acc for answer in ours} == {True, False}


def test_build_nanogpt_by_hand(checkpoint, hellaswag_file):
    tokenizer = load_tokenizer(checkpoint).processor
    model = load_model(checkpoint, torch.device("cpu"))
    for question, answer in zip(questions(24)[:5], answers(checkpoint, hellaswag_file, "build-nanogpt"), strict=False):
        for ending, total, mean in zip(question["endings"], answer.sums, answer.means, strict=True):
            context, continuation = tokenizer.encode(question["ctx"]).ids, tokenizer.encode(" " + ending).ids
            logprobs = model(torch.tensor([context + continuation]))[0, :-1].log_softmax(-1)
            expected = sum(logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))
            assert total == pytest.approx(expected, abs=1e-3)
            assert mean == pytest.approx(expected / len(continuation), abs=1e-3)


def test_rules_read_different_texts(monkeypatch):
    fields = {
        **questions(1)[0],
        "activity_label": "Ice",
        "ctx_a": "He [header] runs.",
        "ctx_b": "then he",
        "ctx": "raw",
    }
    fields["endings"] = ["falls [title] down", "sits", "[step]", "b"]
    read = {}
    for rule in ("build-nanogpt", "lm-eval"):
        texts: list[str] = []
        asked = as_question(Item(fields, 1), rule, lambda text, texts=texts: texts.append(text) or [1] * len(text))
        read[rule] = texts[:2], asked.lengths
    assert read["build-nanogpt"] == (["raw", " falls [title] down"], [19, 5, 7, 2])
    assert read["lm-eval"] == (["Ice: He runs. Then he", "Ice: He runs. Then he falls. down"], [11, 4, 0, 1])
    monkeypatch.setattr(hellaswag, "score_continuations", lambda *_: [-22.0, -4.0, -0.5, -3.0])
    (answer,) = evaluate(None, [asked], 4, lambda done: None)
    assert answer.means == (-2, -1, -math.inf, -3)
    assert (answer.acc, answer.acc_norm) == (False, True), "an ending of which cleaning leaves nothing loses"


def test_batches_do_not_matter(checkpoint, hellaswag_file):
    one, many = (answers(checkpoint, hellaswag_file, "build-nanogpt", size) for size in (1, 50))
    assert [a.sums for a in one] == [pytest.approx(b.sums, abs=1e-4) for b in many]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 must be JSON"),
        ('{"ind": 1}', "lacks 'activity_label'"),
        (json.dumps({**questions(1)[0], "label": ""}), "label ''"),
        (json.dumps({**questions(1)[0], "endings": ["a"]}), "1 endings"),
        (json.dumps({**questions(1)[0], "ctx": "\ud800"}), "line 2 must be JSON; .* surrogates not allowed"),
        (f'{{"ind": {"9" * 5000}}}', "line 2 must be JSON; Exceeds the limit"),
    ],
)
def test_files_that_are_something_else(tmp_path, line, message):
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(questions(1)[0]) + "\n" + line)
    with pytest.raises(ValueError, match=message):
        load_items(path)
    assert len(load_items(path, limit=1)) == 1


def test_command_names_the_rule(checkpoint, hellaswag_file, tmp_path, capsys):
    result = tmp_path / "result.json"
    arguments = ["hellaswag", str(checkpoint), f"--file={hellaswag_file}", "--rule=build-nanogpt", f"--json={result}"]
    assert main(arguments) == 0
    assert "rule build-nanogpt, 24 questions" in capsys.readouterr().out
    content = json.loads(result.read_text())
    expected = answers(checkpoint, hellaswag_file, "build-nanogpt")
    assert content["acc"] == sum(answer.acc for answer in expected) / 24
    assert content["rule"] == "build-nanogpt"


def test_a_context_that_is_too_long_loses_its_beginning():
    """Sums are in float32, whatever the logits are in."""

    class Bigrams(torch.nn.Module):
        max_seq_length = 4
        config = SimpleNamespace(padded_vocab_size=9)

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(9, 9, dtype=torch.bfloat16)

        def forward(self, ids):
            self.read = ids.tolist()
            return self.table(ids)

    model = Bigrams()
    (score,) = score_continuations(model, [Continuation([1, 2, 3, 4, 5], [6, 7])], 1, lambda done: None)
    assert model.read == [[3, 4, 5, 6]]
    logprobs = model.table.weight.float().log_softmax(-1)
    assert score == pytest.approx((logprobs[5, 6] + logprobs[6, 7]).item(), rel=1e-6)
    losses, _ = token_losses(model, torch.tensor([5, 6, 7]), 1, lambda done: None)
    assert losses.tolist() == pytest.approx([-logprobs[5, 6].item(), -logprobs[6, 7].item()], rel=1e-6)


def test_an_ending_that_the_model_cannot_read_is_an_error_in_one_line(checkpoint, tmp_path, capsys):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text(json.dumps({**questions(1)[0], "endings": ["a", "b", "c", "the " * 70]}))
    assert main(["hellaswag", str(checkpoint), f"--file={path}"]) == 2
    assert re.search(r"^error: file: an ending of 7\d tokens must have 1 to 64, .*;", capsys.readouterr().err)


def test_a_question_that_is_none_is_named(tmp_path):
    """Null, text that is empty, bytes that are no text, JSON that is too deep: file and line, in one line."""
    good = questions(3)
    changes = {
        "null": {"ctx": None},
        "null ending": {"endings": ["a", None, "b", "c"]},
        "null label": {"label": None},
        "list": [],
    }
    lines = {name: json.dumps({**good[1], **change} if change else []).encode() for name, change in changes.items()}
    lines |= {"bytes": b"\xff\xfe", "deep": b"[" * 100_000}
    path = tmp_path / "hellaswag_val.jsonl"
    for name, line in lines.items():
        path.write_bytes(json.dumps(good[0]).encode() + b"\n" + line)
        with pytest.raises(SettingsError, match=rf"file: .*{path.name}, line 2 ") as caught:
            load_items(path)
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize(
    ("rule", "change", "cause"),
    [
        ("build-nanogpt", {"ctx": ""}, "ctx must hold text"),
        ("lm-eval", {"activity_label": "", "ctx_a": "", "ctx_b": "", "ctx": ""}, None),
    ],
)
def test_empty_text_names_its_question(checkpoint, tmp_path, rule, change, cause):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text("\n".join(json.dumps(question) for question in (questions(1)[0], {**questions(8)[7], **change})))
    encode = encoder(load_tokenizer(checkpoint))
    items = load_items(path)
    as_question(items[0], rule, encode)
    if cause is None:
        # What is left is the colon after the label.
        assert as_question(items[1], rule, encode).requests[0].context
        return
    with pytest.raises(SettingsError, match=f"{path.name}, line 2: {cause}; remove question 7"):
        as_question(items[1], rule, encode)
