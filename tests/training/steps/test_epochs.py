"""Epochs instead of tokens."""

import csv
import re

import pytest
import yaml

from litgpt_moe_ext.data.loader import TokenLoader
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.training.steps.epochs import Epochs
from tests.runs import refused, train


def test_data_without_epochs_are_refused():
    saved = []
    Epochs(None).on_step_begin({"train_dataloader": []})
    with pytest.raises(SettingsError, match="checkpoint.every_epoch: true needs data that counts its epochs"):
        Epochs(lambda: saved.append(1)).on_step_begin({"train_dataloader": []})
    assert saved == []


@pytest.fixture
def small_data(tmp_path, corpus_settings):
    """Data of which an epoch has a few steps."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(8):
        (source / f"{number}.py").write_text(f"def add_{number}(value):\n    return value + {number}\n" * 12)
    small = {**corpus_settings, "data_path": str(tmp_path / "data"), "source_path": str(source)}
    return {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": small}


@pytest.mark.slow
def test_epochs_of_unknown_length(recipe, monkeypatch, capsys):
    """As those of litdata's mixtures."""

    def unknown(_loader):
        raise TypeError

    monkeypatch.setattr(TokenLoader, "__len__", unknown)
    for setting in ({"lr_warmup_fraction": 0.5, "lr_warmup_steps": 0}, {"epochs": 1}):
        error = refused(capsys, "--config", recipe(train=setting))
        assert f"error: train.{next(iter(setting))}: {next(iter(setting.values()))} needs data that says how" in error


def test_two_epochs_with_a_checkpoint_each(recipe, tmp_path, small_data, capsys):
    """Steps come from the data; the epoch is counted on over a resume; the hint and the checkpoint know the setting."""
    out = tmp_path / "out"
    file = recipe(data=small_data, train={"save_interval": None}, eval={"interval": 1000})
    flags = ["--config", file, "--train.epochs", "2", "--checkpoint.every_epoch", "true"]
    assert train(*flags) == 0
    output = capsys.readouterr().out
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    epochs = [int(row["epoch"]) for row in rows]
    first = epochs.index(1)
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1}
    assert len(rows) == 2 * first - 1, "the last step that begins in the first epoch ends in the second"
    assert f"train.epochs: 2 means {len(rows)} steps, train.max_tokens: {len(rows) * 4 * 32}\n" in output
    assert f"step {len(rows)}/{len(rows)} |" in output
    assert output.splitlines()[-1] == "To continue: --resume auto --train.epochs 4"
    assert [path.name for path in out.glob("step-*")] == [f"step-{first:08d}"]
    saved = yaml.safe_load((out / "final" / "hyperparameters.yaml").read_text())["train"]
    assert (saved["epochs"], saved["max_tokens"]) == (2, len(rows) * 4 * 32)

    (out / "final").rename(tmp_path / "away")
    (out / "best").rename(tmp_path / "best")
    assert train(*flags, "--resume", "auto") == 0
    assert [int(row["epoch"]) for row in csv.DictReader((out / "metrics.csv").open())] == epochs


def test_a_step_that_is_only_validated_has_its_epoch_too(recipe, tmp_path, small_data):
    changes = {"eval": {"interval": 3, "initial_validation": True}, "train": {"epochs": 2, "log_interval": 2}}
    assert train("--config", recipe(data=small_data, **changes)) == 0
    before, *rows = csv.DictReader((tmp_path / "out" / "metrics.csv").open())
    assert (before["step"], before["epoch"]) == ("0", "")  # no epoch has begun
    assert {bool(row["train_loss"]) for row in rows} == {True, False}
    epochs = [int(row["epoch"]) for row in rows]
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1}


def test_a_step_that_has_a_checkpoint_is_not_saved_again(recipe, small_data, capsys):
    train_args = {"epochs": 2, "save_interval": 1}
    assert train("--config", recipe(data=small_data, train=train_args, checkpoint={"every_epoch": True})) == 0
    saved = re.findall(r"saved \S*/(step-\d+)", capsys.readouterr().out)
    assert len(saved) > 2
    assert len(set(saved)) == len(saved)


def test_epochs_of_a_mixture(recipe, corpus_settings, capsys):
    part = {"class_path": "litgpt_moe_ext.data.PythonStdlib", "init_args": corpus_settings}
    mixture = {"corpora": {"a": part, "b": part}, "weights": {"a": 1, "b": 1}}
    file = recipe(data={"class_path": "litgpt_moe_ext.data.Mixture", "init_args": mixture}, train={"epochs": 1})
    assert train("--config", file) == 2
    assert "train.epochs: 1 must be null for a mixture" in capsys.readouterr().err
