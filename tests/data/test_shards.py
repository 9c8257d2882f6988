import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt_moe_ext.data import shards
from litgpt_moe_ext.data.shards import open_shard, write_shard


def raw_shard(path, magic=20240520, version=1, count=3, body=b"\1\0\2\0\3\0"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    path.write_bytes(header.tobytes() + body)
    return path


def test_exact_bytes_of_a_gpt2_shard(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 2, 65535]), 65536)
    content = path.read_bytes()
    assert len(content) == 1024 + 6
    assert content[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (3).to_bytes(4, "little")
    assert content[12:1024] == bytes(1012)
    assert content[1024:] == b"\x01\x00\x02\x00\xff\xff"


def test_exact_bytes_of_a_llama3_shard(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([65536]), 65537)
    content = path.read_bytes()
    assert content[:12] == (20240801).to_bytes(4, "little") + (7).to_bytes(4, "little") + (1).to_bytes(4, "little")
    assert content[1024:] == b"\x00\x00\x01\x00"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 128255), min_size=1, max_size=50), st.booleans())
def test_round_trip(tmp_path_factory, tokens, wide):
    vocab = 128256 if wide else 65536
    tokens = np.array(tokens) % vocab
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    write_shard(path, tokens, vocab)
    read = open_shard(path)
    assert isinstance(read, np.memmap)
    assert not read.flags.writeable
    assert read.dtype == (np.uint32 if wide else np.uint16)
    assert read.tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magic": 1}, "wrong magic number 1"),
        ({"magic": 20240522}, "evaluation file"),
        ({"version": 7}, "version 7"),
        ({"count": 0, "body": b""}, "is empty"),
        ({"count": -1}, "is empty"),
        ({"count": 4}, "is truncated: the header counts 4 tokens"),
        ({"count": 2}, "is longer than its header says: the header counts 2 tokens"),
        ({"magic": 20240801, "version": 7}, "is truncated"),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    path = raw_shard(tmp_path / "bad.bin", **change)
    with pytest.raises(ValueError, match=message) as error:
        open_shard(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("size", [0, 12, 1023])
def test_shorter_than_a_header(tmp_path, size):
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=f"truncated or no token shard: it has {size} bytes"):
        open_shard(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.bin"):
        open_shard(tmp_path / "nowhere.bin")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([], dtype=int), "without tokens"),
        (np.array([[1]]), "1-D integer"),
        (np.array([1.0]), "1-D integer"),
        (np.array([0, 300]), "span 0..300, outside a vocabulary of 300"),
        (np.array([-1]), "span -1..-1"),
    ],
)
def test_bad_tokens_are_refused(tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.bin", tokens, 300)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 2]), 300)

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, np.array([3, 4, 5]), 300)
    assert os.listdir(tmp_path) == ["a.bin"]
    assert open_shard(path).tolist() == [1, 2]
