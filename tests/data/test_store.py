"""Finished corpora on disk: keys, manifests, the share that validates, the unigram loss."""

import json
import math
import os

import numpy as np
import pytest

from litgpt_moe_ext.data.pipeline import store
from litgpt_moe_ext.data.pipeline.store import (
    MANIFEST,
    TOKENIZER_DIR,
    cache_key,
    check_root,
    in_validation,
    publish,
    read_manifest,
    unigram_loss,
)
from litgpt_moe_ext.errors import SettingsError


def test_unigram_loss_by_hand():
    expected = -(math.log(3 / 6) + math.log(2 / 6) + math.log(1 / 6)) / 3
    assert unigram_loss(np.array([2, 1, 0]), np.array([1, 1, 1])) == pytest.approx(expected, rel=1e-12)


def test_share_of_validation_files():
    share = sum(in_validation(f"folder/file{index}.py", 0.05, 42) for index in range(20_000)) / 20_000
    assert share == pytest.approx(0.05, abs=0.006)


def test_keys_tell_settings_apart(monkeypatch):
    assert cache_key("x", {"a": 1, "b": 2}) == cache_key("x", {"b": 2, "a": 1}) != cache_key("x", {"a": 1, "b": 3})
    assert cache_key("x", {}) != cache_key("y", {})
    before = cache_key("x", {})
    monkeypatch.setattr(store, "FORMAT_VERSION", store.FORMAT_VERSION + 1)
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


def test_a_folder_appears_whole(tmp_path):
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / MANIFEST).write_text(json.dumps({"file_sizes": {}}))
    publish(tmp_path / "partial", tmp_path / "0123")
    assert [path.name for path in tmp_path.iterdir()] == ["0123"]
    assert read_manifest(tmp_path / "0123") == {"file_sizes": {}}


@pytest.mark.parametrize("below", [".", "deeper"])
def test_data_path_that_is_a_file(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match="data_path: '.*file.*' cannot be used .*; set data_path"):
        check_root(tmp_path / "file" / below)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_data_path_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(SettingsError, match="data_path: '.*locked' cannot be used .*Permission denied"):
        check_root(tmp_path / "locked")
