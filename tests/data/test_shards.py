import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litgpt_moe_ext.data.pipeline import shards
from litgpt_moe_ext.data.pipeline.shards import open_shard, scan_shard, write_shard

LARGE_IDS = (np.arange(1000) * 7919 % 128256).astype("<u4")
"""Of a vocabulary beyond 16 bits."""


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


def test_shorter_than_its_header(tmp_path):
    path = raw_shard(tmp_path / "short.bin")
    os.truncate(path, 1023)
    with pytest.raises(ValueError, match="short.bin is truncated: it has 1023 bytes, its header alone takes 1024"):
        open_shard(path)


TOKENS = np.array([50256, 5, 300, 17] * 20, "<u2")


def save_npy_under_another_name(path):
    with open(path, "wb") as file:
        np.save(file, TOKENS)


def save_with_a_later_header(path):
    with open(path, "wb") as file:
        np.lib.format.write_array(file, TOKENS, version=(2, 0))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.npy", lambda path: np.save(path, TOKENS)),
        ("later.npy", save_with_a_later_header),
        ("wide.npy", lambda path: np.save(path, TOKENS.astype("<u4"))),
        ("npy_inside.bin", save_npy_under_another_name),
        ("llmc.bin", lambda path: write_shard(path, TOKENS, 50257)),
        ("llama.bin", lambda path: write_shard(path, TOKENS, 128256)),
        ("raw.bin", lambda path: TOKENS.tofile(path)),
    ],
)
def test_every_form_by_its_bytes(tmp_path, name, write):
    path = tmp_path / name
    write(path)
    tokens = open_shard(path)
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == (np.uint32 if name in ("wide.npy", "llama.bin") else np.uint16)
    assert tokens.tolist() == TOKENS.tolist()
    scan_shard(tokens, 50257)
    with pytest.raises(ValueError, match=rf"{name} has token id 50256 at token 0 .byte {tokens.offset}., outside"):
        scan_shard(tokens, 50256)


def test_short_headerless_files_are_read(tmp_path):
    path = tmp_path / "a.bin"
    np.array([1, 0, 2, 0], "<u2").tofile(path)
    assert open_shard(path).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("vocab_size", [65, 256, 50257, 65536])
def test_headerless_files_of_any_vocabulary_are_read(tmp_path, vocab_size):
    """Ids of characters are bytes of text, with a zero after each."""
    ids = (np.arange(1000) * 1237 % vocab_size).astype("<u2")
    ids.tofile(tmp_path / "a.bin")
    assert open_shard(tmp_path / "a.bin").tolist() == ids.tolist()


def test_headerless_files_whose_bytes_are_characters_but_no_text_are_read(tmp_path):
    """Of ids that are all above 8,224, without a byte that ends lines or controls a terminal."""
    ids = (0x8080 + np.arange(100)).astype("<u2")
    assert min(ids.tobytes()) >= 32
    ids.tofile(tmp_path / "a.bin")
    assert open_shard(tmp_path / "a.bin").tolist() == ids.tolist()


def test_headerless_files_with_low_ids_at_every_second_place_are_read(tmp_path):
    """As of a task of numbers with labels."""
    ids = np.stack([np.arange(1000), np.arange(1000) % 2], 1).ravel().astype("<u2")
    ids.tofile(tmp_path / "a.bin")
    assert open_shard(tmp_path / "a.bin").tolist() == ids.tolist()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: it has 0 bytes"),
        (TOKENS.tobytes() + b"x", "has 161 bytes, an odd number, and no header"),
        (TOKENS.astype("<u4").tobytes(), "every second uint16 is below 4 .from byte 2 to byte 320.: it holds uint32"),
        (LARGE_IDS.tobytes(), "every second uint16 is below 4 .from byte 2 to byte 4000.: it holds uint32"),
        (npy(TOKENS)[:-2], "is truncated: the header counts 80 tokens .288 bytes., the file has 286 bytes .79 tok"),
        (npy(TOKENS) + b"xx", "is longer than its header says: the header counts 80 tokens"),
        (npy(TOKENS)[:40], "has a damaged NumPy header, read up to byte"),
        (npy(TOKENS.astype(float)), r"shape \(80,\) and dtype float64; a token shard is one-dimensional"),
        (npy(TOKENS.reshape(2, 40)), r"holds an array of shape \(2, 40\)"),
        (npy(TOKENS.astype(">u2")), "dtype >u2"),
        (npy(TOKENS[:0]), "is empty: its header counts 0 tokens"),
        (b"\x1f\x8b\x08\x00" + bytes(range(50)), "is gzip, not a token shard"),
        (b"PAR1" + bytes(range(50)), "is parquet, not a token shard"),
        (
            "Text, ä letter of which is cut.\n".encode() * 40,
            "is text, not a token shard; prepare a corpus from it with",
        ),
    ],
)
def test_bad_files_of_other_forms_are_named(tmp_path, content, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_shard(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("vocab_size", "byte"), [(65536, 1098), (65537, 1172)])
def test_a_bad_id_is_found_in_later_parts(tmp_path, monkeypatch, vocab_size, byte):
    monkeypatch.setattr(shards, "_SCAN_TOKENS", 16)
    path = tmp_path / "a.bin"
    tokens = np.arange(50)
    tokens[[37, 41]] = 60000, 60001
    write_shard(path, tokens, vocab_size)
    with pytest.raises(
        ValueError, match=rf"a.bin has token id 60000 at token 37 .byte {byte}., outside a vocabulary of 50"
    ):
        scan_shard(open_shard(path), 50257)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match="nowhere.bin"):
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


def test_more_tokens_than_the_header_can_count(tmp_path):
    with pytest.raises(ValueError, match="2147483648 tokens exceed the header's int32 count"):
        write_shard(tmp_path / "a.bin", np.broadcast_to(np.uint16(9), 2**31), 5)


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


def test_the_same_bytes_of_another_width_are_other_tokens(tmp_path):
    tokens, prints = np.arange(9, dtype="<u4"), set()
    for width in ("<u4", "<u2"):
        np.save(tmp_path / "shard.npy", tokens.view(width))
        prints.add(scan_shard(open_shard(tmp_path / "shard.npy"), None))
    assert len(prints) == 2
