"""The preparation of text corpora: content, splits, several processes, interruptions, the cache, bad input."""

import glob
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from litgpt_moe_ext.data.corpora.text_corpus import TextCorpus
from litgpt_moe_ext.data.pipeline import batches
from litgpt_moe_ext.data.pipeline import preparation as text_corpus
from litgpt_moe_ext.data.pipeline.encoding import Encoder, encode_in_order
from litgpt_moe_ext.data.pipeline.finding import find_files
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.preparation import prepare_corpus
from litgpt_moe_ext.data.pipeline.progress import PreparationProgress
from litgpt_moe_ext.data.pipeline.settings import CorpusSettings
from litgpt_moe_ext.data.pipeline.sources import Source, file_sources
from litgpt_moe_ext.data.pipeline.store import finished
from litgpt_moe_ext.data.pipeline.store.finished import (
    MANIFEST,
    TOKENIZER_DIR,
    in_validation,
    open_corpus,
    read_manifest,
    unigram_loss,
)
from litgpt_moe_ext.data.pipeline.store.unfinished import State, remove_leftovers
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.reading.record import Record, TextFormat
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.data.tokenizer.files import read_tokenizer
from litgpt_moe_ext.data.tokenizer.opening import open_for_documents
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.machine import count_cores
from tests.runs import PATIENCE

BPE = BPESettings(300, ("<s>", "</s>"), eos_token="</s>", bos_token="<s>")


def stories(count: int, salt: int = 0) -> list[str]:
    rng = random.Random(salt)
    words = ["once", "upon", "a", "time", "the", "Bär", "ran", "home", "and", "slept", "</s>"]
    return [f"{salt}.{i} " + " ".join(rng.choices(words, k=rng.randrange(3, 60))) for i in range(count)]


def write_lines(path, texts):
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return [write_lines(folder / f"{i}.json.gz", stories(60, i)) for i in range(3)]


def sources_of(files, tmp_path, splits=(None, None, None)):
    hashes = FileHashes(tmp_path)
    return [file_sources([file], split, TextFormat(), hashes)[0] for file, split in zip(files, splits, strict=False)]


def texts_in(corpus, split: str) -> list[str]:
    tokenizer = open_for_documents(corpus / TOKENIZER_DIR)
    tokens = np.concatenate(open_corpus(corpus)[split == "val"])
    ends = np.flatnonzero(tokens == tokenizer.token_to_id("</s>"))
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends[:-1] + 1)]


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith((".lock", "hashes.json")))


SETTINGS = CorpusSettings(BPE, val_fraction=0.2)


def test_the_shards_hold_exactly_the_documents(files, tmp_path):
    corpus = prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)
    everything = [text for i in range(3) for text in stories(60, i)]
    val = [text for text in everything if in_validation(text, 0.2, 42)]
    assert texts_in(corpus, "val") == val
    assert texts_in(corpus, "train") == [text for text in everything if text not in val]
    manifest = read_manifest(corpus)
    assert manifest["documents_train"] + manifest["documents_val"] == 180
    assert manifest["bytes_train"] + manifest["bytes_val"] == sum(len(text.encode()) for text in everything)
    (train,), (validation,) = open_corpus(corpus)
    assert (manifest["tokens_train"], manifest["tokens_val"]) == (len(train), len(validation))
    counts = [np.bincount(tokens, minlength=300) for tokens in (train, validation)]
    assert manifest["unigram_val_loss"] == pytest.approx(unigram_loss(*counts), rel=1e-12)
    assert (manifest["eos_id"], manifest["bos_id"], manifest["vocab_size"]) == (1, None, 300)
    assert names(tmp_path) == [corpus.name]


def test_splits_of_files(files, tmp_path):
    corpus = prepare_corpus(tmp_path, sources_of(files, tmp_path, ("train", "val", "train")), CorpusSettings(BPE))
    assert texts_in(corpus, "val") == stories(60, 1)
    assert texts_in(corpus, "train") == stories(60, 0) + stories(60, 2)


def test_bos_before_each_document(files, tmp_path):
    plain = prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)
    corpus = prepare_corpus(
        tmp_path, sources_of(files, tmp_path), CorpusSettings(BPE, prepend_bos=True, val_fraction=0.2)
    )
    (tokens,), _ = open_corpus(corpus)
    assert tokens[0] == 0
    assert (tokens[np.flatnonzero(tokens == 1)[:-1] + 1] == 0).all()
    assert tokens[tokens != 0].tolist() == open_corpus(plain)[0][0].tolist()


def test_ids_beyond_16_bits(tmp_path):
    words = ["</s>", *(f"w{number}" for number in range(1, 70_000))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "</s>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    made = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "</s>"}'}
    sources = sources_of([write_lines(tmp_path / f"{i}.json", ["w1 w65536 w69999"]) for i in (0, 1)], tmp_path)
    splits = [replace(source, split=split) for source, split in zip(sources, ("train", "val"), strict=True)]
    (train,), _ = open_corpus(prepare_corpus(tmp_path / "c", splits, CorpusSettings(made)))
    assert train.tolist() == [1, 65536, 69999, 0]


def test_neither_processes_nor_shards_change_the_tokens(files, tmp_path, monkeypatch):
    whole = prepare_corpus(tmp_path / "a", sources_of(files, tmp_path), SETTINGS)
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1000)
    small = CorpusSettings(BPE, val_fraction=0.2, shard_tokens=1500)
    one = prepare_corpus(tmp_path / "b", sources_of(files, tmp_path), small, workers=1)
    two = prepare_corpus(tmp_path / "c", sources_of(files, tmp_path), small, workers=2)
    assert contents(one) == contents(two)
    assert len(open_corpus(one)[0]) > 3
    for split in range(2):
        shards = [np.concatenate(open_corpus(corpus)[split]) for corpus in (whole, one)]
        assert np.array_equal(*shards)


@pytest.mark.parametrize("failing", [1, 2, 5])
@pytest.mark.parametrize("step", ["write_shard", "save"])
def test_a_full_disk_and_a_second_attempt(files, tmp_path, monkeypatch, capsys, failing, step):
    """Whatever write fails, the next run continues and the files are those of an undisturbed run."""
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1000)
    small = CorpusSettings(BPE, val_fraction=0.2, shard_tokens=1500)
    expected = contents(prepare_corpus(tmp_path / "whole", sources_of(files, tmp_path), small))
    holder, calls = (text_corpus if step == "write_shard" else State), 0
    original = getattr(holder, step)

    def full(*arguments):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    root = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(holder, step, full)
        with pytest.raises(SettingsError, match="failed .No space left on device., what is done is kept; free"):
            prepare_corpus(root, sources_of(files, tmp_path), small)
    (unfinished,) = names(root)
    (root / unfinished / "train_00099.bin").write_bytes(b"written after the last state")
    for name in ("train_00099.bin", "state.json"):
        (root / unfinished / f".{name}.0123abcd.partial").write_bytes(b"killed while it was written")
    capsys.readouterr()
    state, stages = State.load(root / unfinished), []
    monkeypatch.setattr(PreparationProgress, "stage", lambda _, name, done=0: stages.append((name, done)))
    corpus = prepare_corpus(root, sources_of(files, tmp_path), small)
    done = sum(file.stat().st_size for file in files[: 0 if state is None else state.source])
    assert stages[-1] == ("encoding", done)
    assert unfinished == f".{corpus.name}.unfinished"
    assert ("Continuing in" in capsys.readouterr().out) == (failing > 1 or step == "write_shard")
    assert contents(corpus) == expected
    assert names(root) == [corpus.name]


@pytest.mark.parametrize("name", ["train_00000.bin", "state.json", "counts", "shards"])
def test_an_unfinished_corpus_that_was_damaged_is_named(files, tmp_path, monkeypatch, name):
    settings = CorpusSettings(BPE, val_fraction=0.2, shard_tokens=1500)
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1000)
    with monkeypatch.context() as patch:
        patch.setattr(text_corpus._Preparation, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(tmp_path, sources_of(files, tmp_path), settings)
    (unfinished,) = tmp_path.glob(".*.unfinished")
    if name == "shards":
        state = json.loads((unfinished / "state.json").read_text())
        state["shards"] = {"train": state["shards"]["train"]}
        (unfinished / "state.json").write_text(json.dumps(state))
    elif name == "counts":
        state = json.loads((unfinished / "state.json").read_text())
        del state["counts"]["tokens_val"]
        (unfinished / "state.json").write_text(json.dumps(state))
    elif name == "state.json":
        os.truncate(unfinished / name, 40)
    else:
        (unfinished / name).unlink()
    with pytest.raises(SettingsError, match=rf"data_path: .*{unfinished.name}.*; delete .* to prepare the corpus anew"):
        prepare_corpus(tmp_path, sources_of(files, tmp_path), settings)
    assert unfinished.is_dir()


def test_unfinished_corpora_that_nobody_goes_on_with(files, tmp_path, capsys):
    """They are deleted after a while; not those of late, and never one that a process works on."""
    days = {"abandoned": 15, "recent": 13, "locked": 15}
    for name, age in days.items():
        folder = tmp_path / f".{name}.unfinished"
        folder.mkdir()
        for path in (folder / "state.json", folder):
            path.touch()
            os.utime(path, (time.time() - age * 24 * 60 * 60,) * 2)
    (tmp_path / ".abandoned.lock").touch()
    shutil.copytree(tmp_path / ".abandoned.unfinished", tmp_path / ".written.unfinished", copy_function=shutil.copy2)
    (tmp_path / ".written.unfinished" / "state.json").touch()
    os.utime(tmp_path / ".written.unfinished", (0, 0))
    with FileLock(tmp_path / ".locked.lock"):
        corpus = prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)
    assert f"Deleted {tmp_path / '.abandoned.unfinished'}, an unfinished corpus" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob(".*.unfinished")) == [
        *(".locked.unfinished", ".recent.unfinished", ".written.unfinished")
    ]
    assert not (tmp_path / ".abandoned.lock").exists()
    assert read_manifest(corpus)


def test_a_corpus_that_is_finished_meanwhile_is_not_called_abandoned(tmp_path, monkeypatch):
    (tmp_path / ".finished.unfinished").mkdir()
    monkeypatch.setattr(Path, "iterdir", lambda path: path.rename(tmp_path / "finished").glob("*"))
    assert remove_leftovers(tmp_path) == []
    assert (tmp_path / "finished").exists()


LIMITED = """
import resource, sys
from pathlib import Path
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.sources import file_sources
from litgpt_moe_ext.data.pipeline.preparation import prepare_corpus
from litgpt_moe_ext.data.pipeline.settings import CorpusSettings
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings
from litgpt_moe_ext.errors import SettingsError

limit, root, *files = sys.argv[1:]
sources = file_sources([Path(file) for file in files], None, TextFormat(), FileHashes(Path(root)))
settings = CorpusSettings(BPESettings(300, ("<s>", "</s>"), eos_token="</s>", bos_token="<s>"), val_fraction=0.2)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    prepare_corpus(Path(root), sources, settings)
except SettingsError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs setrlimit")
@pytest.mark.parametrize(("limit", "written"), [(3_000, []), (13_000, ["state.json", "tokenizer.json"])])
def test_writes_that_the_system_refuses(files, tmp_path, limit, written):
    """A process that may write only so many bytes to a file fails at the tokenizer, or at a shard; the next goes on."""
    # No bytecode, of which half would be kept.
    command = [sys.executable, "-B", "-c", LIMITED, str(limit), tmp_path, *files]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 1
    assert f"in '{tmp_path}' failed (File too large), what is done is kept; free disk space" in result.stderr
    assert "Traceback" not in result.stderr
    (unfinished,) = tmp_path.glob(".*.unfinished")
    assert not list(unfinished.glob("*.bin"))
    assert set(written) <= {path.name for path in unfinished.rglob("*")}
    corpus = prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)
    assert contents(corpus) == contents(prepare_corpus(tmp_path / "undisturbed", sources_of(files, tmp_path), SETTINGS))


KILLED = """
import sys, time
from pathlib import Path
from litgpt_moe_ext.data.pipeline import batches
from litgpt_moe_ext.data.pipeline import preparation as text_corpus
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.data.pipeline.settings import CorpusSettings
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.sources import file_sources
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings

root, *files = map(Path, sys.argv[1:])
batches._BATCH_BYTES = 1000
commit, commits = text_corpus._Preparation._commit, []
def commit_twice(*arguments):
    commit(*arguments)
    commits.append(arguments)
    if len(commits) == 2:
        print("committed", flush=True)
        time.sleep(600)
text_corpus._Preparation._commit = commit_twice
settings = CorpusSettings(
    BPESettings(300, ("<s>", "</s>"), eos_token="</s>", bos_token="<s>"), val_fraction=0.2, shard_tokens=1500
)
if __name__ == "__main__":
    sources = file_sources(files, None, TextFormat(), FileHashes(root))
    text_corpus.prepare_corpus(root, sources, settings, workers=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_killed_or_interrupted(files, tmp_path, monkeypatch, signal_number):
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1000)
    small = CorpusSettings(BPE, val_fraction=0.2, shard_tokens=1500)
    expected = contents(prepare_corpus(tmp_path / "whole", sources_of(files, tmp_path), small))
    script = tmp_path / "prepare.py"
    script.write_text(KILLED)
    root = tmp_path / "parts"
    root.mkdir()
    process = subprocess.Popen(
        [sys.executable, script, root, *files], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert process.stdout.readline() == "committed\n"
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(signal_number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert alive == [], "no process is left behind"
    assert any(name.endswith(".unfinished") for name in names(root))
    corpus = prepare_corpus(root, sources_of(files, tmp_path), small)
    assert contents(corpus) == expected


def test_the_cache(files, tmp_path, capsys):
    first = prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)
    capsys.readouterr()
    assert prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS) == first
    assert capsys.readouterr().out.startswith(f"Reusing the corpus in {first} (180 documents, ")
    others = [
        CorpusSettings(BPE, val_fraction=0.21),
        CorpusSettings(BPE, val_fraction=0.2, seed=1),
        CorpusSettings(BPESettings(301), val_fraction=0.2),
        CorpusSettings(BPE, val_fraction=0.2, prepend_bos=True),
        CorpusSettings(BPE, val_fraction=0.2, reading={"field": "text"}),
        CorpusSettings(read_tokenizer(first / TOKENIZER_DIR), val_fraction=0.2),
    ]
    folders = {prepare_corpus(tmp_path, sources_of(files, tmp_path), settings) for settings in others}
    folders.add(prepare_corpus(tmp_path, sources_of(files[::-1], tmp_path), SETTINGS))
    folders.add(prepare_corpus(tmp_path, sources_of(files, tmp_path, ("val", None, None)), SETTINGS))
    assert len(folders | {first}) == 9
    same_tokenizer = prepare_corpus(tmp_path, sources_of(files, tmp_path), others[-1])
    assert contents(same_tokenizer)["train_00000.bin"] == contents(first)["train_00000.bin"]
    os.truncate(first / "val_00000.bin", 2000)
    with pytest.raises(ValueError, match="val_00000.bin has 2000 bytes where the manifest lists"):
        prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)


def test_a_changed_file_is_noticed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one"])
    old = time.time() - 100
    os.utime(path, (old, old))
    hashes = FileHashes(tmp_path)
    first = hashes.hash(path)
    hashes.save()
    remembered = FileHashes(tmp_path)
    assert remembered._known
    assert remembered.hash(path) == first
    write_lines(path, ["two"])
    assert FileHashes(tmp_path).hash(path) != first
    second = FileHashes(tmp_path).hash(path)
    for damage in ("{", "[1]", json.dumps({str(path.absolute()): 5}), json.dumps({str(path.absolute()): []})):
        (tmp_path / ".file_hashes.json").write_text(damage)
        assert FileHashes(tmp_path).hash(path) == second


def test_a_file_that_is_deleted_while_it_is_read_has_not_changed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    (source,) = file_sources([path], None, TextFormat(), FileHashes(tmp_path))
    records = source.records()
    assert next(records).text == "one"
    path.unlink()
    assert [record.text for record in records] == ["two"]
    source.check()


@pytest.mark.parametrize("count", [None, 2])
def test_a_file_that_is_written_to_while_it_is_read(tmp_path, monkeypatch, count):
    """Its hash, by which the corpus is found again, would be that of another text; also where not all of it is read."""
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1)
    path = write_lines(tmp_path / "a.jsonl", ["one", "two", "three"])
    intake = batches.Intake(
        file_sources([path], "train", TextFormat(), FileHashes(tmp_path)), CorpusSettings(BPE, counts={"train": count})
    )
    for content, refused in ((path.read_bytes(), False), (path.read_bytes() + b'{"text": "four"}\n', True)):
        for begin in (lambda: intake.batches(0, 0, {"train": 0}), lambda: intake.texts_to_learn_from(lambda _: None)):
            read = begin()
            next(read)
            path.write_bytes(content)
            os.utime(path, (1, 1))
            with pytest.raises(SettingsError, match="a.jsonl has changed since") if refused else nullcontext():
                list(read)


def test_a_file_that_was_just_written_is_read_again(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["one"])
    hashes = FileHashes(tmp_path)
    hashes.hash(path)
    hashes.save()
    assert not (tmp_path / ".file_hashes.json").exists()


def test_hashes_outlive_a_run_and_are_a_convenience(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", ["one"])
    os.utime(path, (1, 1))
    for folder in (tmp_path / "new" / "below", path / "below"):  # the second is in a file
        FileHashes(folder).save()
        assert not folder.exists()
        hashes = FileHashes(folder)
        known = hashes.hash(path)
        for _ in range(2):
            hashes.save()
    assert FileHashes(tmp_path / "new" / "below").remembers(path)
    assert FileHashes(tmp_path / "new" / "below").hash(path) == known
    assert capsys.readouterr().out.count("File hashes could not be saved") == 1
    with pytest.raises(SettingsError, match=r"gone.jsonl cannot be read \(No such file or directory\); check the file"):
        hashes.hash(tmp_path / "gone.jsonl")


def test_the_first_so_many_documents(files, tmp_path, monkeypatch):
    """By sources that split themselves, by named ones, and after an interruption."""
    whole = prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)
    limits = CorpusSettings(BPE, val_fraction=0.2, counts={"train": 70, "val": 9}, shard_tokens=1000)
    some = prepare_corpus(tmp_path, sources_of(files, tmp_path), limits)
    assert texts_in(some, "train") == texts_in(whole, "train")[:70]
    assert texts_in(some, "val") == texts_in(whole, "val")[:9]
    train_bpe(texts_in(whole, "train")[:70], BPE, tmp_path / "tokenizer")
    learned = (some / TOKENIZER_DIR / "tokenizer.json").read_bytes()
    assert learned == (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    named = sources_of(files, tmp_path, ("train", "val", "train"))
    named[2] = replace(named[2], records=lambda: pytest.fail("read in vain"))
    some = prepare_corpus(tmp_path, named, CorpusSettings(BPE, counts={"train": 60, "val": 5}))
    assert (texts_in(some, "train"), texts_in(some, "val")) == (stories(60, 0), stories(60, 1)[:5])

    monkeypatch.setattr(batches, "_BATCH_BYTES", 1000)
    commit, calls = text_corpus._Preparation._commit, []

    def interrupt_once(preparation, vocab_size):
        commit(preparation, vocab_size)
        calls.append(vocab_size)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(text_corpus._Preparation, "_commit", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(tmp_path / "parts", sources_of(files, tmp_path), limits)
    parts = prepare_corpus(tmp_path / "parts", sources_of(files, tmp_path), limits)
    assert len(calls) > 3
    assert (texts_in(parts, "train"), texts_in(parts, "val")) == (
        texts_in(whole, "train")[:70],
        texts_in(whole, "val")[:9],
    )


@pytest.mark.parametrize("setting", [{"train_count": 0}, {"val_count": -1}, {"workers": 0}])
def test_counts_that_cannot_work(tmp_path, setting):
    with pytest.raises(SettingsError, match=r"data\.\w+: \S+ must be an integer of at least 1, or null"):
        TextCorpus(source_path=tmp_path, **setting)


def test_a_large_share_that_validates_is_said(files, tmp_path, capsys):
    prepare_corpus(tmp_path, sources_of(files[:2], tmp_path, ("train", "val")), CorpusSettings(BPE))
    assert "50% of the documents are for validation; to use fewer, set val_count" in capsys.readouterr().out
    prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)
    assert "of the documents are for validation" not in capsys.readouterr().out


def test_ids_with_gaps_and_added_tokens(files, tmp_path):
    """The vocabulary reaches to the highest id, however many tokens there are."""
    train_bpe(stories(60), BPE, tmp_path / "sparse")
    path = tmp_path / "sparse" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"] = {token: 3 * id_ for token, id_ in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        added["id"] *= 3
    path.write_text(json.dumps(state))
    settings = CorpusSettings(read_tokenizer(tmp_path / "sparse"), val_fraction=0.2)
    corpus = prepare_corpus(tmp_path, sources_of(files, tmp_path), settings)
    highest = max(int(shard.max()) for shards in open_corpus(corpus) for shard in shards)
    assert highest < read_manifest(corpus)["vocab_size"] == 3 * 299 + 1
    path.write_text("{")
    broken = CorpusSettings(read_tokenizer(tmp_path / "sparse"), val_fraction=0.2)
    with pytest.raises(SettingsError, match="tokenizer.json is not a tokenizer .*; download or make it again"):
        prepare_corpus(tmp_path, sources_of(files, tmp_path), broken)


def test_an_id_that_no_embedding_has_is_refused_before_anything_is_encoded(files, tmp_path):
    train_bpe(stories(9), BPESettings(270), tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["Z"] = 4_000_000_000
    path.write_text(json.dumps(content))
    corpus = TextCorpus(source_path=files[0], data_path=tmp_path / "cache", tokenizer_dir=tmp_path / "tokenizer")
    with pytest.raises(
        SettingsError, match=r"token 'Z' has id 4000000000 in a tokenizer of 270 tokens, .* rows; give it"
    ):
        corpus.prepare()
    assert not list((tmp_path / "cache").glob("*/*.bin"))


def test_empty_documents_are_left_out_and_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1000)
    path = write_lines(tmp_path / "a.jsonl", ["", " ", *stories(30), " \n", *stories(30, 1)])
    corpus = prepare_corpus(tmp_path / "c", file_sources([path], None, TextFormat(), FileHashes(tmp_path)), SETTINGS)
    manifest = read_manifest(corpus)
    assert (manifest["documents_empty"], manifest["first_empty"]) == (3, f"{path}, byte 0")
    assert f"Skipped 3 empty documents, the first at {path}, byte 0" in capsys.readouterr().out


def test_files_that_nobody_chose_are_named(tmp_path, capsys):
    """Where the pattern is the default; a cache in the folder, and what is hidden, are no files of the user's."""
    for number, name in enumerate(("a.txt", "deep/b.txt", "NOTES.TXT", "deep/c.md", "d.md", ".hidden.md")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(stories(9, number)))
    settings = {"source_path": tmp_path, "data_path": tmp_path / "cache", "bpe": BPESettings(300), "val_fraction": 0.5}
    for _ in range(2):
        TextCorpus(**settings, seed=3).prepare()
    said = f"Skipped in {tmp_path}, as they do not match **/*.txt: 2 .md, 1 .TXT; set pattern to include them\n"
    assert capsys.readouterr().out.count(said) == 2
    TextCorpus(**settings, seed=3, pattern="**/*.md").prepare()
    assert "Skipped in" not in capsys.readouterr().out


def test_no_validation_split(files, tmp_path):
    with pytest.raises(ValueError, match="val_fraction: 0.0 leaves no document to validate on, as none of 3"):
        prepare_corpus(tmp_path / "c", sources_of(files, tmp_path), CorpusSettings(BPE))
    with pytest.raises(ValueError, match="leaves no document to validate on, as none"):
        prepare_corpus(tmp_path / "c", sources_of(files, tmp_path, ["train"] * 3), SETTINGS)
    with pytest.raises(ValueError, match=r"leaves no document to validate, of 180 documents in 3 sources"):
        prepare_corpus(tmp_path / "c", sources_of(files, tmp_path), CorpusSettings(BPE, val_fraction=1e-9))


def test_damage_is_named_also_while_the_tokenizer_learns(files, tmp_path):
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes(files[0].read_bytes()[:-50])
    for tokenizer in (BPE, read_tokenizer_of(files, tmp_path)):
        with pytest.raises(ValueError, match="broken.json.gz is damaged or truncated"):
            prepare_corpus(
                tmp_path / "c",
                sources_of([*files[:2], broken], tmp_path),
                CorpusSettings(tokenizer, val_fraction=0.2),
                workers=1,
            )


def read_tokenizer_of(files, tmp_path):
    return read_tokenizer(prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS) / TOKENIZER_DIR)


def test_processes_where_they_pay():
    def source(size: int) -> Source:
        return Source("a", "train", size, "a", lambda: iter(()))

    assert text_corpus._workers([source(31_000_000)], None) == 1
    assert text_corpus._workers([source(31_000_000), source(1_000_000)], None) == count_cores()
    assert text_corpus._workers([source(0)], None) == count_cores(), "of unknown size"
    assert text_corpus._workers([source(1)], 3) == 3


def test_a_dying_worker_is_reported():
    no_tokenizer = Encoder("{", 0, None, np.dtype("<u2"))
    with pytest.raises(SettingsError, match="died, perhaps for lack of memory; set workers to less than 2"):
        list(encode_in_order(no_tokenizer, [batches.Batch()], workers=2))


def test_a_tokenizer_learns_from_the_beginning_of_every_source(files):
    read = []

    def watched(file):
        for number, record in enumerate(documents(file, TextFormat())):
            read.append((file.name, number))
            yield record

    sizes = (100, 400, 100)
    sources = [
        Source(file.name, None, size, file.name, partial(watched, file))
        for file, size in zip(files, sizes, strict=True)
    ]
    sources.append(Source("val", "val", 10**6, "val", lambda: iter([])))
    settings = CorpusSettings(BPE, val_fraction=0.2, tokenizer_bytes=3000)
    texts = list(batches.Intake(sources, settings).texts_to_learn_from(lambda read: None))
    assert {name for name, _ in read} == {file.name for file in files}
    assert max(number for _, number in read) < 40
    for i, size in enumerate(sizes):
        assert 5 * size <= sum(len(text) for text in texts if text.startswith(f"{i}.")) < 5 * size + 400
    assert not any(in_validation(text, 0.2, 42) for text in texts)


def test_a_tokenizer_learns_from_so_many_bytes():
    """Of which a letter may have several."""
    records = [Record("ä" * 50, "", 0) for _ in range(9)]
    settings = CorpusSettings(BPE, tokenizer_bytes=300)
    intake = batches.Intake([Source("x", "train", 1, "x", lambda: iter(records))], settings)
    assert len(list(intake.texts_to_learn_from(lambda read: None))) == 3


def test_a_tokenizer_learns_nothing_from_empty_documents():
    records = [Record(text, "", 0) for text in (" \n", "", "a", "b")]
    settings = CorpusSettings(BPE, counts={"train": 1})
    intake = batches.Intake([Source("x", "train", 1, "x", lambda: iter(records))], settings)
    assert list(intake.texts_to_learn_from(lambda read: None)) == ["a"]


def test_the_name_of_a_file_says_how_it_is_read(tmp_path):
    content = [tmp_path / name for name in ("a.txt", "b.txt", "a.json", "a.json.gz")]
    for file in content:
        file.write_bytes(b'"text"')
    first, same, *others = (source.identity for source in sources_of(content, tmp_path, (None,) * 4))
    assert first == same
    assert len({first, *others}) == 3


def test_find_files(tmp_path):
    for name in ("b.txt", "sub/a.txt", "sub/deep/c.txt", ".hidden.txt", "d.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in find_files("source_path", tmp_path, "**/*.txt")]
    assert found == ["b.txt", "sub/a.txt", "sub/deep/c.txt"]
    assert find_files("source_path", tmp_path / "d.md", "**/*.txt") == [tmp_path / "d.md"]
    with pytest.raises(ValueError, match=r"source_path: '.*' has no files like '\*.json', it has b.txt, d.md, sub"):
        find_files("source_path", tmp_path, "*.json")
    with pytest.raises(SettingsError, match="source_path: '.*nowhere' does not exist"):
        find_files("source_path", tmp_path / "nowhere", "*")
    with pytest.raises(SettingsError, match="does not exist; it is an address, so download what is there, and set so"):
        find_files("source_path", Path("https://host/a.jsonl"), "*")


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch, capsys):
    for name in ("a.txt", "closed/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    closed, scandir = str(tmp_path / "closed"), os.scandir

    def enter(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", enter)
    if hasattr(glob, "_StringGlobber"):  # Python 3.13 keeps the function in a class
        monkeypatch.setattr(glob._StringGlobber, "scandir", staticmethod(enter))
    assert find_files("source_path", tmp_path, "**/*.txt") == [tmp_path / "a.txt"]
    assert capsys.readouterr().out == f"Skipped {closed}, which cannot be read (Permission denied)\n"
    assert find_files("source_path", tmp_path, "*.txt") == [tmp_path / "a.txt"]
    assert not capsys.readouterr().out


def test_progress_in_words():
    progress = PreparationProgress(8_000_000, show=False)
    progress.stage("encoding", done=2_000_000)
    progress._started = (100.0, 2_000_000)
    assert progress.describe(104.0, 4_000_000) == "encoding: 4 MB of 8 MB (50%), 0.5 MB/s, 0:00:08 left"
    assert PreparationProgress(0, show=False).describe(1.0, 0) == ": 0 MB, 0.0 MB/s"


def test_killed_at_the_very_end(files, tmp_path, monkeypatch, capsys):
    """Everything is written, and only the name is missing: the next run gives it, and encodes nothing again."""
    expected = contents(prepare_corpus(tmp_path / "whole", sources_of(files, tmp_path), SETTINGS))
    with monkeypatch.context() as patch:
        patch.setattr(finished, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(tmp_path / "killed", sources_of(files, tmp_path), SETTINGS)
    capsys.readouterr()
    corpus = prepare_corpus(tmp_path / "killed", sources_of(files, tmp_path), SETTINGS)
    assert "Continuing in" in capsys.readouterr().out
    assert contents(corpus) == expected
    assert read_manifest(corpus) is not None


def test_only_prepared_corpora_are_no_documents(tmp_path):
    """Many data sets have a `manifest.json` of their own, and some a folder named `tokenizer`."""
    for name in ("manifest.json", "a.txt", "sub/manifest.json", "sub/b.txt", "done/manifest.json", "done/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "done" / TOKENIZER_DIR).mkdir()
    (tmp_path / "words" / TOKENIZER_DIR).mkdir(parents=True)
    (tmp_path / "words" / "d.txt").write_text("{}")
    found = find_files("source_path", tmp_path, "**/*.txt")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.txt", "sub/b.txt", "words/d.txt"]


def test_a_manifest_is_what_makes_it_finished(files, tmp_path):
    corpus = prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)
    (corpus / MANIFEST).unlink()
    with pytest.raises(SettingsError, match="is not a finished corpus"):
        prepare_corpus(tmp_path, sources_of(files, tmp_path), SETTINGS)
