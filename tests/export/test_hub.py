"""Uploads to and downloads from a hub of a few lines, through `huggingface_hub`'s real client."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PureWindowsPath

import huggingface_hub
import pytest
from huggingface_hub.utils import reset_sessions

from litgpt_moe_ext.cli.main import main
from litgpt_moe_ext.errors import SettingsError
from litgpt_moe_ext.export.hub import check_repository, downloaded, upload
from tests.export.hf.models import CASES, make_checkpoint
from tests.servers import answering


class Hub(BaseHTTPRequestHandler):
    """Knows one token, makes every repository, and remembers what was committed."""

    files: dict[str, bytes]

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            known = self.headers.get("authorization") == "Bearer right"
            return self._answer({"name": "me"} if known else {"error": "Invalid credentials"}, 200 if known else 401)
        if self.path.startswith(("/api/models/me/model/", "/api/models/me/full/")):
            return self._answer({"id": "me/model", "siblings": [], "xetEnabled": False})
        return self._answer({"error": "Repository not found"}, 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            return self._answer({"url": f"http://{self.headers['host']}/me/{name}", "name": f"me/{name}"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self._answer({"files": files})
        if "/commit/" in self.path and not self.path.startswith("/api/models/me/full/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._answer({"commitUrl": f"http://{self.headers['host']}/me/model/commit/1", "commitOid": "1"})
        return self._answer({"error": "Storage is full"}, 403)

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    Hub.files = {}
    with answering(ThreadingHTTPServer(("127.0.0.1", 0), Hub)) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "right")
        reset_sessions()
        yield Hub.files
    reset_sessions()


def test_an_export_is_uploaded(hub, tmp_path):
    _, settings, biased = next(iter(CASES.values()))
    make_checkpoint(tmp_path / "checkpoint", settings, biased)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "checkpoint"), str(out), "--push_to_hub", "model"]) == 0
    assert hub == {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("a/b/c", "right", "push_to_hub: 'a/b/c' must be NAME or OWNER/NAME; "),
        ("me/model", "wrong", r"push_to_hub: the login to the hub failed \(.*Invalid.*\); run `hf auth login`"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_before_the_export(hub, monkeypatch, repository, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SettingsError, match=message):
        check_repository(repository)


def test_a_refused_upload_leaves_the_export(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"push_to_hub: 'me/full' was not uploaded \(.*Storage.*complete, `hf"):
        upload(tmp_path, "me/full")
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["me/unknown", "me/no such name"])
def test_a_repository_that_is_not_there(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=f"hf_dir: there is no directory '{name}', and no such repository"):
        downloaded(type(tmp_path)(name))


@pytest.mark.parametrize("name", ["me", "me/model", "a/b/c"])
def test_directories_are_not_asked_for(hub, tmp_path, monkeypatch, name):
    """Neither one of a repository's name nor what no repository can be called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert downloaded(type(tmp_path)(name)) == type(tmp_path)(name)


def test_a_repository_has_slashes_on_windows_too(monkeypatch):
    class Windows(PureWindowsPath):
        def exists(self):
            return False

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or "here")
    assert downloaded(Windows("me/model")) == Path("here")
    assert asked == ["me/model"]
