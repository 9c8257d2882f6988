import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from litgpt_moe_ext.data.pipeline import corpus as prepare
from litgpt_moe_ext.data.pipeline import shards
from litgpt_moe_ext.data.pipeline.corpus import (
    MANIFEST,
    TOKENIZER_DIR,
    Document,
    atomic_directory,
    cache_key,
    corpus_hash,
    in_validation,
    open_corpus,
    pack_documents,
    read_manifest,
    remove_stale,
    unigram_loss,
)
from litgpt_moe_ext.data.pipeline.python_files import prepare_python_files, read_python_files, split_documents
from litgpt_moe_ext.data.pipeline.tokenizer import BPESettings, open_for_documents, train_bpe


def run(data_path, source_path, vocab_size=300, val_fraction=0.2, seed=42):
    return prepare_python_files(Path(data_path), source_path, vocab_size, val_fraction, seed)


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def texts_of(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    ends = np.flatnonzero(tokens == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


# ---- content


def test_shards_hold_exactly_the_documents(corpus, sources):
    (train,), (val,) = open_corpus(corpus)
    tokenizer = Tokenizer.from_file(str(corpus / TOKENIZER_DIR / "tokenizer.json"))
    split = split_documents(read_python_files(sources).documents, 0.2, 42)
    assert texts_of(train, tokenizer) == [document.text for document in split.train]
    assert texts_of(val, tokenizer) == [document.text for document in split.val]
    assert {document.name for document in split.val} == {
        document.name for document in [*split.train, *split.val] if in_validation(document.name, 0.2, 42)
    }


def test_the_tokenizer_learns_from_the_training_files_only(corpus, sources, tmp_path):
    split = split_documents(read_python_files(sources).documents, 0.2, 42)
    train_bpe((document.text for document in split.train), BPESettings(300), tmp_path)
    prepared = corpus / TOKENIZER_DIR / "tokenizer.json"
    assert prepared.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_manifest(corpus, sources):
    manifest = json.loads((corpus / MANIFEST).read_text())
    (train,), (val,) = open_corpus(corpus)
    size = sum(path.stat().st_size for path in sources.rglob("*.py"))
    assert manifest["files"] == manifest["documents_train"] + manifest["documents_val"] == 40
    assert manifest["bytes"] == manifest["bytes_train"] + manifest["bytes_val"] == size
    assert (manifest["tokens_train"], manifest["tokens_val"]) == (len(train), len(val))
    assert manifest["vocab_size"] == 300
    assert manifest["eos_id"] == 0
    assert manifest["bytes_per_token"] == size / (len(train) + len(val))
    assert manifest["unigram_val_loss"] == unigram_loss(train, val, 300) < math.log(300)
    assert manifest["python_version"] == "{}.{}.{}".format(*sys.version_info[:3])
    assert manifest["corpus_sha256"] == corpus_hash(read_python_files(sources).documents)


def test_unigram_loss_by_hand():
    train, val = np.array([0, 0, 1], np.uint16), np.array([0, 1, 2], np.uint16)
    expected = -(math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6)) / 3
    assert unigram_loss(train, val, 3) == pytest.approx(expected, rel=1e-12)


def test_documents_end_with_eos_and_special_text_stays_text(corpus):
    tokenizer = open_for_documents(corpus / TOKENIZER_DIR)
    packed = pack_documents(tokenizer, ["a", "<|endoftext|>", "b"], 0, np.dtype("<u2"))
    assert packed.dtype == np.uint16
    assert packed[[1, -1]].tolist() == [0, 0]
    assert (packed == 0).sum() == 3
    assert texts_of(packed, tokenizer) == ["a", "<|endoftext|>", "b"]


def test_grouping_changes_nothing(corpus, monkeypatch):
    tokenizer = open_for_documents(corpus / TOKENIZER_DIR)
    texts = [f"value_{index} = {index}\n" * 3 for index in range(20)]
    whole = pack_documents(tokenizer, texts, 0, np.dtype("<u4"))
    monkeypatch.setattr(prepare, "_ENCODE_BATCH_CHARACTERS", 50)
    seen = []
    assert pack_documents(tokenizer, texts, 0, np.dtype("<u4"), seen.append).tolist() == whole.tolist()
    assert sum(seen) == sum(map(len, texts))
    assert len(seen) > 5


def test_no_content_in_both_splits(tmp_path, write_sources):
    source = write_sources(tmp_path / "source", count=20)
    for path in sorted(source.rglob("*.py")):
        for copy in range(5):
            path.with_name(f"{path.stem}_copy{copy}.py").write_bytes(path.read_bytes())
    corpus = run(tmp_path / "cache", source)
    tokenizer = Tokenizer.from_file(str(corpus / TOKENIZER_DIR / "tokenizer.json"))
    train, val = (texts_of(tokens, tokenizer) for (tokens,) in open_corpus(corpus))
    assert set(train).isdisjoint(val)
    assert len(train) + len(val) == len({*train, *val}) == 20
    assert read_manifest(corpus)["files_duplicate"] == 100


def test_which_files_are_read(tmp_path):
    kept = {"a.py": b"a = 1\n", "sub/b.py": b"b = '\xc3\xa9'\r\n"}
    skipped = {
        "test/t.py": b"t",
        "sub/tests/t.py": b"t2",
        "site-packages/p.py": b"p",
        "dist-packages/p.py": b"q",
        "__pycache__/c.py": b"c",
        ".venv/v.py": b"v",
        "notes.txt": b"n",
        "latin.py": b"s = '\xe9'",
        "empty.py": b"",
        "blank.py": b" \n",
        "z_copy.py": b"a = 1\n",
    }
    for name, content in {**kept, **skipped}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    files = read_python_files(tmp_path)
    assert files.documents == [Document(name, content.decode()) for name, content in kept.items()]
    assert (files.empty, files.undecodable, files.duplicates) == (2, 1, 1)


def test_skipped_files_are_reported(tmp_path, write_sources, capsys):
    source = write_sources(tmp_path / "source")
    (source / "latin.py").write_bytes(b"s = '\xe9'")
    run(tmp_path / "cache", source)
    assert "1 files skipped as not UTF-8" in capsys.readouterr().out


def test_share_of_validation_files():
    share = sum(in_validation(f"folder/file{index}.py", 0.05, 42) for index in range(20_000)) / 20_000
    assert share == pytest.approx(0.05, abs=0.006)


# ---- the cache


def test_an_unchanged_corpus_is_reused(tmp_path, sources, capsys):
    first = run(tmp_path, sources)
    stamps = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert capsys.readouterr().out.startswith(f"Prepared a Python corpus in {first} (40 files, ")
    assert run(tmp_path, sources) == first
    assert capsys.readouterr().out.startswith(f"Reusing the Python corpus in {first} (40 files, ")
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == stamps
    assert names(tmp_path) == [first.name]


def test_preparing_twice_gives_the_same_files(tmp_path, sources):
    first, second = run(tmp_path / "a", sources), run(tmp_path / "b", sources)
    assert first.name == second.name
    for path in first.rglob("*.*"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


@pytest.mark.parametrize("change", ["edit", "rename", "add", "remove", "vocab_size", "val_fraction", "seed"])
def test_a_change_leads_to_another_corpus(tmp_path, write_sources, change):
    source = write_sources(tmp_path / "source")
    options = {"vocab_size": 300, "val_fraction": 0.2, "seed": 42}
    before = run(tmp_path / "cache", source, **options)
    file = source / "package0" / "module00.py"
    if change == "edit":
        file.write_bytes(file.read_bytes().replace(b"salt 0", b"salt 1"))
    elif change == "rename":
        file.rename(file.with_name("renamed.py"))
    elif change == "add":
        file.with_name("added.py").write_text("added = True\n")
    elif change == "remove":
        file.unlink()
    else:
        options[change] = {"vocab_size": 301, "val_fraction": 0.25, "seed": 43}[change]
    after = run(tmp_path / "cache", source, **options)
    assert after != before
    assert names(tmp_path / "cache") == sorted([before.name, after.name])
    assert read_manifest(before) is not None
    assert read_manifest(after) is not None


def test_hashes_tell_names_from_texts():
    assert corpus_hash([Document("a", "bc")]) != corpus_hash([Document("ab", "c")])
    assert corpus_hash([Document("a", "b"), Document("c", "d")]) != corpus_hash([Document("a", "bcd")])
    assert cache_key("x", {"a": 1, "b": 2}) == cache_key("x", {"b": 2, "a": 1}) != cache_key("x", {"a": 1, "b": 3})


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_corpus_is_named_and_not_deleted(tmp_path, sources, damage):
    corpus = run(tmp_path, sources)
    if damage == "truncate":
        os.truncate(corpus / "train.bin", 2000)
        message = r"train.bin has 2000 bytes where the manifest lists \d+. Delete .* to prepare the corpus again"
    elif damage == "remove":
        (corpus / TOKENIZER_DIR / "tokenizer.json").unlink()
        message = "tokenizer.json has no bytes where"
    else:
        (corpus / MANIFEST).write_text("{")
        message = "manifest.json is damaged .* Delete"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, sources)
    assert names(tmp_path) == [corpus.name]


def test_something_else_in_the_way(tmp_path, sources):
    corpus = run(tmp_path, sources)
    (corpus / MANIFEST).unlink()
    with pytest.raises(FileExistsError, match="is no finished corpus .* Move or delete it"):
        run(tmp_path, sources)
    assert names(tmp_path) == [corpus.name]


# ---- interruptions and races


def test_the_folder_appears_at_the_end_only(tmp_path):
    final = tmp_path / "0123"
    with atomic_directory(final) as partial:
        (partial / MANIFEST).write_text("{}")
        assert not final.exists()
        assert partial.parent == tmp_path
    assert names(tmp_path) == ["0123"]
    assert names(final) == [MANIFEST]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_an_error_leaves_nothing(tmp_path, error):
    def build():
        with atomic_directory(tmp_path / "0123") as partial:
            (partial / "half").write_text("x")
            raise error

    with pytest.raises(error):
        build()
    assert names(tmp_path) == []


def test_nothing_appears_without_the_rename(tmp_path, sources, monkeypatch):
    def refuse(source, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(prepare.os, "rename", refuse)
    with pytest.raises(OSError, match="failed .Input/output error."):
        run(tmp_path, sources)
    assert names(tmp_path) == []


def test_the_first_to_finish_wins(tmp_path):
    final = tmp_path / "0123"
    with atomic_directory(final) as slow:
        (slow / MANIFEST).write_text("slow")
        with atomic_directory(final) as fast:
            (fast / MANIFEST).write_text("fast")
    assert (final / MANIFEST).read_text() == "fast"
    assert names(tmp_path) == ["0123"]


def test_full_disk(tmp_path, sources, monkeypatch):
    def full(path, tokens, vocab_size):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_shard", full)
        with pytest.raises(
            OSError, match="data_path=.* failed .No space left on device.; nothing half-finished"
        ) as error:
            run(tmp_path, sources)
    assert error.value.errno == 28
    assert names(tmp_path) == []
    run(tmp_path, sources)


KILLED_WHILE_ENCODING = """
import sys, time
from pathlib import Path
from litgpt_moe_ext.data.pipeline import corpus as prepare
from litgpt_moe_ext.data.pipeline import shards
from litgpt_moe_ext.data.pipeline.python_files import prepare_python_files

def hang(*args, **kwargs):
    print("encoding", flush=True)
    time.sleep(600)

prepare.pack_documents = hang
prepare_python_files(Path(sys.argv[1]), Path(sys.argv[2]), 300, 0.2, 42)
"""


def test_kill_during_preparation(tmp_path, sources):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED_WHILE_ENCODING, str(tmp_path), str(sources)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "encoding\n"
    (partial,) = names(tmp_path)
    remove_stale(tmp_path)
    assert names(tmp_path) == [partial]  # its process lives
    process.kill()
    process.communicate()
    assert names(tmp_path) == [partial]
    assert partial.endswith(".partial")
    corpus = run(tmp_path, sources)
    assert names(tmp_path) == [corpus.name]
    assert read_manifest(corpus) is not None


BOTH_AT_ONCE = """
import sys
from pathlib import Path
from litgpt_moe_ext.data.pipeline import python_files
from litgpt_moe_ext.data.pipeline.python_files import prepare_python_files

original = python_files.atomic_directory

def wait_for_the_other(final):
    print("ready", flush=True)
    sys.stdin.readline()
    return original(final)

python_files.atomic_directory = wait_for_the_other
print(prepare_python_files(Path(sys.argv[1]), Path(sys.argv[2]), 300, 0.2, 42))
"""


def test_two_processes_at_once(tmp_path, sources):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BOTH_AT_ONCE, str(tmp_path), str(sources)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    # Both have found nothing prepared before either may start to build.
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    paths = {out.splitlines()[-1] for out, _ in results}
    assert len(paths) == 1
    assert names(tmp_path) == [Path(paths.pop()).name]
    assert run(tmp_path, sources).name == names(tmp_path)[0]


def test_what_counts_as_stale(tmp_path):
    def partial(host, pid, age):
        path = tmp_path / f".{age:04x}.{host}.{pid}.89abcdef.partial"
        path.mkdir()
        stamp = path.stat().st_mtime - age
        os.utime(path, (stamp, stamp))
        return path.name

    dead = 2**22 + 1  # beyond the largest id that Linux gives out
    here = prepare._host()
    live = partial(here, os.getpid(), 0)
    partial(here, dead, 0)
    partial(here, os.getpid(), 10 * 365 * 24 * 3600)  # the id of a live process, which is younger
    foreign = partial("elsewhere", dead, 3600)
    partial("elsewhere2", dead, 2 * 24 * 3600)
    (tmp_path / ".unrelated.partial").mkdir()
    (tmp_path / "0123").mkdir()
    remove_stale(tmp_path)
    assert names(tmp_path) == sorted([live, foreign, ".unrelated.partial", "0123"])


# ---- settings


def test_missing_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="source_path='.*nowhere' is not a folder. Set source_path"):
        run(tmp_path / "cache", tmp_path / "nowhere")
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [None, b"", b"  \n"])
def test_source_without_text(tmp_path, content):
    source = tmp_path / "source"
    source.mkdir()
    if content is not None:
        (source / "a.py").write_bytes(content)
    with pytest.raises(ValueError, match=r"source_path='.*source' has no usable .py files: \d found, \d of them empty"):
        run(tmp_path / "cache", source)
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -0.1, 5.0, math.nan])
def test_val_fraction_out_of_range(tmp_path, sources, val_fraction):
    with pytest.raises(ValueError, match=f"val_fraction={val_fraction} must lie between 0 and 1"):
        run(tmp_path, sources, val_fraction=val_fraction)


@pytest.mark.parametrize(
    ("val_fraction", "side"), [(1e-9, "validation file among 40. Raise"), (1 - 1e-9, "train file")]
)
def test_an_empty_side(tmp_path, sources, val_fraction, side):
    with pytest.raises(ValueError, match=f"seed=42 leaves no {side}"):
        run(tmp_path, sources, val_fraction=val_fraction)


def test_vocab_size_too_small(tmp_path, sources):
    with pytest.raises(ValueError, match="vocab_size=256 is too small .* Set vocab_size to 257 or more"):
        run(tmp_path / "cache", sources, vocab_size=256)
    assert names(tmp_path) == []


def test_a_vocabulary_beyond_uint16_takes_four_bytes(tmp_path, corpus, sources, monkeypatch):
    # Learning 65,536 merges would need a large text, so the limit comes down to the corpus.
    monkeypatch.setattr(shards, "MAX_UINT16_VOCAB", 299)
    wide = run(tmp_path, sources)
    assert [tokens.dtype for (tokens,) in open_corpus(wide)] == [np.uint32] * 2
    for (wide_tokens,), (tokens,) in zip(open_corpus(wide), open_corpus(corpus), strict=True):
        assert np.array_equal(wide_tokens, tokens)


def test_a_vocabulary_larger_than_the_text_allows(tmp_path, sources):
    manifest = read_manifest(run(tmp_path, sources, vocab_size=100_000))
    assert 257 <= manifest["vocab_size"] < 65536
    assert manifest["settings"]["vocab_size"] == 100_000


@pytest.mark.parametrize("below", [".", "deeper"])
def test_data_path_that_is_a_file(tmp_path, sources, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="data_path='.*file.*' cannot be used .* Set data_path"):
        run(tmp_path / "file" / below, sources)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_data_path_without_permission(tmp_path, sources):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="data_path='.*locked' cannot be used .*Permission denied"):
        run(tmp_path / "locked", sources)
