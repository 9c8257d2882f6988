"""Bytes per token, against the text of each token by itself."""

import json
import math
import shutil

import numpy as np
import pytest
from litgpt import Tokenizer

from litgpt_moe_ext.data import PythonStdlib
from litgpt_moe_ext.data.pipeline.store import open_corpus
from litgpt_moe_ext.inspect.recipes import Recipe
from litgpt_moe_ext.study.text_bytes import bytes_per_token
from tests.models import moe_config

LENGTH = 16


@pytest.fixture
def recipe(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    for name in "abcd":
        (source / f"{name}.py").write_text("".join(f"{name}{i} = '{name * 2} to be'\n" for i in range(60)))
    arguments = {
        "source_path": str(source),
        "data_path": str(tmp_path / "data"),
        "vocab_size": 300,
        "val_fraction": 0.5,
    }
    settings = {
        "data": {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": arguments},
        "train": {"micro_batch_size": 2, "max_seq_length": LENGTH},
        "eval": {"max_iters": 3},
    }
    return Recipe(moe_config(), settings)


def test_bytes_per_token(recipe, capsys):
    """The text is ASCII, so every token is text of its own."""
    data = PythonStdlib(**recipe.settings["data"]["init_args"])
    data.connect(None, 2, LENGTH)
    data.prepare_data()
    data.setup()
    capsys.readouterr()
    tokenizer_dir = data.corpus_path / "tokenizer"
    tokenizer = Tokenizer(tokenizer_dir)
    targets = [id_ for _, batch in zip(range(3), data.val_dataloader(), strict=False) for id_ in batch[:, 1:].flatten()]
    assert len(targets) == 3 * 2 * LENGTH
    n_byte = sum(len(tokenizer.processor.decode([int(id_)])) for id_ in targets)
    assert bytes_per_token(recipe, tokenizer_dir) == n_byte / len(targets) > 1
    assert capsys.readouterr().out == ""


def test_characters_of_several_tokens_and_an_end_of_text_that_is_not_marked_as_special(recipe, tmp_path):
    """As if the text were read from its first token to its last."""
    for name in "abcdefgh":
        text = "".join(chr(0x4E00 + ord(name) * i) for i in range(30))
        (tmp_path / "text" / f"{name}.py").write_text(text)
    data = PythonStdlib(**recipe.settings["data"]["init_args"])
    tokenizer_dir = data.prepare() / "tokenizer"
    tokens = np.concatenate(open_corpus(tokenizer_dir.parent)[1])[1 : 1 + 3 * 2 * LENGTH]
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    text = Tokenizer(tokenizer_dir).processor.decode(tokens.tolist())
    content["added_tokens"][0]["special"] = False
    changed = shutil.copytree(tokenizer_dir, tmp_path / "changed")
    (changed / "tokenizer.json").write_text(json.dumps(content))
    assert 0 in tokens
    assert bytes_per_token(recipe, changed) == len(text.encode()) / len(tokens)


def test_a_corpus_that_came_prepared_has_bytes_too(recipe):
    corpus = PythonStdlib(**recipe.settings["data"]["init_args"])
    expected = bytes_per_token(recipe, tokenizer_dir := corpus.prepare() / "tokenizer")
    arguments = {"corpus_dir": str(tokenizer_dir.parent)}
    recipe.settings["data"] = {"class_path": "litgpt_moe_ext.data.PreparedCorpus", "init_args": arguments}
    assert bytes_per_token(recipe, tokenizer_dir) == expected > 1


def test_without_the_corpus_or_a_tokenizer_the_length_is_unknown(recipe, tmp_path):
    assert math.isnan(bytes_per_token(recipe, tmp_path))
    assert not (tmp_path / "data").exists()
    corpus = PythonStdlib(**recipe.settings["data"]["init_args"]).prepare()
    assert math.isnan(bytes_per_token(recipe, tmp_path))
    shutil.rmtree(tmp_path / "text")
    assert math.isnan(bytes_per_token(recipe, corpus / "tokenizer"))
