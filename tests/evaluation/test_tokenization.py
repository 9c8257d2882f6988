"""Texts and tokens that a model has no embedding for, or that are none."""

import json
import re

import pytest
from lm_eval.api.instance import Instance

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.harness.model import LitGPTModel

QUESTION = {
    "ind": 1,
    "activity_label": "a",
    "ctx_a": "beyond",
    "ctx_b": "b",
    "ctx": "beyond",
    "endings": ["x"] * 4,
    "label": 1,
}


UNUSED = [f"unused{number}" for number in range(300, 309)]
BEYOND = (
    "checkpoint_dir: its tokenizer has token id 309, beyond the model's padded_vocab_size: 304; copy that of the "
    "training data there"
)


def add_tokens(checkpoint, words):
    """Add tokens to the tokenizer of a checkpoint, behind those that it has."""
    file = checkpoint / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for word in words:
        tokenizer["added_tokens"].append({"id": 300 + len(tokenizer["added_tokens"]) - 1, "content": word, **flags})
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("command", ["chat", "experts", "hellaswag", "perplexity"])
def test_a_tokenizer_of_a_larger_model_is_named(command, finished, tmp_path, capsys):
    """Only where a text has such a token: others may have been added for nothing."""
    checkpoint = finished(tmp_path / "out") / "final"
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("a word beyond the model")
    questions.write_text(json.dumps(QUESTION))
    arguments = {
        "chat": ["--prompt", text.read_text(), "--max_new_tokens", "1"],
        "experts": ["--text", str(text), "--out_dir", str(tmp_path / "experts")],
        "hellaswag": ["--file", str(questions)],
        "perplexity": ["--text", str(text)],
    }
    for words in (UNUSED, ["beyond"]):
        add_tokens(checkpoint, words)
        status = main([command, str(checkpoint), *arguments[command]])
        assert status == (0 if words is UNUSED else 2), capsys.readouterr()
    assert capsys.readouterr().err == f"error: {BEYOND}\n"


def test_lm_eval_names_it_too(finished, tmp_path):
    checkpoint = finished(tmp_path / "out") / "final"
    add_tokens(checkpoint, [*UNUSED, "beyond"])
    model = LitGPTModel(checkpoint, device="cpu")
    assert model.loglikelihood([Instance("loglikelihood", {}, ("a word", " of it"), 0)])
    with pytest.raises(SettingsError, match=f"^{re.escape(BEYOND)}$"):
        model.loglikelihood([Instance("loglikelihood", {}, ("a word", " beyond it"), 0)])


def test_a_prompt_of_bytes_that_are_no_characters(finished, tmp_path, capsys):
    checkpoint = finished(tmp_path / "out") / "final"
    assert main(["chat", str(checkpoint), "--prompt", "a\udcff"]) == 2
    assert capsys.readouterr().err.startswith("error: text: 'a\\udcff' is not Unicode (")
