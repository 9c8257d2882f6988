"""An HTTP server over a folder: parts of files and their ETags, and the hub's way of listing data sets.

A folder ``<owner>/<name>`` is a data set of the hub at its one commit.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers import answering

COMMIT = "c" * 40
_API = re.compile(
    r"/api/datasets/(?P<id>[^/]+/[^/]+)(/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?P<path>/.*)?)?"
)
_RESOLVE = re.compile(r"/datasets/(?P<id>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.*)")


class FileServer:
    """What the server does, and what it was asked.

    Attributes:
        url: Its address.
        folder: What it serves.
        sent: Bytes it has sent as parts of files, by path below the folder.
        ranges: Whether it sends parts of files.
        etags: Whether it names the state of a file.
        fail: Returns a status to answer with instead of a part, or None; gets the path and the first byte asked for.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.sent: dict[str, int] = {}
        self.ranges = True
        self.etags = True
        self.fail: Callable[[str, int], int | None] = lambda path, start: None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_HTTPServer"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _file(self, path: Path) -> None:
        state = self.server.state
        if not path.is_file():
            self._send(404, b"", X_Error_Code="EntryNotFound")
            return
        content = path.read_bytes()
        name = path.relative_to(state.folder).as_posix()
        headers = {"Accept_Ranges": "bytes" if state.ranges else "none", "X_Repo_Commit": COMMIT}
        if state.etags:
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if self.command == "HEAD":
            self._send(200, b"", Content_Length=str(len(content)), **headers)
            return
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        if match and (status := state.fail(name, start)):
            self._send(status)
        elif match and state.ranges:
            part = content[start : int(match[2]) + 1 if match[2] else None]
            state.sent[name] = state.sent.get(name, 0) + len(part)
            self._send(206, part, Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(content)}", **headers)
        else:  # whoever asks for all of it only looks at the headers
            self._send(200, content, **headers)

    def _hub(self, match: re.Match) -> None:
        folder = self.server.state.folder / match["id"]
        if not folder.is_dir():
            self._send(404, b"", X_Error_Code="RepoNotFound")
            return
        entries = []
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                oid = hashlib.sha256(content).hexdigest()
                lfs = {"oid": oid, "size": len(content), "pointerSize": 134}
                name = path.relative_to(folder).as_posix()
                entries.append({"type": "file", "oid": oid[:40], "size": len(content), "path": name, "lfs": lfs})
        if match["what"] in (None, "revision"):
            answer: Any = {
                "id": match["id"],
                "sha": COMMIT,
                "siblings": [{"rfilename": entry["path"]} for entry in entries],
                "private": False,
                "tags": [],
                "downloads": 0,
            }
        elif match["what"] == "tree":
            answer = entries
        else:
            length = int(self.headers.get("Content-Length", 0))
            asked = json.loads(self.rfile.read(length))["paths"]
            answer = [entry for entry in entries if entry["path"] in asked]
        self._send(200, json.dumps(answer).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := _API.fullmatch(path):
            self._hub(match)
        elif match := _RESOLVE.fullmatch(path):
            self._file(self.server.state.folder / match["id"] / match["path"])
        else:
            self._file(self.server.state.folder / path.lstrip("/"))

    do_HEAD = do_POST = do_GET


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    state: FileServer


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """Give a server over a folder that answers until the block ends."""
    server = _HTTPServer(("127.0.0.1", 0), _Handler)
    with answering(server) as address:
        server.state = FileServer(address, folder)
        yield server.state
