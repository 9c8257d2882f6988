"""Files behind URLs, read while they are encoded: from a real HTTP server, and in the protocol of the hub."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.version import Version

from litgpt_moe_ext.data import CodeParrot, FineWeb, HubDataset
from litgpt_moe_ext.data.pipeline.settings import CorpusSettings
from litgpt_moe_ext.data.pipeline.sources import remote_sources
from litgpt_moe_ext.data.reading import remote
from litgpt_moe_ext.data.reading.documents import documents
from litgpt_moe_ext.data.reading.record import TextFormat
from litgpt_moe_ext.errors import SettingsError
from tests.data.file_server import serving
from tests.data.test_readers import tar
from tests.data.test_text import BPE, TRAIN, VAL, lines, lists
from tests.data.test_text_corpus import contents, stories, texts_in
from tests.runs import PATIENCE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def server(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.0)
    fsspec.filesystem("http").invalidate_cache()
    (tmp_path / "files").mkdir()
    with serving(tmp_path / "files") as server:
        yield server


def write_shards(folder: Path, field: str = "content") -> None:
    for number, texts in ((1, stories(40, 1)), (2, stories(40, 2)), (54, VAL)):
        (folder / f"file-{number:012}.json.gz").write_bytes(gzip.compress(lines(texts, field)))


def streamed(server, tmp_path, **settings) -> HubDataset:
    files = [f"{server.url}/file-{number:012}.json.gz" for number in (1, 2, 54)]
    data_files = {"train": files[:2], "validation": files[2:]}
    settings = {"field": "content", "val_split": "validation", "data_files": data_files, **settings}
    return HubDataset(dataset="json", streaming=True, data_path=tmp_path / "streamed", bpe=BPE, **settings)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(TRAIN, "text")),
        ("a.json.gz", gzip.compress(lists(TRAIN, "text"))),
        ("a.txt", "<|>".join(TRAIN).encode()),
        ("a.tar.gz", tar({"a.json": lists(TRAIN, "text")})),
    ],
)
def test_the_readers_read_urls(server, name, content, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1000)
    (server.folder / name).write_bytes(content)
    found = list(documents(f"{server.url}/{name}?download=true", TextFormat(separator="<|>")))
    assert [record.text for record in found] == TRAIN
    assert found[-1].position == len(content)


def test_only_the_column_of_a_parquet_file_is_transferred(server, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1000)
    other = [os.urandom(5000) for _ in TRAIN]
    pq.write_table(pa.table({"other": other, "text": TRAIN}), server.folder / "a.parquet")
    found = list(documents(f"{server.url}/a.parquet", TextFormat()))
    assert [record.text for record in found] == TRAIN
    assert server.sent["a.parquet"] < 0.2 * (server.folder / "a.parquet").stat().st_size


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".bz2", bz2.compress), (".xz", lzma.compress), (".zst", lambda text: zstd(text))]
)
def test_whatever_prepared_data_may_be_compressed_with(server, tmp_path, suffix, compress):
    for name, texts in (("a", TRAIN), ("b", VAL)):
        (server.folder / f"{name}.jsonl{suffix}").write_bytes(compress(lines(texts, "content")))
    files = {side: [f"{server.url}/{name}.jsonl{suffix}"] for side, name in (("train", "a"), ("validation", "b"))}
    data = streamed(server, tmp_path, data_files=files)
    data.prepare_data()
    assert (texts_in(data.corpus_path, "train"), texts_in(data.corpus_path, "val")) == (TRAIN, VAL)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


def test_the_corpus_is_that_of_local_files(server, tmp_path, capsys):
    write_shards(server.folder)
    local = CodeParrot(source_path=server.folder, data_path=tmp_path / "local", bpe=BPE)
    local.prepare_data()
    data = streamed(server, tmp_path)
    data.prepare_data()
    assert (texts_in(data.corpus_path, "train"), texts_in(data.corpus_path, "val")) == (TRAIN, VAL)
    for name, content in contents(local.corpus_path).items():
        if name not in ("manifest.json", "SHA256SUMS"):
            assert contents(data.corpus_path)[name] == content
    # Nothing is transferred again for a corpus that is there, and a changed file makes another one.
    server.sent.clear()
    capsys.readouterr()
    assert streamed(server, tmp_path).prepare(verbose=True) == data.corpus_path
    assert "Reusing the corpus" in capsys.readouterr().out
    assert server.sent == {}
    (server.folder / "file-000000000001.json.gz").write_bytes(gzip.compress(lines(stories(40, 9), "content")))
    assert streamed(server, tmp_path).prepare(verbose=False) != data.corpus_path


def test_local_files_through_the_same_settings(tmp_path):
    write_shards(tmp_path, "text")
    files = {"train": str(tmp_path / "file-*[12].json.gz"), "validation": str(tmp_path / "*54.json.gz")}
    data = HubDataset(
        dataset="json", data_files=files, val_split="validation", streaming=True, data_path=tmp_path / "c", bpe=BPE
    )
    data.prepare_data()
    assert (texts_in(data.corpus_path, "train"), texts_in(data.corpus_path, "val")) == (TRAIN, VAL)


def test_a_connection_that_comes_back(server, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr("litgpt_moe_ext.data.reading.documents.CHUNK_BYTES", 500)
    (server.folder / "a.jsonl").write_bytes(lines(TRAIN, "text"))
    failures = iter([None, 503, None, 500, 500, 502, 503])
    server.fail = lambda path, start: next(failures, None)
    found = list(documents(f"{server.url}/a.jsonl", TextFormat()))
    assert [record.text for record in found] == TRAIN
    assert next(failures, None) is None


def test_a_connection_that_stays_away(server, tmp_path, monkeypatch):
    """The next run goes on; what it makes is what an undisturbed one makes."""
    from litgpt_moe_ext.data.pipeline import batches

    write_shards(server.folder)
    whole = streamed(server, tmp_path / "whole")
    whole.prepare_data()
    monkeypatch.setattr(batches, "_BATCH_BYTES", 1000)
    monkeypatch.setattr(
        "litgpt_moe_ext.data.corpora.documents.CorpusSettings", lambda **a: CorpusSettings(**a, shard_tokens=1500)
    )
    tokenizer_dir = whole.prepare_tokenizer()
    parts = streamed(server, tmp_path / "parts", tokenizer_dir=tokenizer_dir)
    parts.bpe = None
    server.fail = lambda path, start: 503 if "002" in path else None
    with pytest.raises(
        SettingsError, match=r"http.*02.json.gz cannot be read at byte 0 of \d+, 5 times .*503.* run again when"
    ):
        parts.prepare_data()
    server.fail = lambda path, start: None
    server.sent.clear()
    parts.prepare_data()
    assert texts_in(parts.corpus_path, "train") == TRAIN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"etags": False}, "file-000000000001.json.gz cannot be streamed, as the server sends no ETag"),
        ({"missing": True}, "dataset: 'json' cannot be found with .*file-000000000001"),
        ({"field": "text"}, r"file-000000000001.json.gz has no field 'text' at byte 0, only"),
        ({"train_split": "train[:1%]"}, r"has no files for split 'train\[:1%\]', only for \['train'"),
        ({"damaged": True}, r"000000000002.json.gz is damaged or truncated: .* .after byte \d+ of \d+"),
        ({"suffix": ".csv"}, r"a.csv cannot be streamed, only .parquet, .json, .* set streaming to"),
    ],
)
def test_what_cannot_work(server, tmp_path, change, message):
    write_shards(server.folder)
    server.etags = change.pop("etags", True)
    if change.pop("missing", False):
        (server.folder / "file-000000000001.json.gz").unlink()
    if change.pop("damaged", False):
        os.truncate(server.folder / "file-000000000002.json.gz", 500)
    if change.pop("suffix", None):
        (server.folder / "a.csv").write_text("text\nx\n")
        change = {"data_files": {"train": f"{server.url}/a.csv"}, "val_split": None}
    with pytest.raises(ValueError, match=message):
        streamed(server, tmp_path, **change).prepare_data()


# Before, fsspec reads a whole file from such a server itself, so there is nothing to refuse.
@pytest.mark.skipif(Version(fsspec.__version__) < Version("2024.12"), reason="fsspec reads such a file rightly")
def test_a_server_that_sends_no_parts(server, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 1000)
    (server.folder / "a.jsonl").write_bytes(lines(TRAIN, "text"))
    server.ranges = False
    with pytest.raises(SettingsError, match="a.jsonl cannot be streamed.* download the file and name the local copy"):
        list(documents(f"{server.url}/a.jsonl", TextFormat()))


URL = "hf://datasets/a/b/c.parquet"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"size": 7, "lfs": {"sha256": "0123"}, "blob_id": "4567"}, (7, "0123")),
        ({"size": 7, "lfs": None, "blob_id": "4567", "ETag": "89ab"}, (7, "blob 4567")),
        ({"size": None, "etag": "89ab"}, (0, f"{URL} 89ab")),
    ],
)
def test_by_what_a_file_is_known(monkeypatch, facts, expected):
    """The same content has one identity at every address where the server says its hash."""
    monkeypatch.setattr(remote, "_system_of", lambda url: (SimpleNamespace(info=lambda path: facts), url))
    assert remote.remote_facts(URL) == expected


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_no_server(tmp_path):
    with pytest.raises(SettingsError, match="http://127.0.0.1:9/a.jsonl cannot be reached .* check the address"):
        remote_sources(["http://127.0.0.1:9/a.jsonl"], None, TextFormat())
    with pytest.raises(ValueError, match="other://a.jsonl cannot be read .Protocol not known: other"):
        list(documents("other://a.jsonl", TextFormat()))
    for corpus in (CodeParrot, FineWeb):
        with pytest.raises(ValueError, match="streaming: true has no effect on the files in source_path"):
            corpus(source_path=tmp_path, streaming=True, bpe=BPE, data_path=tmp_path).prepare_data()


@pytest.mark.slow
def test_code_parrot_from_the_hub(server, tmp_path):
    """The script streams both data sets of a hub; local shards of equal content lead to the same corpus."""
    for name, shards in (("train", ((1, stories(40, 1)), (2, stories(40, 2)))), ("valid", ((54, VAL),))):
        folder = server.folder / "codeparrot" / f"codeparrot-clean-{name}"
        folder.mkdir(parents=True)
        for number, texts in shards:
            (folder / f"file-{number:012}.json.gz").write_bytes(gzip.compress(lines(texts, "content")))
    script = [sys.executable, ROOT / "data_prep" / "codeparrot.py", "--bpe.vocab_size", "300"]
    script += ["--bpe.special_tokens", json.dumps(["</s>"]), "--data_path", tmp_path / "corpora"]
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf")}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)

    def run(*arguments: object, **more: str) -> subprocess.CompletedProcess:
        command = [str(part) for part in (*script, *arguments)]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, timeout=PATIENCE)

    result = run("--streaming", "true")
    assert result.returncode == 0, result.stderr
    (corpus,) = (path.parent for path in (tmp_path / "corpora").glob("*/manifest.json"))
    assert (texts_in(corpus, "train"), texts_in(corpus, "val")) == (TRAIN, VAL)
    assert not list((tmp_path / "hf").rglob("*.json.gz"))
    local = tmp_path / "local"
    local.mkdir()
    for shard in server.folder.rglob("*.json.gz"):
        shutil.copy(shard, local)
    assert f"Reusing the corpus in {corpus}" in run("--source_path", local).stdout
    result = run("--streaming", "true", HF_HUB_OFFLINE="1")
    assert result.returncode == 2
    assert "error: dataset: 'codeparrot/codeparrot-clean-train' cannot be found" in result.stderr
