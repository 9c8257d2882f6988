"""Whole runs through `run_train.py` on each kind of data: LitGPT's loop, our hooks, padding, W&B, resume."""

import numpy as np
import pytest
from litgpt.tokenizer import Tokenizer

from litgpt_moe_ext.data import TinyStories
from litgpt_moe_ext.data.tokenizer import BPESettings, train_bpe
from litgpt_moe_ext.training.cli import main
from tests.data.test_text import TRAIN, VAL, tiny_txt
from tests.data.test_wandb import REFERENCE, clean, server  # noqa: F401
from tests.training.conftest import corpus_settings, logged, recipe  # noqa: F401

pytestmark = pytest.mark.slow


def losses(out_dir) -> list[float]:
    return [float(loss) for loss in logged(out_dir, "loss").values()]


def run(file, *arguments) -> None:
    assert main(["--config", str(file), *arguments]) == 0


def stories(tmp_path, **settings) -> dict:
    tiny_txt(tmp_path)
    init_args = {
        "source_path": str(tmp_path),
        "data_path": str(tmp_path / "cache"),
        "bpe": {"vocab_size": 300},
        **settings,
    }
    return {"class_path": "litgpt_moe_ext.data.TinyStories", "init_args": init_args}


@pytest.mark.parametrize("packing", ["stream", "best_fit", "pad"])
def test_text(recipe, tmp_path, packing):  # noqa: F811
    run(recipe(data=stories(tmp_path, packing=packing)))
    found = losses(tmp_path / "out")
    assert len(found) == 12
    assert found[-1] < found[0] - 0.3
    assert (tmp_path / "out" / "final" / "tokenizer.json").is_file()


def test_resume_in_the_middle_of_an_epoch(recipe, tmp_path):  # noqa: F811
    data = stories(tmp_path, packing="best_fit")
    train = {"max_tokens": 30 * 4 * 32, "save_interval": 7}
    run(recipe("whole", data=data, train=train, out_dir=str(tmp_path / "whole")))
    parts = recipe("parts", data=data, train=train, out_dir=str(tmp_path / "parts"))
    run(parts, "--train.max_steps", "7")
    run(parts, "--resume", str(tmp_path / "parts" / "step-00000007"))
    assert logged(tmp_path / "parts", "loss") == logged(tmp_path / "whole", "loss")


def test_token_shards_and_their_vocabulary(recipe, tmp_path, capsys):  # noqa: F811
    shards = tmp_path / "shards"
    shards.mkdir()
    tokens = np.tile(np.arange(300, dtype="<u2"), 20)
    for number, part in enumerate(np.array_split(tokens, 3)):
        np.save(shards / f"edu_{'train' if number else 'val'}_{number:06}.npy", part)
    data = {"class_path": "litgpt_moe_ext.data.TokenShards", "init_args": {"data_path": str(shards)}}
    run(recipe(data=data))
    found = losses(tmp_path / "out")
    assert found[-1] < found[0] - 0.3
    assert "ids below 304" in capsys.readouterr().out
    np.save(shards / "edu_train_000001.npy", np.full(500, 304, "<u2"))
    assert main(["--config", str(recipe(data=data))]) == 2
    assert "edu_train_000001.npy has token id 304 at token 0 (byte 128)" in capsys.readouterr().err


def test_an_artifact_instead_of_the_recipes_data(recipe, tmp_path, server, capsys):  # noqa: F811
    run(recipe(), "--wandb-dataset", REFERENCE, "--wandb-artifacts-dir", str(tmp_path / "artifacts"))
    assert f"Using the W&B artifact {REFERENCE} in {tmp_path / 'artifacts' / 'corpus-v3'}" in capsys.readouterr().out
    assert losses(tmp_path / "out")


def test_litgpts_own_modules(recipe, tmp_path):  # noqa: F811
    """Chunks in litdata's format, written without its processes, which take minutes to start on a busy machine."""
    from litdata.streaming import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    train_bpe(TRAIN, BPESettings(300), tmp_path / "tokenizer")
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    for split, texts in (("train", TRAIN), ("val", VAL)):
        writer = BinaryWriter(str(tmp_path / split), chunk_bytes="50MB", item_loader=TokensLoader(block_size=33))
        for number, text in enumerate(texts):
            writer[number] = tokenizer.encode(text, eos=True)
        writer.done()
        writer.merge(1)
    init_args = {"data_path": str(tmp_path), "split_names": ["train", "val"], "num_workers": 0}
    data = {"class_path": "litgpt.data.LitData", "init_args": init_args}
    run(recipe(data=data, tokenizer_dir=str(tmp_path / "tokenizer")))
    assert len(losses(tmp_path / "out")) == 12


def test_the_settings_of_a_run_name_its_data(recipe, tmp_path):  # noqa: F811
    run(recipe(data=stories(tmp_path)), "--train.max_steps", "1")
    text = (tmp_path / "out" / "final" / "hyperparameters.yaml").read_text()
    assert "vocab_size: 300" in text
    assert TinyStories.__name__ in text
