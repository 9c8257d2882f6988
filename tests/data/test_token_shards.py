import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric import Fabric
from litgpt.args import TrainArgs
from litgpt.data import DataModule
from litgpt.pretrain import get_dataloaders

from litgpt_moe_ext.data import TokenShards
from litgpt_moe_ext.data.pipeline import hashes, shards
from litgpt_moe_ext.data.pipeline.shards import write_shard
from litgpt_moe_ext.errors import SettingsError

TRAIN = TrainArgs(micro_batch_size=2, global_batch_size=2, max_tokens=1000)


def write(folder, sizes: dict[str, int]) -> np.ndarray:
    """Writes shards whose ids count up, in the given order and each in the form of its suffix."""
    tokens = np.arange(sum(sizes.values()))
    start = 0
    for name, size in sizes.items():
        part = tokens[start : start + size]
        if name.endswith(".npy"):
            np.save(folder / name, part.astype("<u2"))
        elif "raw" in name:
            part.astype("<u2").tofile(folder / name)
        else:
            write_shard(folder / name, part, 65536)
        start += size
    return tokens


def loaders(data, block_size=8):
    return get_dataloaders(Fabric(accelerator="cpu", devices=1), data, None, TRAIN, block_size=block_size)


def test_named_train_and_val(tmp_path, capsys):
    sizes = {
        "edu_val_000000.npy": 40,
        "edu_train_000001.npy": 45,
        "edu_train_000002.bin": 37,
        "edu_train_10_raw.bin": 61,
    }
    tokens = write(tmp_path, sizes)
    train, val = loaders(TokenShards(tmp_path, shuffle=False))
    assert torch.cat(list(val))[:, :-1].flatten().tolist() == tokens[:32].tolist()
    # 143 tokens in three files are 17 windows of 8, of which 16 fill batches of 2; none is cut at a border.
    assert torch.cat(list(train))[:, :-1].flatten().tolist() == tokens[40 : 40 + 128].tolist()
    output = capsys.readouterr().out
    assert "To train on: 3 shards, edu_train_000001.npy .. edu_train_10_raw.bin, 143 tokens (ids not" in output
    assert "To validate on: 1 shard, edu_val_000000.npy, 40 tokens" in output


def test_an_order_that_no_folder_decides(tmp_path, monkeypatch):
    write(tmp_path, {"val.bin": 9, "train_1.bin": 9, "train_01.bin": 9, "train_2.bin": 9, "train_10.bin": 9})
    paths = sorted(tmp_path.iterdir())
    for listed in (paths, paths[::-1]):
        monkeypatch.setattr(Path, "iterdir", lambda folder, listed=listed: iter(listed))
        train, _ = TokenShards(tmp_path).find_shards()
        assert [path.stem for path in train] == ["train_01", "train_1", "train_2", "train_10"]


def test_the_first_tokens(tmp_path, capsys):
    tokens = write(tmp_path, {"val.bin": 20, "train_1.bin": 20, "train_2.bin": 20, "train_3.bin": 20})
    data = TokenShards(tmp_path, train_count=33, val_count=9, shuffle=False)
    train, val = loaders(data)
    assert torch.cat(list(val))[:, :-1].flatten().tolist() == tokens[:8].tolist()
    assert torch.cat(list(train))[:, :-1].flatten().tolist() == tokens[20:52].tolist()
    assert "train_1.bin .. train_3.bin, 33 tokens" in capsys.readouterr().out
    whole = TokenShards(tmp_path)
    whole.open_shards()
    assert whole.corpus_id != data.corpus_id
    with pytest.raises(ValueError, match="data.train_count: 0 must be an integer of at least 1"):
        TokenShards(tmp_path, train_count=0)


@pytest.mark.parametrize("vocab_size", [65536, 65537])
def test_other_tokens_under_the_same_names_are_other_data(tmp_path, monkeypatch, vocab_size):
    """Wherever in a shard: at its ends, in one of the parts that it is read in, in what is left over."""
    monkeypatch.setattr(shards, "_SCAN_TOKENS", 1 << 16)
    tokens, found = np.arange(300_001) % 65536, set()

    def identity(**settings) -> str:
        for name in ("train.bin", "val.bin"):
            write_shard(tmp_path / name, tokens, vocab_size)
        data = TokenShards(tmp_path, **settings)
        data.open_shards()
        return data.corpus_id

    found.add(identity())
    assert identity(vocab_size=vocab_size) in found
    for changed in (0, -1, 150_000, 290_000):
        tokens[changed] ^= 1
        found.add(identity())
    for first, second in ((0, 40_000), (70_000, 200_000), (299_998, 299_999)):
        tokens[[first, second]] = tokens[[second, first]]
        found.add(identity())
    assert len(found) == 8


class TestChecksums:
    """Those of files that were downloaded, as `sha256sum` or `find` writes them."""

    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(hashes, "_SETTLED_SECONDS", -60.0)
        folder = tmp_path / "shards"
        folder.mkdir()
        write(folder, {"val.bin": 40, "train_1.bin": 40, "train_2.npy": 40})
        digest = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        lines = [f"{digest['val.bin']}  val.bin", f"{digest['train_1.bin']} *./train_1.bin", f"{64 * '0'}  train_9.bin"]
        (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
        return folder

    def test_a_shard_that_differs_is_named(self, folder, capsys):
        TokenShards(folder).prepare_data()
        assert "SHA256SUMS does not list train_2.npy, so it is not checked" in capsys.readouterr().out
        for name in ("train_1.bin", "val.bin"):
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:-1] + b"x")
            with pytest.raises(SettingsError, match=rf"{name} differs from its checksum in SHA256SUMS; download it"):
                loaders(TokenShards(folder))
            (folder / name).write_bytes(content)
        (folder / "SHA256SUMS").write_text("damaged")
        with pytest.raises(SettingsError, match="shards: SHA256SUMS is damaged in line 1; download it again"):
            TokenShards(folder).prepare_data()

    def test_they_are_compared_once(self, folder, monkeypatch):
        TokenShards(folder).prepare_data()
        monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
        TokenShards(folder).prepare_data()

    def test_only_those_that_are_read(self, folder):
        (folder / "train_1.bin").write_bytes((folder / "train_1.bin").read_bytes()[:-1] + b"x")
        TokenShards(folder, train_pattern="train_2*").prepare_data()


def test_the_first_validates_where_no_name_says_so(tmp_path):
    write(tmp_path, {"shard_2.bin": 20, "shard_10.bin": 20, "shard_1.bin": 20, "shard_10²3.bin": 20})
    (tmp_path / "readme.txt").write_text("x")
    train, val = TokenShards(tmp_path).find_shards()
    assert [path.name for path in val] == ["shard_1.bin"]
    assert [path.name for path in train] == ["shard_2.bin", "shard_10.bin", "shard_10²3.bin"]


@pytest.mark.parametrize(
    ("names", "val"),
    [
        ("retrieval_1 retrieval_2 retrieval_3", "retrieval_1"),
        ("retrieval_train_1 retrieval_train_2 retrieval_val_1", "retrieval_val_1"),
        ("evalTrain1 evalVal1", "evalVal1"),
        ("eval_train eval_valid", "eval_valid"),
        ("textTRAIN textVAL", "textVAL"),
        ("texttest texttrain textval", "textval"),
        ("constraints_1 web_1 web_2 validation_1", "validation_1"),
    ],
)
def test_words_in_other_words_do_not_count(tmp_path, names, val):
    write(tmp_path, {f"{name}.bin": 20 for name in names.split()})
    found = TokenShards(tmp_path).find_shards()
    assert [path.stem for path in found[1]] == [val]
    assert [path.stem for path in found[0]] == [name for name in names.split() if name not in (val, "texttest")]


def test_only_names_of_validation(tmp_path):
    write(tmp_path, {"val_1.bin": 20, "val_2.bin": 20})
    with pytest.raises(ValueError, match="no train shards: it has 2 files .* those with val in their .* train_pattern"):
        TokenShards(tmp_path).prepare_data()


@pytest.mark.parametrize("name", ["train_1.bin", "edu_train_000001.npy"])
def test_the_folder_above_the_shards(tmp_path, name):
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / name).write_bytes(b"")
    with pytest.raises(SettingsError, match=r"has no train shards: .*; did you mean .*sample\?$"):
        TokenShards(tmp_path).prepare_data()


def test_patterns(tmp_path):
    write(tmp_path, {"a0.bin": 20, "a1.bin": 20, "b.bin": 20})
    train, val = TokenShards(tmp_path, train_pattern="a*.bin", val_pattern="b*").find_shards()
    assert ([path.name for path in train], [path.name for path in val]) == (["a0.bin", "a1.bin"], ["b.bin"])
    with pytest.raises(ValueError, match="val_pattern .* both match .*a1.bin, which would train"):
        TokenShards(tmp_path, train_pattern="a*", val_pattern="a1*").find_shards()
    with pytest.raises(
        ValueError, match="has no validation shards: it has 3 files.* none like val_pattern: 'c.'; set it"
    ):
        TokenShards(tmp_path, val_pattern="c*").prepare_data()


def test_no_validation_split(tmp_path):
    write(tmp_path, {"only.bin": 20})
    with pytest.raises(
        ValueError, match="has no validation shards: it has 1 file ending.* needs two or more, of which"
    ):
        TokenShards(tmp_path).prepare_data()
    with pytest.raises(ValueError, match="data_path: '.*nowhere' is not a folder"):
        TokenShards(tmp_path / "nowhere").prepare_data()


def test_ids_are_checked_against_the_model(tmp_path):
    write(tmp_path, {"train.bin": 100, "val.bin": 50})
    data = TokenShards(tmp_path)
    data.require_vocabulary(150)
    loaders(data)
    data.require_vocabulary(149)
    with pytest.raises(
        ValueError, match=r"val.bin has token id 149 at token 49 .byte 1122., outside .* of 149 entries"
    ):
        loaders(data)
    with pytest.raises(ValueError, match="data.vocab_size: 200 is larger than .* of 149; set"):
        TokenShards(tmp_path, vocab_size=200).require_vocabulary(149)


def test_order_by_seed_and_resume(tmp_path):
    write(tmp_path, {"train_1.bin": 100, "train_2.npy": 101, "val.bin": 50})
    whole = [batch.tolist() for batch in loaders(TokenShards(tmp_path, seed=1))[0]]
    assert whole != [batch.tolist() for batch in loaders(TokenShards(tmp_path, seed=2))[0]]
    first = loaders(TokenShards(tmp_path, seed=1))[0]
    iterator = iter(first)
    assert [next(iterator).tolist() for _ in range(5)] == whole[:5]
    second = loaders(TokenShards(tmp_path, seed=1))[0]
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in second] == whole[5:]
    write(tmp_path, {"train_1.bin": 101, "train_2.npy": 100})
    with pytest.raises(ValueError, match="corpus: '[0-9a-f]{16}' in the checkpoint"):
        loaders(TokenShards(tmp_path, seed=1))[0].load_state_dict(first.state_dict())


def test_named_in_yaml_by_class_path(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--data", type=DataModule)
    arguments = {"data_path": str(tmp_path), "shuffle": False, "val_pattern": "v*"}
    parsed = parser.parse_object({"data": {"class_path": "litgpt_moe_ext.data.TokenShards", "init_args": arguments}})
    assert parser.instantiate_classes(parsed).data == TokenShards(tmp_path, shuffle=False, val_pattern="v*")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seed": -1}, "data.seed: -1 must be an integer of at least 0"),
        ({"vocab_size": 0}, "data.vocab_size: 0 must be an integer of at least 1"),
        ({"shuffle": "no"}, "data.shuffle: 'no' must be true or false"),
    ],
)
def test_settings_are_checked_before_anything_is_read(tmp_path, setting, message):
    with pytest.raises(SettingsError, match=message):
        TokenShards(tmp_path, **setting)
