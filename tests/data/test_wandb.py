"""Corpora as W&B artifacts: logged offline for real, errors of the real client, and a run that trains from one."""

import os
import shutil
import time
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import wandb

from litgpt_moe_ext.cli.train import main
from litgpt_moe_ext.data import PreparedCorpus, PythonStdlib, WandbCorpus
from litgpt_moe_ext.data.pipeline.store.finished import open_corpus, read_manifest
from litgpt_moe_ext.data.pipeline.store.wandb_artifacts import download, log_corpus
from tests.runs import PATIENCE
from tests.wandb_service import end_service

REFERENCE = "team/project/corpus:latest"


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """No account, no network, nothing of the machine's W&B settings."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    end_service()  # a process keeps the settings that it began with
    yield monkeypatch
    end_service()


@pytest.fixture
def server(clean, corpus):
    """wandb's public API with `corpus` as its one artifact; calls that the real classes would refuse fail."""
    artifact = create_autospec(wandb.Artifact, instance=True)
    artifact.name, artifact.version = "corpus:latest", "v3"
    artifact.download.side_effect = lambda root=None, **_: shutil.copytree(corpus, root, dirs_exist_ok=True)
    api = create_autospec(wandb.Api, instance=True)
    api.artifact.side_effect = lambda name, type=None: artifact
    clean.setattr(wandb, "Api", lambda: api)
    return api


@pytest.mark.slow
def test_logged_offline_for_real(clean, corpus, tmp_path):
    clean.setenv("WANDB_MODE", "offline")
    with wandb.init(project="another") as mine:  # as in a notebook
        message = log_corpus(corpus, "stdlib-tokens", project="corpora")
        assert wandb.run is mine
        mine.log({"loss": 1.0})
    folder = Path(message.removeprefix("Logged stdlib-tokens offline. To upload it: wandb sync "))
    (log,) = folder.glob("*.wandb")
    content, deadline = log.read_bytes(), time.monotonic() + PATIENCE
    while b"stdlib-tokens" not in content and time.monotonic() < deadline:
        time.sleep(0.1)  # wandb's own process may still be writing
        content = log.read_bytes()
    expected = [path for path in corpus.rglob("*") if path.is_file()]
    for part in ("stdlib-tokens", read_manifest(corpus)["corpus_sha256"], *(path.name for path in expected)):
        assert part.encode() in content
    staged = [path.read_bytes() for path in (tmp_path / "staging").rglob("*") if path.is_file()]
    assert sorted(staged) == sorted(path.read_bytes() for path in expected)


def test_without_a_key_it_is_not_logged(clean, corpus):
    with pytest.raises(ValueError, match="logging it failed .No API key configured.* or set WANDB_MODE=offline"):
        log_corpus(corpus, "tokens")


def test_wrong_names(clean, corpus):
    with pytest.raises(ValueError, match="wandb_artifact: 'a b' must be a name of an artifact"):
        log_corpus(corpus, "a b")


def test_a_refusal_of_wandb_is_passed_on(clean, corpus):
    def refuse(**_):
        raise wandb.errors.CommError("permission denied")

    clean.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match="is finished, but logging it failed .permission denied.; log in"):
        log_corpus(corpus, "tokens")


def test_training_from_an_artifact(server, corpus, tmp_path, capsys):
    data = WandbCorpus(REFERENCE, tmp_path / "artifacts")
    tokenizer_dir = data.prepare_tokenizer()
    assert tokenizer_dir.parent == tmp_path / "artifacts" / "corpus-v3" == data.corpus_path
    server.artifact.assert_called_once_with(REFERENCE, type="dataset")
    data.connect(batch_size=2, max_seq_length=16)
    data.setup()
    assert next(iter(data.train_dataloader())).shape == (2, 17)
    assert open_corpus(data.corpus_path)[0][0].tolist() == open_corpus(corpus)[0][0].tolist()
    assert f"Using the W&B artifact {REFERENCE} in" in capsys.readouterr().out


def test_an_active_run_gets_the_artifact_as_an_input(server, clean, tmp_path):
    run = create_autospec(wandb.Run, instance=True)
    run.use_artifact.side_effect = lambda name, type=None: server.artifact(name, type)
    clean.setattr(wandb, "run", run)
    download(REFERENCE, tmp_path)
    run.use_artifact.assert_called_once_with(REFERENCE, type="dataset")


def test_an_artifact_that_is_no_corpus(server, tmp_path):
    server.artifact("x").download.side_effect = lambda root=None, **_: root
    with pytest.raises(ValueError, match="has no manifest.json, so it is not a prepared corpus; log one"):
        download(REFERENCE, tmp_path)


@pytest.mark.parametrize("reference", ["corpus", "team/corpus:v1", "a/b/c", "a/b/c:", "a/b/c:d:e", "a//c:v1", ""])
def test_wrong_references(reference):
    with pytest.raises(ValueError, match="must name an artifact in full; write entity/project/name:alias"):
        WandbCorpus(reference)


def test_without_a_key(clean, tmp_path):
    with pytest.raises(ValueError, match="downloaded .No API key configured.* log in with `wandb login` or set"):
        download(REFERENCE, tmp_path)


def test_without_a_network(clean, tmp_path):
    clean.setenv("WANDB_API_KEY", "0" * 40)
    clean.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    clean.setattr(wandb, "Api", lambda original=wandb.Api: original(timeout=1))
    with pytest.raises(ValueError, match="cannot be downloaded .*127.0.0.1:9.* and check the"):
        download(REFERENCE, tmp_path)


def test_offline(clean, tmp_path):
    clean.setenv("WANDB_MODE", "offline")
    with pytest.raises(ValueError, match="cannot be downloaded while WANDB_MODE is offline; unset WANDB_MODE"):
        download(REFERENCE, tmp_path)


def test_reads_as_the_recipe_says():
    data = WandbCorpus.instead_of(PreparedCorpus("x", packing="best_fit", shuffle=False, seed=7), REFERENCE, Path("y"))
    assert data == WandbCorpus(REFERENCE, Path("y"), packing="best_fit", shuffle=False, seed=7)
    assert WandbCorpus.instead_of(PythonStdlib(seed=3), REFERENCE, None) == WandbCorpus(REFERENCE, seed=3)
    assert WandbCorpus.instead_of(None, REFERENCE, None) == WandbCorpus(REFERENCE)


@pytest.mark.parametrize(
    ("reference", "mode", "message"),
    [
        ("nonsense", "online", "error: wandb_dataset: 'nonsense' must name an artifact in full"),
        (REFERENCE, "offline", "cannot be downloaded while WANDB_MODE is offline"),
        (REFERENCE, "online", "cannot be downloaded (No API key configured."),
    ],
)
def test_run_train_says_what_is_wrong(clean, tmp_path, capsys, reference, mode, message):
    clean.setenv("WANDB_MODE", mode)
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    arguments = ["--config", str(config), "--wandb-dataset", reference, "--out_dir", str(tmp_path / "out")]
    assert main([*arguments, "--wandb-artifacts-dir", str(tmp_path / "artifacts"), "--devices", "1"]) == 2
    assert message in capsys.readouterr().err
