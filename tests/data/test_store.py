"""Finished corpora on disk: keys, manifests, the share that validates, the unigram loss."""

import json
import math
import os

import numpy as np
import pytest

from litgpt_moe_ext.data.pipeline.store import finished
from litgpt_moe_ext.data.pipeline.store.finished import (
    MANIFEST,
    STATE,
    TOKENIZER_DIR,
    cache_key,
    in_validation,
    publish,
    read_manifest,
    unigram_loss,
)
from litgpt_moe_ext.data.pipeline.store.unfinished import only_one
from litgpt_moe_ext.errors import SettingsError


def test_unigram_loss_by_hand():
    expected = -(math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6)) / 3
    assert unigram_loss(np.array([2, 1, 0]), np.array([1, 1, 1])) == pytest.approx(expected, rel=1e-12)


def test_share_of_validation_files():
    share = sum(in_validation(f"folder/file{index}.py", 0.05, 42) for index in range(20_000)) / 20_000
    assert share == pytest.approx(0.05, abs=0.006)


def test_another_seed_validates_on_other_files():
    names = [f"file{index}.py" for index in range(1000)]
    first, again, other = ({name for name in names if in_validation(name, 0.5, seed)} for seed in (1, 1, 2))
    assert first == again
    assert 150 < len(first & other) < 350, "a quarter by chance"


def test_earlier_corpora_are_found_and_divided_as_they_were(monkeypatch):
    monkeypatch.setattr(finished, "FORMAT_VERSION", 3)
    assert cache_key("0123", {"b": 1, "a": [None, "ü"]}) == "b926f59942929a48"
    assert [number for number in range(30) if in_validation(f"file{number}.py", 0.2, 42)] == [7, 12, 22, 23]


def test_keys_tell_settings_apart(monkeypatch):
    assert cache_key("x", {"a": 1, "b": 2}) == cache_key("x", {"b": 2, "a": 1}) != cache_key("x", {"a": 1, "b": 3})
    assert cache_key("x", {}) != cache_key("y", {})
    before = cache_key("x", {})
    monkeypatch.setattr(finished, "FORMAT_VERSION", finished.FORMAT_VERSION + 1)
    assert cache_key("x", {}) != before


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_damaged_corpus_is_named_and_not_deleted(corpus, tmp_path, damage):
    import shutil

    copy = tmp_path / corpus.name
    shutil.copytree(corpus, copy)
    if damage == "truncate":
        os.truncate(copy / "train_00000.bin", 2000)
        message = r"train_00000.bin has 2000 bytes where the manifest lists \d+; delete .* to prepare the corpus again"
    elif damage == "remove":
        (copy / TOKENIZER_DIR / "tokenizer.json").unlink()
        message = "tokenizer.json has no bytes where"
    else:
        (copy / MANIFEST).write_text("{")
        message = "manifest.json is damaged .*; delete"
    with pytest.raises(SettingsError, match=message):
        read_manifest(copy)
    assert copy.is_dir()


def test_a_folder_appears_whole(tmp_path, monkeypatch):
    """After all in it is on the disk, its name as well; how far its preparation was goes last."""
    partial, final, flushed = tmp_path / "partial", tmp_path / "0123", []
    partial.mkdir()
    for name, content in ((MANIFEST, {"file_sizes": {}}), (STATE, {})):
        (partial / name).write_text(json.dumps(content))
    monkeypatch.setattr(finished, "flush_tree", lambda path: flushed.append((path, path.is_dir())))
    monkeypatch.setattr(finished, "flush", lambda path: flushed.append((path, (final / STATE).is_file())))
    publish(partial, final)
    assert flushed == [(partial, True), (tmp_path, True)]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["0123", f"0123/{MANIFEST}"]
    assert read_manifest(final) == {"file_sizes": {}}


@pytest.mark.parametrize("below", [".", "deeper"])
def test_data_path_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match="data_path: '.*file.*' cannot be used .*; set data_path"):
        only_one(tmp_path / "file" / below / "0123", verbose=False).__enter__()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_data_path_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(SettingsError, match="data_path: '.*locked' cannot be used .*Permission denied"):
        only_one(tmp_path / "locked" / "0123", verbose=False).__enter__()
