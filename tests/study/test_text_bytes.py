"""Bytes per token, against the text of each token by itself."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from litgpt import Tokenizer

from litgpt_moe_ext.data import PythonStdlib, TextCorpus
from litgpt_moe_ext.data.pipeline.store.finished import open_corpus
from litgpt_moe_ext.inspect.recipes import Recipe
from litgpt_moe_ext.study.text_bytes import bytes_per_token
from litgpt_moe_ext.tokens.padding import PADDING
from tests.models import moe_config
from tests.settings import recipe_with

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
    return recipe_with(moe_config(), settings)


def test_bytes_per_token(recipe, capsys):
    """The text is ASCII, so every token is text of its own."""
    data = PythonStdlib(**recipe.settings.data["init_args"])
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


def test_what_fills_up_rows_of_whole_documents_stands_for_no_text(recipe):
    arguments = recipe.settings.data["init_args"]
    arguments["packing"] = "pad"
    (Path(arguments["source_path"]) / "e.py").write_text("e = 1\n")
    data = PythonStdlib(**arguments)
    data.connect(None, 2, LENGTH)
    data.prepare_data()
    data.setup()
    recipe.settings.eval.max_iters = 1000
    targets = torch.cat([batch[:, 1:].flatten() for batch in data.val_dataloader()])
    text = targets[targets != PADDING].tolist()
    assert 0 < len(text) < len(targets)
    tokenizer_dir = data.corpus_path / "tokenizer"
    n_byte = len(Tokenizer(tokenizer_dir).processor.decode(text).encode())
    assert bytes_per_token(recipe, tokenizer_dir) == n_byte / len(text)


def text_corpus(recipe: Recipe, folder: Path, **more) -> TextCorpus:
    """Have a recipe read the files as text of any kind."""
    arguments = {"source_path": folder / "text", "data_path": folder / "data", "pattern": "*.py", "val_fraction": 0.5}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in (arguments | more).items()}
    recipe.settings.data = {"class_path": "litgpt_moe_ext.data.TextCorpus", "init_args": plain}
    return TextCorpus(**arguments, **more)


def test_characters_of_several_tokens_and_an_end_of_text_that_is_not_marked_as_special(recipe, tmp_path):
    """As if the text were read from its first token to its last."""
    for name in "abcdefgh":
        text = "".join(chr(0x4E00 + ord(name) * i) for i in range(30))
        (tmp_path / "text" / f"{name}.py").write_text(text)
    tokenizer_dir = shutil.copytree(
        PythonStdlib(**recipe.settings.data["init_args"]).prepare() / "tokenizer", tmp_path / "tokenizer"
    )
    content = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    content["added_tokens"][0]["special"] = False
    (tokenizer_dir / "tokenizer.json").write_text(json.dumps(content))
    corpus = text_corpus(recipe, tmp_path, tokenizer_dir=tokenizer_dir).prepare()
    tokens = np.concatenate(open_corpus(corpus)[1])[1 : 1 + 3 * 2 * LENGTH].tolist()
    assert tokens.count(0) > 0
    text = Tokenizer(tokenizer_dir).processor.decode([token for token in tokens if token])
    assert bytes_per_token(recipe, tokenizer_dir) == len(text.encode()) / len(tokens)


def test_the_tokenizer_of_the_run_has_encoded_the_corpus(recipe, tmp_path):
    tokenizer_dir = PythonStdlib(**recipe.settings.data["init_args"]).prepare() / "tokenizer"
    corpus = text_corpus(recipe, tmp_path)
    recipe.settings.tokenizer_dir = tokenizer_dir
    assert math.isnan(bytes_per_token(recipe, tokenizer_dir)), "a page prepares no corpus"
    assert len(list((tmp_path / "data").glob("[!.]*"))) == 1
    corpus.prepare(tokenizer=Tokenizer(tokenizer_dir))
    assert bytes_per_token(recipe, tokenizer_dir) > 1


def test_a_corpus_that_came_prepared_has_bytes_too(recipe):
    corpus = PythonStdlib(**recipe.settings.data["init_args"])
    expected = bytes_per_token(recipe, tokenizer_dir := corpus.prepare() / "tokenizer")
    arguments = {"corpus_dir": str(tokenizer_dir.parent)}
    recipe.settings.data = {"class_path": "litgpt_moe_ext.data.PreparedCorpus", "init_args": arguments}
    assert bytes_per_token(recipe, tokenizer_dir) == expected > 1


def test_without_the_corpus_or_a_tokenizer_the_length_is_unknown(recipe, tmp_path):
    assert math.isnan(bytes_per_token(recipe, tmp_path))
    assert not (tmp_path / "data").exists()
    corpus = PythonStdlib(**recipe.settings.data["init_args"]).prepare()
    assert math.isnan(bytes_per_token(recipe, tmp_path))
    shutil.rmtree(tmp_path / "text")
    assert math.isnan(bytes_per_token(recipe, corpus / "tokenizer"))
