"""The corpus of Python files: which are read, how they are split, what the shards hold."""

import hashlib
import math
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from litgpt_moe_ext.data.corpora.python_stdlib import GENERATED_FOLDERS, SKIPPED_FOLDERS, PythonStdlib
from litgpt_moe_ext.data.pipeline import shards
from litgpt_moe_ext.data.pipeline.hashes import FileHashes
from litgpt_moe_ext.data.pipeline.store.finished import TOKENIZER_DIR, in_validation, open_corpus, read_manifest
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.errors import SettingsError
from tests.data.test_text_corpus import names
from tests.runs import PATIENCE


def stdlib(source_path, data_path="unused", **settings) -> PythonStdlib:
    settings = {"vocab_size": 300, "val_fraction": 0.2, **settings}
    return PythonStdlib(data_path=Path(data_path), source_path=source_path, **settings)


def found(corpus: PythonStdlib) -> dict[str, str]:
    """Return the split by file name."""
    return {source.name: source.split for source in corpus.sources(FileHashes(Path("unused")))}


def texts_of(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    ends = np.flatnonzero(tokens == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    assert ends[-1] == len(tokens) - 1
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def files_of(sources: Path, side: str) -> list[str]:
    """Return the texts of a side in the order of the paths, by the rule that the split documents."""
    paths = sorted(path.relative_to(sources).as_posix() for path in sources.rglob("*.py"))
    return [
        (sources / name).read_text(encoding="utf-8")
        for name in paths
        if in_validation(name, 0.2, 42) == (side == "val")
    ]


def test_shards_hold_exactly_the_documents(corpus, sources):
    (train,), (val,) = open_corpus(corpus)
    tokenizer = Tokenizer.from_file(str(corpus / TOKENIZER_DIR / "tokenizer.json"))
    assert texts_of(train, tokenizer) == files_of(sources, "train")
    assert texts_of(val, tokenizer) == files_of(sources, "val")


def test_the_tokenizer_learns_from_the_training_files_only(corpus, sources, tmp_path):
    train_bpe(files_of(sources, "train"), BPESettings(300), tmp_path)
    prepared = corpus / TOKENIZER_DIR / "tokenizer.json"
    assert prepared.read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_manifest(corpus, sources):
    manifest = read_manifest(corpus)
    (train,), (val,) = open_corpus(corpus)
    size = sum(path.stat().st_size for path in sources.rglob("*.py"))
    assert manifest["sources_count"] == manifest["documents_train"] + manifest["documents_val"] == 40
    assert manifest["bytes_train"] + manifest["bytes_val"] == size
    assert (manifest["tokens_train"], manifest["tokens_val"]) == (len(train), len(val))
    assert (manifest["vocab_size"], manifest["eos_id"]) == (300, 0)
    assert manifest["bytes_per_token"] == size / (len(train) + len(val))
    assert 0 < manifest["unigram_val_loss"] < math.log(300)
    assert manifest["python_version"] == "{}.{}.{}".format(*sys.version_info[:3])


def test_which_files_are_read(tmp_path, capsys):
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
        "zero.py": b"s = '\x00'",
        "empty.py": b"",
        "blank.py": b" \n",
        "z_copy.py": b"a = 1\n",
    }
    for name, content in {**kept, **skipped}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    read = stdlib(tmp_path).sources(FileHashes(tmp_path))
    assert [source.name for source in read] == list(kept)
    assert [source.identity for source in read] == [hashlib.sha256(content).hexdigest() for content in kept.values()]
    texts = [record.text.encode() for source in read for record in source.records()]
    assert texts == [content.replace(b"\r\n", b"\n") for content in kept.values()]
    assert f"Skipped 2 files of {tmp_path}: not UTF-8 text" in capsys.readouterr().out


def test_a_file_that_changes_before_it_is_read_again_is_named(tmp_path):
    (tmp_path / "a.py").write_text("a = 1\n")
    (source,) = stdlib(tmp_path).sources(FileHashes(tmp_path))
    source.check()
    (tmp_path / "a.py").write_text("a = 22\n")
    with pytest.raises(SettingsError, match="a.py has changed since the preparation began"):
        source.check()


def test_a_file_that_cannot_be_read_is_left_out(tmp_path, monkeypatch, capsys):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(f"# {name}")
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "a.py":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert list(found(stdlib(tmp_path))) == ["b.py"]
    assert capsys.readouterr().out == f"Skipped {tmp_path / 'a.py'}, which cannot be read (Permission denied)\n"


def test_no_content_in_both_splits(tmp_path, write_sources):
    source = write_sources(tmp_path / "source", count=20)
    for path in sorted(source.rglob("*.py")):
        for copy in range(5):
            path.with_name(f"{path.stem}_copy{copy}.py").write_bytes(path.read_bytes())
    corpus = stdlib(source, tmp_path / "cache").prepare()
    tokenizer = Tokenizer.from_file(str(corpus / TOKENIZER_DIR / "tokenizer.json"))
    train, val = (texts_of(tokens, tokenizer) for (tokens,) in open_corpus(corpus))
    assert set(train).isdisjoint(val)
    assert len(train) + len(val) == len({*train, *val}) == 20


def test_standard_library():
    folder = Path(sysconfig.get_path("stdlib"))
    read = found(PythonStdlib())
    assert {"argparse.py", "json/decoder.py"} <= set(read)
    assert len(read) > 300
    assert not any((SKIPPED_FOLDERS | GENERATED_FOLDERS) & set(name.split("/")) for name in read)
    assert sum((folder / name).stat().st_size for name in read) > 5_000_000
    assert read == {name: "val" if in_validation(name, 0.05, 42) else "train" for name in sorted(read)}


def test_preparing_twice_gives_the_same_files(tmp_path, sources, capsys):
    first, second = (stdlib(sources, tmp_path / name).prepare() for name in "ab")
    assert first.name == second.name
    for path in first.rglob("*.*"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()
    assert capsys.readouterr().out.startswith(f"Prepared a corpus in {first} (40 documents, ")
    stdlib(sources, tmp_path / "a").prepare()
    assert capsys.readouterr().out.startswith(f"Reusing the corpus in {first} (40 documents, ")


@pytest.mark.parametrize("change", ["edit", "rename", "add", "remove", "vocab_size", "val_fraction", "seed"])
def test_a_change_leads_to_another_corpus(tmp_path, write_sources, change):
    source = write_sources(tmp_path / "source")
    settings = {}
    before = stdlib(source, tmp_path / "cache").prepare()
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
        settings[change] = {"vocab_size": 301, "val_fraction": 0.25, "seed": 43}[change]
    after = stdlib(source, tmp_path / "cache", **settings).prepare()
    assert after != before
    assert names(tmp_path / "cache") == sorted([before.name, after.name])


BOTH_AT_ONCE = """
import sys
from pathlib import Path
from litgpt_moe_ext.data.corpora.python_stdlib import PythonStdlib
from litgpt_moe_ext.data.pipeline import preparation

original = preparation.only_one

def wait_for_the_other(*arguments):
    print("ready", flush=True)
    sys.stdin.readline()
    return original(*arguments)

preparation.only_one = wait_for_the_other
print(PythonStdlib(data_path=Path(sys.argv[1]), source_path=Path(sys.argv[2]), vocab_size=300).prepare())
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
    results = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    paths = {out.splitlines()[-1] for out, _ in results}
    assert len(paths) == 1
    assert names(tmp_path) == [Path(paths.pop()).name]
    assert sum("Prepared a corpus" in out for out, _ in results) == 1


# ---- settings


def test_missing_source(tmp_path):
    with pytest.raises(SettingsError, match="source_path: '.*nowhere' is not a folder; set it to a folder with .py"):
        stdlib(tmp_path / "nowhere", tmp_path / "cache").prepare()
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [None, b"", b"  \n"])
def test_source_without_text(tmp_path, content):
    source = tmp_path / "source"
    source.mkdir()
    if content is not None:
        (source / "a.py").write_bytes(content)
    with pytest.raises(
        SettingsError, match=r"source_path: '.*source' has no usable .py files .0 are not UTF-8 text.; set"
    ):
        stdlib(source, tmp_path / "cache").prepare()
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("val_fraction", [1.0, -0.1, 5.0, math.nan])
def test_val_fraction_out_of_range(tmp_path, sources, val_fraction):
    with pytest.raises(SettingsError, match=f"val_fraction: {val_fraction} must be a number of at least 0 and below 1"):
        stdlib(sources, tmp_path, val_fraction=val_fraction).prepare()


@pytest.mark.parametrize(("val_fraction", "side"), [(0.0, "validate"), (1e-9, "validate"), (1 - 1e-9, "train")])
def test_an_empty_side(tmp_path, sources, val_fraction, side):
    with pytest.raises(SettingsError, match=f"val_fraction: {val_fraction} leaves no document to {side} on"):
        stdlib(sources, tmp_path, val_fraction=val_fraction).prepare()
    assert names(tmp_path) == []


def test_vocab_size_too_small(tmp_path, sources):
    with pytest.raises(SettingsError, match="vocab_size: 256 is too small .*; set vocab_size to 257 or more"):
        stdlib(sources, tmp_path / "cache", vocab_size=256).prepare()
    assert names(tmp_path) == []


def test_a_vocabulary_beyond_uint16_takes_four_bytes(tmp_path, corpus, sources, monkeypatch):
    # Learning 65,536 merges would need a large text, so the limit comes down to the corpus.
    monkeypatch.setattr(shards, "MAX_UINT16_VOCAB", 299)
    wide = stdlib(sources, tmp_path).prepare()
    assert [tokens.dtype for (tokens,) in open_corpus(wide)] == [np.uint32] * 2
    for (wide_tokens,), (tokens,) in zip(open_corpus(wide), open_corpus(corpus), strict=True):
        assert np.array_equal(wide_tokens, tokens)


def test_a_vocabulary_larger_than_the_text_allows(tmp_path, sources):
    manifest = read_manifest(stdlib(sources, tmp_path, vocab_size=100_000).prepare())
    assert 257 <= manifest["vocab_size"] < 65536
    assert manifest["settings"]["tokenizer"]["vocab_size"] == 100_000
