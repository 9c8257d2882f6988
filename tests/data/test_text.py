"""Data modules over text: every corpus in its published form, made small; settings; tokenizers; LitGPT's calls."""

import gzip
import json
import re
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric import Fabric
from litgpt.args import TrainArgs
from litgpt.data import DataModule
from litgpt.pretrain import get_dataloaders
from litgpt.tokenizer import Tokenizer
from transformers import AutoTokenizer, GPT2TokenizerFast

from litgpt_moe_ext.data import CodeParrot, HubDataset, Mixture, PreparedCorpus, TextCorpus, TinyStories, TokenShards
from litgpt_moe_ext.data.pipeline import hashes, preparation, sources
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.hub import check_slices
from litgpt_moe_ext.data.pipeline.store.finished import TOKENIZER_DIR, open_corpus, read_manifest
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.data.tokenizer.opening import open_as_litgpt
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.evaluation.tokenization import encoder
from litgpt_moe_ext.tokens import padding
from litgpt_moe_ext.tokens.padding import PADDING, PaddedRows
from tests.data.test_readers import tar
from tests.data.test_text_corpus import stories, texts_in

BPE = BPESettings(300, ("</s>",))
TRAIN, VAL = stories(40, 1) + stories(40, 2), stories(20, 3)


def lists(texts, field):
    return json.dumps([{field: text, "summary": ""} for text in texts]).encode()


def lines(texts, field):
    return "".join(json.dumps({field: text, "repo_name": "x"}) + "\n" for text in texts).encode()


def write_parquet(path, texts):
    pq.write_table(pa.table({"text": texts}), path)


def code_parrot(folder):
    for number, texts in ((1, stories(40, 1)), (2, stories(40, 2)), (54, VAL)):
        (folder / f"file-{number:012}.json.gz").write_bytes(gzip.compress(lines(texts, "content")))
    return CodeParrot(source_path=folder, data_path=folder / "cache", bpe=BPE)


def tiny_parquet(folder):
    write_parquet(folder / "train-00000-of-00002.parquet", stories(40, 1))
    write_parquet(folder / "train-00001-of-00002.parquet", stories(40, 2))
    write_parquet(folder / "validation-00000-of-00001.parquet", VAL)
    write_parquet(folder / "prompts.parquet", ["No story."])
    return TinyStories(source_path=folder, data_path=folder / "cache", bpe=BPE)


def tiny_lists(folder):
    for number, texts in enumerate((VAL, stories(40, 1), stories(40, 2))):
        (folder / f"data{number:02}.json").write_bytes(lists(texts, "story"))
    (folder / "info.json").write_bytes(lists(["No story."], "story"))
    return TinyStories(source_path=folder, data_path=folder / "cache", bpe=BPE)


def tiny_archive(folder):
    parts = enumerate((VAL, stories(40, 1), stories(40, 2)))
    archive = folder / "TinyStories_all_data.tar.gz"
    archive.write_bytes(tar({f"./data{number:02}.json": lists(texts, "story") for number, texts in parts}))
    return TinyStories(source_path=archive, data_path=folder / "cache", bpe=BPE)


def tiny_txt(folder):
    for name, texts in (("train", TRAIN), ("valid", VAL)):
        content = "".join(f"{text}\n<|endoftext|>\n" for text in texts)
        (folder / f"TinyStoriesV2-GPT4-{name}.txt").write_text(content, encoding="utf-8")
    (folder / "LICENSE.txt").write_text("No story.")
    return TinyStories(source_path=folder, data_path=folder / "cache", bpe=BPE)


def text_folder(folder):
    for split, texts in (("train", TRAIN), ("val", VAL)):
        for number, text in enumerate(texts):
            path = folder / split / f"part{number // 10}" / f"{number:03}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return TextCorpus(source_path=folder / "train", val_path=folder / "val", data_path=folder / "cache", bpe=BPE)


def json_lines(folder):
    (folder / "train.jsonl").write_bytes(lines(TRAIN, "body"))
    (folder / "val.jsonl").write_bytes(lines(VAL, "body"))
    return TextCorpus(
        source_path=folder / "train.jsonl",
        val_path=folder / "val.jsonl",
        field="body",
        data_path=folder / "cache",
        bpe=BPE,
    )


def hub(folder):
    source = folder / "source"
    source.mkdir()
    write_parquet(source / "train.parquet", TRAIN)
    write_parquet(source / "validation.parquet", VAL)
    return HubDataset(dataset=str(source), val_split="validation", data_path=folder / "cache", bpe=BPE)


FORMS = [code_parrot, tiny_parquet, tiny_lists, tiny_archive, tiny_txt, text_folder, json_lines, hub]


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_corpus_in_its_own_form(tmp_path, form, capsys):
    data = form(tmp_path)
    data.prepare_data()
    assert texts_in(data.corpus_path, "train") == TRAIN
    assert texts_in(data.corpus_path, "val") == VAL
    again = replace(data)  # its settings, nothing it has found out
    assert again.prepare(verbose=True) == data.corpus_path
    assert "Reusing" in capsys.readouterr().out


def test_what_is_known_of_files_outlives_a_preparation_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", -60.0)
    data = json_lines(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "train_bpe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    monkeypatch.setattr("hashlib.file_digest", None)  # no file is read once more
    assert data.sources(FileHashes(data.data_path))


def test_a_share_of_the_documents_validates_where_no_files_do(tmp_path):
    write_parquet(tmp_path / "a.parquet", TRAIN)
    data = TextCorpus(source_path=tmp_path, pattern="*.parquet", data_path=tmp_path / "c", bpe=BPE, val_fraction=0.3)
    data.prepare_data()
    train, val = (texts_in(data.corpus_path, split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(TRAIN)
    assert 10 < len(val) < 40


@pytest.mark.parametrize("packing", ["stream", "best_fit", "pad"])
def test_litgpt_drives_it(tmp_path, packing, monkeypatch):
    monkeypatch.setattr(padding, "_accepted", False)
    data = tiny_txt(tmp_path)
    data.packing = packing
    fabric = Fabric(accelerator="cpu", devices=1)
    tokenizer = Tokenizer(data.prepare_tokenizer())
    train = TrainArgs(micro_batch_size=2, global_batch_size=2, max_tokens=1000)
    loaders = get_dataloaders(fabric, data, tokenizer, train, block_size=32)
    batches = list(loaders[1])
    assert all(isinstance(batch, PaddedRows) == (packing != "stream") for batch in batches)
    assert padding.accepts_padding() == (packing != "stream")
    rows = torch.cat(batches)
    assert rows.shape[1] == 33
    padded = (rows == PADDING).float().mean()
    assert (padded == 0, 0 < padded < 0.1, padded > 0.2) == tuple(packing == p for p in ("stream", "best_fit", "pad"))
    if packing != "stream":
        targets = rows[:, 1:][rows[:, 1:] >= 0]
        assert len(targets) >= read_manifest(data.corpus_path)["tokens_val"] - len(rows) - len(VAL)
    state = loaders[0].state_dict()
    assert (":" in state["fingerprint"]["corpus"]) == (packing != "stream")


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path):
    """Where the settings tell, before anything is prepared; otherwise as soon as the corpus tells."""
    data = tiny_txt(tmp_path)
    data.require_vocabulary(300)
    with pytest.raises(ValueError, match="data.bpe.vocab_size: 300 means 300 tokens, .* padded_vocab_size of 299; set"):
        data.require_vocabulary(299)
    size = train_bpe(TRAIN, BPESettings(310), tmp_path / "t").get_vocab_size()
    data.bpe, data.tokenizer_dir = None, tmp_path / "t"
    with pytest.raises(
        ValueError, match=f"data.tokenizer_dir: '.*t' means {size} tokens, .*padded_vocab_size of {size - 1}"
    ):
        data.require_vocabulary(size - 1)
    assert not (tmp_path / "cache").exists()
    data.require_vocabulary(size)
    data.prepare_data()
    message = f"has a vocabulary of {size} tokens, more than the model's padded_vocab_size of {size - 1}; set"
    with pytest.raises(ValueError, match=message):
        data.require_vocabulary(size - 1)
    prepared = PreparedCorpus(data.corpus_path)
    prepared.require_vocabulary(size - 1)
    with pytest.raises(ValueError, match=message):
        prepared.prepare_data()


# ---- tokenizers


def gpt2_files(folder, names=("vocab.json", "merges.txt")):
    """GPT-2's two files, of a vocabulary trained here; the end-of-text token comes last, as in the original."""
    folder.mkdir()
    train_bpe(TRAIN, BPESettings(400), folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    ordered = sorted(model["vocab"], key=model["vocab"].get)
    for path in folder.iterdir():
        path.unlink()
    ids = {token: number for number, token in enumerate(ordered[1:] + ordered[:1])}
    (folder / names[0]).write_text(json.dumps(ids))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]) + "\n"
    (folder / names[1]).write_text(merges)
    return folder


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2_from_its_vocabulary_and_merges(tmp_path, names):
    folder = gpt2_files(tmp_path / "gpt2", names)
    data = tiny_txt(tmp_path)
    data.bpe, data.tokenizer_dir = None, folder
    ours = Tokenizer(data.prepare_tokenizer())
    theirs = GPT2TokenizerFast(vocab_file=str(folder / names[0]), merges_file=str(folder / names[1]))
    for text in [*VAL, "don't  stop\n\n 123", "🙂"]:
        assert ours.encode(text).tolist() == theirs(text)["input_ids"]
    manifest = read_manifest(data.corpus_path)
    assert manifest["eos_id"] == ours.eos_id == theirs.eos_token_id == manifest["vocab_size"] - 1


def test_a_damaged_vocabulary_of_gpt2_is_named(tmp_path):
    folder = gpt2_files(tmp_path / "gpt2")
    (folder / "merges.txt").write_text("#version: 0.2\nno merge\n")
    data = tiny_txt(tmp_path)
    data.bpe, data.tokenizer_dir = None, folder
    with pytest.raises(SettingsError, match=r"vocab.json and .*merges.txt are not a GPT-2 vocabulary"):
        data.prepare_tokenizer()


def test_a_local_directory_in_hugging_face_format(tmp_path):
    """Such as StarCoder2's: special tokens first, digits apart, saved by transformers."""
    train_bpe(TRAIN, BPESettings(400, ("<|endoftext|>", "<fim_prefix>")), tmp_path / "raw")
    AutoTokenizer.from_pretrained(tmp_path / "raw").save_pretrained(tmp_path / "starcoder")
    data = tiny_txt(tmp_path)
    data.bpe, data.tokenizer_dir = None, tmp_path / "starcoder"
    ours = Tokenizer(data.prepare_tokenizer())
    assert ours.encode(VAL[0]).tolist() == AutoTokenizer.from_pretrained(tmp_path / "starcoder")(VAL[0])["input_ids"]
    assert read_manifest(data.corpus_path)["eos_id"] == 0


def test_the_tokenizer_that_litgpt_was_given(tmp_path):
    train_bpe(TRAIN, BPESettings(333), tmp_path / "given")
    data = tiny_txt(tmp_path)
    data.bpe = None
    train = TrainArgs(micro_batch_size=2, global_batch_size=2, max_tokens=1000)
    given = Tokenizer(tmp_path / "given")
    get_dataloaders(Fabric(accelerator="cpu", devices=1), data, given, train, block_size=32)
    prepared = Tokenizer(data.corpus_path / TOKENIZER_DIR)
    assert prepared.encode(VAL[0]).tolist() == given.encode(VAL[0]).tolist()
    assert (prepared.eos_id, prepared.bos_id) == (0, 0)


def test_a_tokenizer_that_was_saved_to_cut_and_pad_texts(tmp_path):
    """Whoever opens it reads texts of any length as they are."""
    tokenizer = train_bpe(TRAIN, BPE, tmp_path / "t")
    expected = tokenizer.encode(TRAIN[0]).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    data = tiny_txt(tmp_path)
    data.bpe, data.tokenizer_dir = None, tmp_path / "t"
    for opened in (open_as_litgpt(data.prepare_tokenizer()), Tokenizer(tmp_path / "t")):  # ours and LitGPT's
        data.connect(opened)
    assert np.concatenate(open_corpus(data.corpus_path)[0])[: len(expected)].tolist() == expected
    assert encoder(open_as_litgpt(tmp_path / "t"))(TRAIN[0]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bpe": None}, "data.tokenizer_dir: there is no tokenizer; .* or data.bpe.vocab_size"),
        ({"tokenizer_dir": Path("x")}, "tokenizer_dir: 'x' and data.bpe are both set"),
        ({"bpe": None, "tokenizer_dir": Path("x")}, "tokenizer_dir: 'x' has no tokenizer.json .nor vocab.json with"),
        ({"bpe": BPESettings(10)}, "vocab_size: 10 is too small"),
        ({"field": "title"}, "has no field 'title' at item 0, only"),
    ],
)
def test_settings_that_cannot_work(tmp_path, change, message):
    data = tiny_lists(tmp_path)
    for name, value in change.items():
        setattr(data, name, value)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.prepare_data()


def test_a_missing_eos_is_refused_with_the_fix(tmp_path):
    train_bpe(TRAIN, BPE, tmp_path / "t")
    config = tmp_path / "t" / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    data = tiny_txt(tmp_path)
    data.bpe, data.tokenizer_dir = None, tmp_path / "t"
    with pytest.raises(ValueError, match='has no end-of-sequence token, .* add "eos_token"'):
        data.prepare_data()
    for content, message in (
        ('{"eos_token": "</s>"}', 'names no tokenizer class, .* add "tokenizer_class"'),
        ('{"tokenizer_class": "X", "eos_token": "</s>", "bos_token": "<s>"}', "names bos_token '<s>', which is not in"),
    ):  # which LitGPT could not open
        config.write_text(content)
        with pytest.raises(SettingsError, match=message):
            data.prepare_data()
    config.write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    data.prepare_data()


def test_files_of_another_kind(tmp_path):
    """Where no setting says which, another module reads them."""
    write_parquet(tmp_path / "train.parquet", TRAIN)
    with pytest.raises(
        ValueError, match="no files like 'file-.*json.gz', it has train.parquet; .* with TextCorpus, its"
    ):
        CodeParrot(source_path=tmp_path, bpe=BPE).prepare_data()
    with pytest.raises(ValueError, match=r"no files like '\*\*/\*.txt', .* or the pattern to one that matches"):
        TextCorpus(source_path=tmp_path, bpe=BPE).prepare_data()


def test_missing_parts(tmp_path):
    (tmp_path / "file-000000000001.json.gz").write_bytes(gzip.compress(lines(TRAIN, "content")))
    with pytest.raises(ValueError, match="has a single shard, file-000000000001.json.gz, which would validate"):
        CodeParrot(source_path=tmp_path, bpe=BPE).prepare_data()
    story = tmp_path / "TinyStoriesV2-GPT4-train.txt"
    story.write_text("Once<|endoftext|>")
    with pytest.raises(ValueError, match="has none of TinyStories' forms with both"):
        TinyStories(source_path=tmp_path, bpe=BPE).prepare_data()
    with pytest.raises(ValueError, match=r"source_path: '.*train.txt' must be the archive"):
        TinyStories(source_path=story, bpe=BPE).prepare_data()
    with pytest.raises(ValueError, match="would train and validate; set val_path"):
        TextCorpus(source_path=tmp_path, val_path=tmp_path, pattern="*.gz", bpe=BPE, data_path=tmp_path).prepare_data()


def test_rows_without_a_text_are_empty_documents():
    import datasets

    def texts(*rows):
        dataset = datasets.Dataset.from_dict({"text": rows})
        return [record.text for record in sources.dataset_source(dataset, "x", None, TextFormat()).records()]

    assert texts("a", None, "", "b") == ["a", "", "", "b"]
    with pytest.raises(SettingsError, match="field: 'text' of x holds int at row 1; set field to a column of text"):
        texts(None, 7)


def test_rows_that_are_not_utf8(tmp_path):
    """What the library reads from parquet it does not look at."""
    (tmp_path / "source").mkdir()
    column = pa.array([*(text.encode() for text in TRAIN), b"a\xffb"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "source" / "train.parquet")
    data = HubDataset(dataset=str(tmp_path / "source"), data_path=tmp_path / "cache", bpe=BPE, val_fraction=0.5)
    with pytest.raises(SettingsError, match=rf"row {len(TRAIN)} is not UTF-8 at byte 1 .*, or set invalid_utf8"):
        data.prepare()
    (source,) = replace(data, invalid_utf8="replace").sources(None)
    assert [record.text for record in source.records()] == [*TRAIN, "a\ufffdb"]


def test_hub_without_network(tmp_path):
    with pytest.raises(ValueError, match="dataset: 'nobody/nothing' cannot be loaded with .* without a network"):
        HubDataset(dataset="nobody/nothing", bpe=BPE, data_path=tmp_path).prepare_data()
    data = hub(tmp_path)
    data.field = "story"
    with pytest.raises(ValueError, match=r"field: 'story' is not a column of .*; set field to one of \['text'\]"):
        data.prepare_data()
    data.field, data.val_split = "text", "test"
    with pytest.raises(ValueError, match="cannot be loaded with .*test"):
        data.prepare_data()


def test_a_split_that_would_train_and_validate():
    with pytest.raises(SettingsError, match="data.val_split: 'train' is train_split too, and would train and validate"):
        HubDataset(dataset="anything", train_split="train", val_split="train")


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("train", "train[:1%]", "has rows of train_split 'train', which"),
        ("test+train[1%:]", "train", "has rows of"),
        ("train", "all", "has rows of"),
        ("train[:90%]", "train[50%:]", "has rows of"),
        ("train[:1_000]", "train[:5%]", "has rows of"),
        ("train[:-99]", "train[-100:]", "has rows of"),
        ("train[:10_000]", "train[5000:]", "has rows of"),
        ("train[:-100]", "train[-2000:]", "has rows of"),
        ("all", "all[:5%]", "has rows of"),
        ("train", "train[:x]", "val_split: 'train[:x]' must be a split"),
        ("train[:5%", "test", "train_split: 'train[:5%' must be a split"),
        ("test", "all[:5%]", "val_split: 'all[:5%]' must be a split"),
        ("train[:200%]", "test", "train_split: 'train[:200%]' must be a split"),
        ("train[1%:]", "train[:1%]", None),
        ("train[:10_000]", "train[10_000:]", None),
        ("train[500:]", "train[:-500]", None),  # nothing in common below 1000 rows
        ("train", "train_small", None),
        ("train[:90]", "train[-5%:]", None),  # which only the number of rows says
        ("train[:-100]", "train[-100:]", None),
        ("test[:9%]", "train[:9%]", None),
    ],
)
def test_slices_are_checked_before_the_download(train, val, message):
    with pytest.raises(SettingsError, match=re.escape(message)) if message else nullcontext():
        check_slices(train, val)


@pytest.mark.parametrize(
    ("train", "val", "common"),
    [
        ("train[:90]", "train[-10%:]", ", 27 to 29 of 30 in train"),
        ("train", "all", ""),
        ("train[:90%]", "train[50%:]", ""),
        ("train[:90%]", "train[90%:]", None),
        ("train[:-3]", "train[-3:]", None),
        ("train[:10]", "train[50%:]", None),
        ("train[:-5]", "train[20:]", ""),
        ("validation+train[5:9]", "train[30%:]", None),
        ("train[:5]", "validation+train[10%:-80%]", ", 3 to 4 of 30 in train"),
    ],
)
def test_rows_that_would_train_and_validate(tmp_path, train, val, common):
    source = tmp_path / "source"
    source.mkdir()
    write_parquet(source / "train.parquet", (TRAIN * 30)[:30])
    write_parquet(source / "validation.parquet", VAL)
    data = HubDataset(dataset=str(source), train_split=train, val_split=val, data_path=tmp_path / "cache", bpe=BPE)
    refused = pytest.raises(SettingsError, match=f"^data.val_split: .* of train_split .*{common}, which would train")
    with nullcontext() if common is None else refused:
        data.prepare_data()


def test_a_slice_has_its_share_of_the_bytes(tmp_path):
    """By them progress is shown, and processes are chosen."""
    data = hub(tmp_path)
    whole = data.sources(None)
    assert sum(source.size for source in whole) == pytest.approx(sum(len(text) + 4 for text in TRAIN + VAL), rel=0.05)
    half = replace(data, train_split="train[:50%]").sources(None)
    assert half[0].size == pytest.approx(whole[0].size / 2, rel=0.05)


def test_a_prepared_corpus_elsewhere(tmp_path):
    data = tiny_txt(tmp_path)
    data.connect(batch_size=2, max_seq_length=16)
    data.setup()
    loader = data.train_dataloader()
    assert next(iter(loader)).shape == (2, 17)
    moved = data.corpus_path.rename(tmp_path / "moved")
    prepared = PreparedCorpus(moved)
    prepared.connect(batch_size=2, max_seq_length=16)
    prepared.setup()
    going_on = prepared.train_dataloader()
    going_on.load_state_dict(loader.state_dict())  # it is the same corpus
    assert next(iter(going_on)).equal(next(iter(loader)))
    whole, validating = (np.concatenate(shards) for shards in prepared.open_shards())
    ends = np.flatnonzero(whole == prepared.manifest["eos_id"]) + 1
    part = PreparedCorpus(moved, train_count=3)
    train, val = (np.concatenate(shards) for shards in part.open_shards())
    np.testing.assert_array_equal(train, whole[: ends[2]])
    np.testing.assert_array_equal(val, validating)
    assert prepared.unigram_loss > 0
    assert part.unigram_loss is None
    assert part.corpus_id == f"{prepared.corpus_id}:3 documents"
    with pytest.raises(ValueError, match="corpus_dir: '.*' has no manifest.json, so it is not a prepared corpus"):
        PreparedCorpus(tmp_path).prepare_data()


def test_a_model_must_find_the_documents_of_a_corpus(tmp_path, monkeypatch):
    data = tiny_txt(tmp_path)
    planned = "token_id: 7 must be 0, the eos token of the corpus to be prepared"
    with pytest.raises(SettingsError, match=planned):
        data.require_documents("eos", 7)
    assert not (tmp_path / "cache").exists()
    with pytest.raises(
        SettingsError, match=r"attention_document_token_id: 7 must be 0, the eos token of the corpus in"
    ):
        data.prepare_data()
    tokenizer = data.corpus_path / "tokenizer"
    again = TinyStories(data_path=data.data_path, source_path=data.source_path, tokenizer_dir=tokenizer)
    with pytest.raises(SettingsError, match=planned):
        again.require_documents("eos", 7)
    again.prepend_bos = True
    with pytest.raises(SettingsError, match="eos must be bos for the corpus to be prepared, where token 0 both"):
        again.require_documents("eos", 0)
    with pytest.raises(SettingsError, match=r"attention_document_token_id: 7 must be 0, the bos token of the corpus"):
        Mixture({"all": data}, {"all": 1.0}).require_documents("bos", 7)
    Mixture({"all": data}, {"all": 1.0}).require_documents("bos", 0)
    monkeypatch.setattr(TinyStories, "manifest", {**data.manifest, "bos_id": 5})
    for boundary, token_id, other in (("eos", 0, 5), ("bos", 5, 0)):
        data.require_documents(boundary, token_id)
        with pytest.raises(SettingsError, match=f"{other} must be {token_id}, the {boundary} token of the corpus"):
            data.require_documents(boundary, other)


def test_documents_are_counted_and_packed_whole_where_one_token_begins_and_ends_them(tmp_path):
    data = tiny_txt(tmp_path)
    data.prepend_bos, data.packing = True, "pad"
    data.connect(batch_size=1, max_seq_length=2000)
    data.setup()
    manifest = data.manifest
    assert manifest["bos_id"] == manifest["eos_id"] == 0
    rows = [row[row != PADDING].tolist() for row in data.windows_of("training", "data")]
    assert len(rows) == manifest["documents_train"]
    assert all(row[0] == row[-1] == 0 and len(row) > 2 for row in rows)
    with pytest.raises(SettingsError, match=r"attention_document_boundary: eos must be bos .* token 0 both begins and"):
        data.require_documents("eos", 0)
    data.require_documents("bos", 0)
    part = PreparedCorpus(data.corpus_path, train_count=3)
    train = np.concatenate(part.open_shards()[0])
    assert train.tolist() == sum(rows[:3], [])


@pytest.mark.parametrize("pattern", ["/texts/*.txt", ""])
def test_a_glob_that_is_none_is_named(pattern, tmp_path):
    for data in (
        TextCorpus(source_path=tmp_path, data_path=tmp_path / "cache", bpe=BPE, pattern=pattern),
        TokenShards(tmp_path, train_pattern=pattern),
    ):
        with pytest.raises(SettingsError, match=f"pattern: '{re.escape(pattern)}' must be a glob below "):
            data.prepare_data()


@pytest.mark.parametrize(("config", "settings", "message"), [
    ({"bos_token": "</s>"}, {}, r"elsewhere' has no end-of-sequence token"),
    ({"eos_token": "</s>"}, {"prepend_bos": True}, r"elsewhere' has no beginning-of-sequence token"),
])  # fmt: skip
def test_a_tokenizer_that_ends_no_document_is_refused_before_files_are_read(config, settings, message, tmp_path):
    train_bpe(TRAIN, BPE, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "tokenizer_config.json").write_text(json.dumps(config))
    data = TextCorpus(source_path=tmp_path / "missing", data_path=tmp_path / "cache", **settings)
    data.tokenizer_dir = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    data.tokenizer_dir, data.bpe = None, BPESettings(9)
    with pytest.raises(ValueError, match="vocab_size: 9 is too small"):
        data.prepare_data()


@pytest.mark.parametrize("name", ["TextCorpus", "CodeParrot", "TinyStories"])
def test_named_in_yaml_by_class_path(tmp_path, name):
    parser = ArgumentParser()
    parser.add_argument("--data", type=DataModule)
    arguments = {"source_path": str(tmp_path), "bpe": {"vocab_size": 2048, "special_tokens": ["<a>"]}, "packing": "pad"}
    parsed = parser.parse_object({"data": {"class_path": f"litgpt_moe_ext.data.{name}", "init_args": arguments}})
    built = parser.instantiate_classes(parsed).data
    assert built.bpe == BPESettings(2048, ["<a>"])
    assert (built.source_path, built.packing) == (tmp_path, "pad")
    assert all(field.name in vars(built) for field in fields(built))
