"""Corpora as W&B artifacts, online: the real client against a server on this machine."""

import shutil
import sys
from pathlib import Path

import pytest
import wandb

from litgpt_moe_ext.data.corpora.python_stdlib import PythonStdlib
from litgpt_moe_ext.data.pipeline.store.finished import read_manifest
from litgpt_moe_ext.data.pipeline.store.wandb_artifacts import download, log_corpus
from tests.data.test_text import tiny_txt
from tests.data.test_wandb import clean  # noqa: F401
from tests.data.wandb_server import ENTITY, KEY, PROJECT, running
from tests.runs import ROOT, run_command
from tests.wandb_service import end_service

REFERENCE = f"{ENTITY}/{PROJECT}/tokens:latest"


@pytest.fixture
def server(clean):  # noqa: F811
    with running() as server:
        clean.setenv("WANDB_BASE_URL", server.url)
        clean.setenv("WANDB_API_KEY", KEY)
        clean.setenv("WANDB_MODE", "online")
        end_service()
        yield server
        end_service()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_logged_and_downloaded(server, corpus, tmp_path, write_sources):
    """The bytes come back; a new version is another folder, and what is there is not transferred again."""
    assert log_corpus(corpus, "tokens", PROJECT) == f"Logged {ENTITY}/{PROJECT}/tokens:v0"
    (version,) = server.versions["tokens"]
    assert version.type == "dataset"
    assert read_manifest(corpus)["corpus_sha256"] in version.metadata
    assert set(version.sizes) == set(contents(corpus))
    directory = download(REFERENCE, tmp_path / "artifacts")
    assert directory == tmp_path / "artifacts" / "tokens-v0"
    assert contents(directory) == contents(corpus)

    refused = []
    server.refuse = lambda what: refused.append(what) or 404 if what.endswith(".bin") else None
    assert download(REFERENCE, tmp_path / "artifacts") == directory
    assert refused == []
    server.refuse = lambda what: None
    other = PythonStdlib(
        data_path=tmp_path / "other", source_path=write_sources(tmp_path / "source", salt=1), vocab_size=300
    ).prepare()
    assert log_corpus(other, "tokens", PROJECT).endswith("tokens:v1")
    assert contents(download(REFERENCE, tmp_path / "artifacts")) == contents(other)
    assert contents(download(REFERENCE.replace("latest", "v0"), tmp_path / "artifacts")) == contents(corpus)

    # A run that trains names the artifact as its input.
    with wandb.init(project=PROJECT):
        assert download(REFERENCE, tmp_path / "artifacts") == tmp_path / "artifacts" / "tokens-v1"
    assert server.used == ["tokens-1"]

    for reference, reason in (
        (f"{ENTITY}/{PROJECT}/nothing:latest", "artifact membership 'nothing:latest' not found in 'team/project'"),
        (f"{ENTITY}/elsewhere/tokens:latest", "project 'elsewhere' not found under entity 'team'"),
        (f"{ENTITY}/{PROJECT}/tokens:v7", "artifact membership 'tokens:v7' not found"),
    ):
        with pytest.raises(ValueError, match=f"wandb_dataset: '{reference}' cannot be downloaded .*{reason}.* check"):
            download(reference, tmp_path / "artifacts")


ENDS = (("ArtifactMembershipByName", "refused"), ("/storage/tokens-0/train_00000.bin", "404 Client Error"))
BETWEEN = (("FetchArtifactManifest", "refused"), ("GetArtifactMembershipFileUrls", "refused"))


@pytest.mark.slow
@pytest.mark.parametrize("faults", [ENDS, BETWEEN], ids=["ends", "between"])
def test_a_download_that_fails_goes_on_later(server, corpus, tmp_path, faults):
    log_corpus(corpus, "tokens", PROJECT)
    for refused, reason in faults:
        shutil.rmtree(tmp_path / "cache")  # of the client, which holds what it has transferred
        artifacts = tmp_path / refused.rpartition("/")[2]
        server.refuse = lambda what, refused=refused: 403 if what == refused else None
        with pytest.raises(ValueError, match=f"'{REFERENCE}' cannot be downloaded .*{reason}.* check the"):
            download(REFERENCE, artifacts)
        server.refuse = lambda what: None
        assert contents(download(REFERENCE, artifacts)) == contents(corpus), refused


def test_a_key_that_the_server_does_not_know(server, corpus, tmp_path):
    server.refuse = lambda what: 401
    with pytest.raises(ValueError, match="cannot be downloaded .* log in with `wandb login` or set WANDB_API_KEY"):
        download(REFERENCE, tmp_path)
    with pytest.raises(ValueError, match="is finished, but logging it failed .* log in with `wandb login`"):
        log_corpus(corpus, "tokens", PROJECT)


@pytest.mark.slow
def test_from_one_script_to_the_other(server, tmp_path):
    """The commands of the recipes: a corpus is prepared and logged, then trained on under --wandb-dataset."""
    tiny_txt(tmp_path)
    script = [sys.executable, ROOT / "data_prep" / "tinystories.py", "--source_path", tmp_path]
    script += ["--data_path", tmp_path / "prepared", "--bpe.vocab_size", "300"]
    logged = run_command(*script, "--log-to-wandb", "--wandb-artifact", "tokens", "--wandb_project", PROJECT)
    assert f"Logged {ENTITY}/{PROJECT}/tokens:v0" in logged.stdout
