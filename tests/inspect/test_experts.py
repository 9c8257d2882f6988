"""Routing as it is recorded from models, and the report about it."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from litgpt import GPT
from tokenizers import Tokenizer

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.data.pipeline.shards import write_shard
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.loading import load_tokenizer
from litgpt_moe_ext.inspect import figures
from litgpt_moe_ext.inspect.experts.analysis import classify, compare, require_same_tokenizer
from litgpt_moe_ext.inspect.experts.capture import record_routing
from litgpt_moe_ext.inspect.experts.report import _summary_table, make_figures
from litgpt_moe_ext.inspect.texts import Document, encode, open_tokens, processor_of, read_files, shard_documents
from litgpt_moe_ext.moe.expert_layouts import unstack_experts
from tests.evaluation.conftest import VOCABULARY_SIZE, write_checkpoint
from tests.models import initialized_model, moe_config, noisy_config

TEXTS = [[1, 2, 3, 4, 5, 6, 7], list(range(40, 60)) * 3]


def record(model, batch_size=3):
    return record_routing(model.eval(), TEXTS, batch_size, lambda tokens: None)


@pytest.mark.parametrize("make", [moe_config, noisy_config])
def test_a_router_built_by_hand_has_known_statistics(make):
    """Every token has the same first embedding element, so the gate's first column decides."""
    model = initialized_model(make(n_layer=1))
    model.transformer.wte.weight.data.zero_()
    model.transformer.wte.weight.data[:, 0] = 1.0
    for name, parameter in model.transformer.h[0].attn.named_parameters():
        if name.startswith("proj"):
            parameter.data.zero_()
    gate = model.transformer.h[0].mlp.gate
    gate.weight.data.zero_()
    gate.weight.data[[2, 5], 0] = torch.tensor([0.3, 0.2])
    (layer,) = record(model)
    assert layer.experts_NK.sort(dim=1).values.tolist() == [[2, 5]] * 67
    logits = torch.tensor([0.3, 0.2]) * 16**0.5  # RMSNorm of a unit vector of 16 elements
    best = layer.weights_NK.gather(1, layer.experts_NK.argsort(dim=1))
    expected = logits.softmax(dim=0) if make is noisy_config else logits.sigmoid()
    assert torch.allclose(best, expected.expand(67, 2), atol=1e-4)


def test_padding_and_batches_do_not_count():
    model = initialized_model(moe_config())
    one_by_one, together = record(model, 1), record(model, 8)
    assert [layer.layer for layer in together] == [0, 1]
    for a, b in zip(one_by_one, together, strict=True):
        assert len(a.experts_NK) == sum(map(len, TEXTS))
        assert torch.equal(a.experts_NK.sort().values, b.experts_NK.sort().values)
        assert torch.allclose(a.entropy_N, b.entropy_N, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"router_score_function": "softmax", "norm_topk_prob": True},
        {"norm_topk_prob": True, "n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2},
    ],
    ids=["linear", "grouped"],
)
def test_llama_moe_is_read_like_ours(settings):
    ours = initialized_model(moe_config(routed_scaling_factor=2.0, **settings))
    settings.pop("router_score_function", None)
    theirs = GPT(moe_config(mlp_class_name="LLaMAMoE", routed_scaling_factor=2.0, **settings))
    state = unstack_experts(ours.state_dict())
    theirs.load_state_dict({k: v for k, v in state.items() if k in theirs.state_dict()})
    for a, b in zip(record(ours), record(theirs), strict=True):
        order_a, order_b = a.experts_NK.argsort(dim=1), b.experts_NK.argsort(dim=1)
        assert torch.equal(a.experts_NK.gather(1, order_a), b.experts_NK.gather(1, order_b))
        assert torch.allclose(a.weights_NK.gather(1, order_a), b.weights_NK.gather(1, order_b), atol=1e-5)
        assert torch.allclose(a.entropy_N, b.entropy_N, atol=1e-5)


def test_a_dense_model_is_refused(llama_dir, capsys, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("the quick brown fox")
    assert main(["experts", str(llama_dir), f"--text={text}"]) == 2
    assert "mlp_class_name: LLaMAMLP" in capsys.readouterr().err


def test_shards_are_read_by_document(moe_dir, tmp_path):
    tokenizer = load_tokenizer(moe_dir)
    texts = ["the quick brown fox", "is it so?"]
    ids = [tokenizer.processor.encode(text).ids for text in texts]
    tokens = np.array([*ids[0], tokenizer.eos_id, *ids[1], tokenizer.eos_id])
    write_shard(tmp_path / "val.bin", tokens, VOCABULARY_SIZE)
    documents = list(shard_documents(open_tokens(tmp_path, tokenizer), tokenizer, "val"))
    assert documents == [Document("val:0", texts[0]), Document("val:1", texts[1])]
    encoded = encode(documents, tokenizer, max_tokens=len(ids[0]) + 1)
    assert [document.ids for document in encoded] == [ids[0], ids[1][:1]]
    with pytest.raises(SettingsError, match="token shard"):
        open_tokens(tmp_path / "nothing", tokenizer)
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, there in (("web_train_1.bin", tokens[:3]), ("web_val_0.bin", tokens)):
        write_shard(shards / name, there, VOCABULARY_SIZE)
    assert (open_tokens(shards, tokenizer) == tokens).all()
    (tmp_path / "tokenizer").mkdir()
    file = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer.processor.save(str(file))
    assert (open_tokens(tmp_path, tokenizer) == tokens).all()
    other = Tokenizer.from_file(str(file))
    other.add_tokens(["slow"])
    other.save(str(file))
    with pytest.raises(SettingsError, match="was prepared with another tokenizer than the checkpoint's"):
        open_tokens(tmp_path / "val.bin", tokenizer)
    file.write_text("{")
    with pytest.raises(SettingsError, match="tokenizer.json' is not a tokenizer"):
        open_tokens(tmp_path, tokenizer)


def test_texts_that_cannot_be_read_are_named(moe_dir, tmp_path):
    with pytest.raises(SettingsError, match=r"text: '.*nothing.txt' must be a file"):
        list(read_files([tmp_path / "nothing.txt"]))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("né".encode("latin-1"))
    with pytest.raises(SettingsError, match=r"text: '.*latin.txt' must be plain text in UTF-8: .* with --data"):
        list(read_files([latin]))
    with pytest.raises(SettingsError, match="at least one token of text"):
        encode([Document("a", "")], load_tokenizer(moe_dir), 10)
    with pytest.raises(SettingsError, match="checkpoint_dir: its tokenizer must be a tokenizer.json"):
        processor_of(SimpleNamespace(processor="SentencePiece's"))


@pytest.mark.parametrize(
    ("name", "text", "language"),
    [
        ("val:0", "def f(x):\n    return x\n", "python"),
        ("val:0", "import os\ndef f(x):\n    return (x,\n", "python"),
        ("val:0", "a fox jumps", "text"),
        ("fox.py", "a fox jumps", "python"),
        ("val:0", "-" * 10_000, "text"),
    ],
)
def test_language_is_found(moe_dir, name, text, language):
    encoded = encode([Document(name, text)], load_tokenizer(moe_dir), 100)
    assert classify(encoded, "auto")[0] == language


def test_only_checkpoints_that_are_alike_are_compared(moe_dir, tmp_path):
    one, two = (record(initialized_model(moe_config(n_expert_per_token=k))) for k in (1, 2))
    with pytest.raises(SettingsError, match=r"must be \[\(0, 8, 1\), \(1, 8, 1\)\] as in checkpoint_dir, not"):
        compare(one, two)
    tokenizers = [load_tokenizer(moe_dir), load_tokenizer(moe_dir)]
    require_same_tokenizer([moe_dir, tmp_path], tokenizers)
    tokenizers[1].processor.add_tokens(["slow"])
    with pytest.raises(SettingsError, match=f"compare_with: '{tmp_path}' must have the tokenizer of '{moe_dir}'"):
        require_same_tokenizer([moe_dir, tmp_path], tokenizers)


def test_checkpoints_of_one_name_are_told_apart(monkeypatch):
    for name in ("load", "balance", "class"):
        monkeypatch.setattr(figures, f"{name}_figure", lambda _layers: None)
    monkeypatch.setattr(figures, "agreement_figure", lambda _layers, names: names)
    for second, names in (("b/final", ("A", "B")), ("b/step", ("final", "step"))):
        comparison = {"checkpoint": second, "layers": [{}]}
        made = make_figures({"checkpoint": "a/final", "layers": [{"top_k": 1}], "comparison": comparison})
        assert made == {"load": None, "balance": None, "classes": None, "agreement": names}


def test_the_busiest_and_the_idlest_expert_are_named():
    layer = {"layer": 3, "max_vio": 0.6, "dead_experts": 0, "load_over_mean": [1.0, 1.6, 0.4], "router_entropy": None}
    assert "<td>1 (1.60)</td><td>2 (0.40)</td><td>none</td>" in _summary_table([layer])


def test_report_needs_nothing_else(moe_dir, tmp_path, capsys):
    other = tmp_path / "other"
    config = moe_config(
        n_shared_expert=1, vocab_size=VOCABULARY_SIZE, padded_vocab_size=VOCABULARY_SIZE, lm_head_bias=True
    )
    write_checkpoint(other, config)
    text = tmp_path / "a.txt"
    text.write_text("the quick brown fox jumps over the lazy dog <b> & is it so? " * 5)
    out = tmp_path / "report"
    arguments = ["experts", str(moe_dir), f"--text={text}", f"--out_dir={out}", f"--compare_with={other}"]
    assert main([*arguments[:-1], f"--compare_with={out}"]) == 2
    assert f"error: compare_with: '{out}' is not a directory" in capsys.readouterr().err
    assert main(arguments) == 0
    assert {path.name for path in out.glob("*.png")} == {
        f"{name}.png" for name in ("load", "balance", "classes", "coactivation", "agreement")
    }
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=\"(?!data:)|<script|@import", page)
    assert "&lt;" in page
    analysis = json.loads((out / "experts.json").read_text())
    layers = analysis["layers"]
    assert len(layers) == 2
    for layer in layers:
        assert sum(layer["load"]) == 2 * analysis["tokens"]
        mean = sum(layer["load"]) / layer["n_expert"]
        assert layer["load_over_mean"] == pytest.approx([load / mean for load in layer["load"]])
        assert sum(layer["gate_mass"]) == pytest.approx(1)
        assert sum(sum(row) for row in layer["class_counts"].values()) == 2 * analysis["tokens"]
        assert set(layer["class_counts"]) == set(analysis["classes"]), "those that the text has"
    assert 0 <= analysis["comparison"]["layers"][0]["matched"] <= 1
    assert str(out / "report.html") in capsys.readouterr().out
