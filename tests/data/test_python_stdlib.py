import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric import Fabric
from litgpt.args import TrainArgs
from litgpt.data import DataModule
from litgpt.pretrain import get_dataloaders
from litgpt.tokenizer import Tokenizer

import litgpt_moe_ext.data
from litgpt_moe_ext.data import PythonStdlib
from litgpt_moe_ext.data.corpora import python_stdlib as corpora
from litgpt_moe_ext.data.pipeline.store.finished import open_corpus, read_manifest
from litgpt_moe_ext.data.tokenizer.bpe import BPESettings, train_bpe
from litgpt_moe_ext.errors import SettingsError
from tests.runs import run_command

SCRIPT = Path(__file__).parents[2] / "data_prep" / "python_stdlib.py"
TRAIN = TrainArgs(micro_batch_size=3, global_batch_size=3, max_tokens=1000)


@pytest.fixture
def data(tmp_path, sources):
    return PythonStdlib(data_path=tmp_path, source_path=sources, vocab_size=300, val_fraction=0.2)


def test_litgpt_drives_it(data):
    fabric = Fabric(accelerator="cpu", devices=1)
    train, val = get_dataloaders(fabric, data, None, TRAIN, block_size=16)
    (expected_train,), (expected_val,) = open_corpus(data.corpus_path)
    rows = torch.cat(list(val))
    assert rows.shape[1] == 17
    assert len(rows) == (len(expected_val) - 1) // 16
    assert rows[:, :-1].flatten().tolist() == expected_val[: 16 * len(rows)].tolist()
    assert next(iter(train)).shape == (3, 17)
    assert len(train) == (len(expected_train) - 1) // 16 // 3


def test_the_prepared_tokenizer_is_accepted(data):
    directory = data.prepare_tokenizer()
    assert directory.parent == data.corpus_path
    tokenizer = Tokenizer(directory)
    train, _ = get_dataloaders(Fabric(accelerator="cpu", devices=1), data, tokenizer, TRAIN, block_size=16)
    text = tokenizer.decode(next(iter(train))[0])
    assert "def " in text or "return" in text


@pytest.mark.parametrize("prepared", [True, False])
def test_another_tokenizer_is_refused(data, tmp_path_factory, prepared):
    other = tmp_path_factory.mktemp("other")
    train_bpe(["something else"], BPESettings(260), other)
    if prepared:
        data.prepare_tokenizer()
    with pytest.raises(
        ValueError, match="is not the tokenizer that encoded this corpus.* set tokenizer_dir to '.*tokenizer'"
    ):
        get_dataloaders(Fabric(accelerator="cpu", devices=1), data, Tokenizer(other), TRAIN, block_size=16)


def test_a_state_of_another_corpus_is_refused(data, tmp_path, sources):
    fabric = Fabric(accelerator="cpu", devices=1)
    state = get_dataloaders(fabric, data, None, TRAIN, block_size=16)[0].state_dict()
    other = PythonStdlib(data_path=tmp_path, source_path=sources, vocab_size=301, val_fraction=0.2)
    loader = get_dataloaders(fabric, other, None, TRAIN, block_size=16)[0]
    with pytest.raises(ValueError, match="corpus: '[0-9a-f]{16}' in the checkpoint, '[0-9a-f]{16}' now"):
        loader.load_state_dict(state)


def test_preparation_is_done_once(data, capsys):
    data.prepare_tokenizer()
    data.connect(batch_size=2, max_seq_length=16)
    data.prepare_data()
    data.setup()
    assert capsys.readouterr().out.count("corpus in") == 1


def test_setup_alone_suffices(data):
    data.connect(batch_size=2, max_seq_length=16)
    data.setup()
    assert next(iter(data.train_dataloader())).shape == (2, 17)


def test_calls_in_the_wrong_order(data):
    with pytest.raises(RuntimeError, match="Call setup"):
        data.train_dataloader()
    data.setup()
    with pytest.raises(ValueError, match="max_seq_length: -1 must be at least 1"):
        data.train_dataloader()


@pytest.mark.parametrize(("length", "name"), [(10**6, "training data"), (9000, "validation data")])
def test_too_little_data_names_the_split(data, length, name):
    data.connect(batch_size=1, max_seq_length=length)
    data.setup()
    with pytest.raises(
        ValueError,
        match=rf"train.max_seq_length: {length} needs .*, but the {name} has \d+;",
    ):
        data.train_dataloader() if name == "training data" else data.val_dataloader()


def test_named_in_yaml_by_class_path():
    parser = ArgumentParser()
    parser.add_argument("--data", type=DataModule)
    arguments = {"data_path": "somewhere", "vocab_size": 2048, "val_fraction": 0.1}
    parsed = parser.parse_object({"data": {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": arguments}})
    built = parser.instantiate_classes(parsed).data
    assert built == PythonStdlib(data_path=Path("somewhere"), vocab_size=2048, val_fraction=0.1)
    dumped = parser.parse_string(parser.dump(parsed))
    assert parser.instantiate_classes(dumped).data == built


def test_only_settings_are_logged(data):
    data.prepare_tokenizer()
    assert set(asdict(data)) == {field.name for field in fields(corpora.PythonStdlib)}


def test_paths_may_be_strings():
    data = PythonStdlib(data_path="a", source_path="b")
    assert (data.data_path, data.source_path) == (Path("a"), Path("b"))


def test_the_installed_packages(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(corpora.sysconfig, "get_path", {"purelib": sources}.__getitem__)
    options = {"data_path": tmp_path, "vocab_size": 300, "val_fraction": 0.2}
    named = PythonStdlib(source_path=sources, **options).prepare_tokenizer()
    assert PythonStdlib(packages=True, **options).prepare_tokenizer() == named, "the same text is the same corpus"
    with pytest.raises(SettingsError, match="packages: true has no effect beside source_path"):
        PythonStdlib(packages=True, source_path=sources, **options).prepare_tokenizer()


def test_importing_the_package_is_lazy():
    program = (
        "import sys, litgpt_moe_ext.data as data;"
        "assert 'litgpt_moe_ext.data.modules.corpus' not in sys.modules;"
        "assert 'PythonStdlib' in dir(data)"
    )
    run_command(sys.executable, "-c", program, LITGPT_MOE_EXT_DISABLE="1")
    with pytest.raises(AttributeError, match="has no attribute 'Unknown'"):
        litgpt_moe_ext.data.Unknown  # noqa: B018


# ---- the script


def test_script_prepares_what_training_finds(data, tmp_path, sources, capsys):
    options = ["--data_path", tmp_path, "--source_path", sources, "--vocab_size", "300", "--val_fraction", "0.2"]
    result = run_command(sys.executable, SCRIPT, *options)
    directory = Path(result.stdout.splitlines()[-1].removeprefix("tokenizer_dir for LitGPT: "))
    assert read_manifest(directory.parent)["sources_count"] == 40
    assert data.prepare_tokenizer() == directory
    assert "Reusing" in capsys.readouterr().out


def test_script_errors_are_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, "--data_path", tmp_path, "--source_path", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: source_path: ")
    assert result.stderr.count("\n") == 1
