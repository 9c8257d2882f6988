"""Corpora that are damaged after they were prepared, without a change of size."""

import os
import shutil
from pathlib import Path

import pytest

from litgpt_moe_ext.data.corpora.prepared import PreparedCorpus
from litgpt_moe_ext.data.corpora.python_stdlib import PythonStdlib
from litgpt_moe_ext.data.pipeline import hashes
from litgpt_moe_ext.data.pipeline.store import verification
from litgpt_moe_ext.data.pipeline.store.finished import read_manifest
from litgpt_moe_ext.data.pipeline.store.verification import verify, verify_shards
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.files import checksums
from litgpt_moe_ext.files.checksums import FILE_NAME


@pytest.fixture
def copied(corpus, tmp_path, monkeypatch):
    """A copy whose files count as old, so that what is learned of them is remembered."""
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", -60.0)
    shutil.copytree(corpus, tmp_path / "corpora" / corpus.name)
    return tmp_path / "corpora" / corpus.name


def flip(file, keep_time=False):
    times = os.stat(file)
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    if keep_time:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def swap(directory):
    first, second = directory / "train_00000.bin", directory / "val_00000.bin"
    first.rename(directory / "aside")
    second.rename(first)
    (directory / "aside").rename(second)


DAMAGE = {
    "a flipped bit": lambda directory: flip(directory / "train_00000.bin"),
    "with the time of the file as it was": lambda directory: flip(directory / "val_00000.bin", keep_time=True),
    "the tokenizer": lambda directory: flip(directory / "tokenizer" / "tokenizer_config.json"),
    "what it says of itself": lambda directory: flip(directory / "manifest.json"),
    "swapped shards": swap,
}


@pytest.mark.parametrize("hidden", [".", "manifest.json", "SHA256SUMS", "tokenizer/tokenizer.json", "train_00000.bin"])
def test_a_corpus_that_may_not_be_read_is_not_called_damaged(corpus, hidden, monkeypatch):
    """As another user's, which must not be deleted. (Root, who runs some tests, may read everything.)"""
    allowed = os.access

    def access(path, mode, **options):
        return corpus / hidden != path and allowed(path, mode, **options)

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(SettingsError, match=rf"^{corpus / hidden} cannot be read .*; have its owner make it readable"):
        read_manifest(corpus)


def test_a_corpus_in_a_folder_that_may_not_be_entered_is_not_called_missing(corpus, monkeypatch):
    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(SettingsError, match=rf"^{corpus} cannot be read .*; have its owner make it readable"):
        read_manifest(corpus)


@pytest.mark.parametrize("checked_before", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(copied, damage, checked_before):
    if checked_before:
        verify(copied)
    DAMAGE[damage](copied)
    for _ in range(2):
        with pytest.raises(
            SettingsError, match=rf"{copied}/\S+ differs from its checksum in SHA256SUMS; copy it again"
        ):
            verify(copied)


def test_a_corpus_is_read_once(copied, monkeypatch):
    verify(copied)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    verify(copied)
    PreparedCorpus(corpus_dir=copied).prepare()


def test_where_nothing_can_be_remembered_a_line_says_how_to_check(copied, monkeypatch, capsys):
    flip(copied / "train_00000.bin")
    monkeypatch.setattr(verification.os, "access", lambda *_: False)
    verify(copied)
    said = capsys.readouterr().out
    assert said.startswith(f"{copied} is not checked, as nothing can be written beside it; to check it by hand: ")
    assert said.endswith(f": cd {copied} && sha256sum -c SHA256SUMS\n")
    verify(copied, verbose=False)
    assert capsys.readouterr().out == ""


def test_what_was_checked_is_said_of_nowhere_that_cannot_be_written_to(copied, monkeypatch, capsys):
    """Once as its owner, who could remember it."""
    verify(copied)
    monkeypatch.setattr(verification.os, "access", lambda *_: False)
    verify(copied)
    assert capsys.readouterr().out == ""


def test_shards_beside_which_no_checksums_lie_are_read_in_silence(copied, capsys):
    shards = sorted(copied.glob("*.bin"))
    verify_shards(copied, shards)
    (copied / FILE_NAME).unlink()
    verify_shards(copied, shards)
    assert capsys.readouterr().out == ""


def test_shards_that_the_checksums_leave_out_are_named(copied, capsys):
    shards = [copied / "new_1.bin", copied / "new_2.bin", copied / "train_00000.bin"]
    verify_shards(copied, shards)
    assert "SHA256SUMS does not list new_1.bin and 1 more, so they are not checked\n" in capsys.readouterr().out
    verify_shards(copied, shards, verbose=False)
    assert capsys.readouterr().out == ""


def test_without_checksums(copied):
    (copied / FILE_NAME).write_text("x")
    with pytest.raises(SettingsError, match="SHA256SUMS is damaged in line 1; copy it again"):
        verify(copied)
    (copied / FILE_NAME).unlink()
    verify(copied)


def test_what_a_preparation_writes_is_as_sha256sum_has_it(corpus):
    listed = checksums.read(corpus)
    assert sorted(listed) == sorted(
        path.relative_to(corpus).as_posix() for path in corpus.rglob("*") if path.is_file() and path.name != FILE_NAME
    )
    assert checksums.problem_with(corpus) is None


def test_who_reuses_a_damaged_corpus(copied, sources):
    """The same settings again, and a corpus that was prepared elsewhere."""
    flip(copied / "train_00000.bin")
    settings = {"source_path": sources, "vocab_size": 300, "val_fraction": 0.2}
    for corpus in (PythonStdlib(data_path=copied.parent, **settings), PreparedCorpus(corpus_dir=copied)):
        with pytest.raises(SettingsError, match="train_00000.bin differs from its checksum"):
            corpus.prepare()
