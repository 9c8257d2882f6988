"""Perplexity and bits per byte of models whose predictions are known."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.data.pipeline.shards import write_shard
from litgpt_moe_ext.evaluation.loading import load_model, load_tokenizer
from litgpt_moe_ext.evaluation.perplexity import summarize
from litgpt_moe_ext.evaluation.scoring import token_losses
from tests.evaluation.conftest import VOCABULARY_SIZE


def test_summary_by_hand():
    losses = torch.tensor([3.0, 2.0, 2.0, 1.0, 3.0])
    result = summarize(losses, torch.tensor([1, 2, 3, 4, 1]), n_byte=4)
    assert (result.tokens, result.loss) == (5, pytest.approx(11 / 5))
    assert result.perplexity == pytest.approx(math.exp(11 / 5))
    assert result.bits_per_byte == pytest.approx(11 / math.log(2) / 4)
    assert [(row["first"], row["last"], row["loss"], row["tokens"]) for row in result.by_position] == [
        (1, 1, 3.0, 2),
        (2, 3, 2.0, 2),
        (4, 4, 1.0, 1),
    ]
    with pytest.raises(ValueError, match="0 bytes"):
        summarize(losses, torch.ones(5), n_byte=0)


def test_a_loss_beyond_all_floats(llama_dir, tmp_path, capsys):
    """Of weights that are right; of those that are not finite every figure would be chance."""
    checkpoint = shutil.copytree(llama_dir, tmp_path / "checkpoint")
    weights = torch.load(checkpoint / "lit_model.pth")
    (tmp_path / "a.txt").write_text("the quick brown fox")
    command = ["perplexity", str(checkpoint), f"--text={tmp_path / 'a.txt'}", f"--json={tmp_path / 'result.json'}"]
    torch.save({**weights, "lm_head.weight": 1e6 * weights["lm_head.weight"]}, checkpoint / "lit_model.pth")
    assert main(command) == 0
    assert "perplexity inf" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["perplexity"] is None
    assert result["loss"] > 1000
    torch.save({**weights, "lm_head.weight": torch.nan * weights["lm_head.weight"]}, checkpoint / "lit_model.pth")
    assert main(command) == 2
    assert "has weights that are not finite in torch.float32 (lm_head.weight)" in capsys.readouterr().err


def test_every_token_is_predicted_once(llama_dir):
    model = load_model(llama_dir, torch.device("cpu"))
    ids = torch.randint(0, VOCABULARY_SIZE, (75,))
    losses, contexts = token_losses(model, ids, 2, lambda done: None)
    assert contexts.tolist() == [*range(1, 33), *range(1, 33), *range(1, 11)]
    expected = []
    for start in (0, 32, 64):
        window = ids[start : start + 33]
        logits = model(window[None, :-1])[0]
        expected.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    assert torch.allclose(losses, torch.cat(expected), atol=1e-4)


def test_the_last_token_of_a_full_window_begins_no_other(llama_dir):
    """And a text of one token predicts none."""
    model, ids = load_model(llama_dir, torch.device("cpu")), torch.randint(0, VOCABULARY_SIZE, (65,))
    for length, expected in ((65, [32, 32]), (66, [32, 32, 1])):
        done = []
        losses, _ = token_losses(model, torch.cat([ids, ids])[:length], 1, done.append)
        assert (len(losses), done) == (length - 1, expected)
    assert [len(values) for values in token_losses(model, ids[:1], 1, done.append)] == [0, 0]


def test_command_on_a_shard_and_on_text(llama_dir, tmp_path, capsys):
    tokenizer = load_tokenizer(llama_dir)
    text = "the quick brown fox jumps over the läzy dög"
    ids = tokenizer.processor.encode(text).ids
    for i, part in enumerate(np.array_split([tokenizer.eos_id, *ids], 2)):  # as a preparation names them
        write_shard(tmp_path / f"val_{i:05d}.bin", part, VOCABULARY_SIZE)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8-sig")  # the mark is not text
    results = []
    for source in (f"--data={tmp_path}", f"--text={tmp_path / 'a.txt'}"):
        path = tmp_path / "result.json"
        assert main(["perplexity", str(llama_dir), source, f"--json={path}"]) == 0
        results.append(json.loads(path.read_text()))
    assert results[0] == results[1]
    assert (results[0]["tokens"], results[0]["bytes"]) == (len(ids), len(text) + 2)
    assert "bits per byte" in capsys.readouterr().out
    write_shard(tmp_path / "one.bin", np.array([5]), VOCABULARY_SIZE)
    assert main(["perplexity", str(llama_dir), f"--data={tmp_path / 'one.bin'}"]) == 2
    assert "text, data: 0 tokens to predict" in capsys.readouterr().err


def test_a_text_without_a_token_that_ends_one(llama_dir, tmp_path, capsys):
    checkpoint = shutil.copytree(llama_dir, tmp_path / "checkpoint")
    (checkpoint / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    assert main(["perplexity", str(checkpoint), f"--text={__file__}"]) == 2
    assert "add eos_token to its tokenizer_config.json, or give --data SHARD" in capsys.readouterr().err


def test_foreign_tokens_are_refused(llama_dir, tmp_path, capsys):
    write_shard(tmp_path / "val.bin", np.array([1, VOCABULARY_SIZE, 2]), VOCABULARY_SIZE + 1)
    assert main(["perplexity", str(llama_dir), f"--data={tmp_path}"]) == 2
    assert f"token id {VOCABULARY_SIZE}" in capsys.readouterr().err
