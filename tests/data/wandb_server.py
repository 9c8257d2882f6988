"""A W&B server on this machine: as much of its protocol as logging, finding and downloading an artifact takes.

The client is the real one, with its Go process. The server keeps one project; the bytes it hands out are those that
were uploaded to it.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.servers import answering

ENTITY, PROJECT = "team", "project"
KEY = "0123456789" * 4
_OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")
_TIME = "2026-01-01T00:00:00Z"


def _project() -> dict[str, Any]:
    return {"id": "project-1", "internalId": "1", "name": PROJECT, "entity": {"id": "entity-1", "name": ENTITY}}


@dataclass
class _Version:
    name: str
    type: str
    number: int
    metadata: str
    digest: str
    client_id: str
    sizes: dict[str, int] = field(default_factory=dict)
    committed: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}-{self.number}"

    def to_graphql(self) -> dict[str, Any]:
        collection = {"__typename": "ArtifactSequence", "name": self.name, "project": _project()}
        alias = {"__typename": "ArtifactAlias", "id": "alias-1", "alias": "latest", "artifactCollection": collection}
        return {
            "__typename": "Artifact",
            "id": self.id,
            "artifactSequence": {**collection, "latestArtifact": None},
            "versionIndex": self.number,
            "artifactType": {"name": self.type},
            "description": None,
            "metadata": self.metadata,
            "ttlDurationSeconds": -1,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED" if self.committed else "PENDING",
            "size": sum(self.sizes.values()),
            "digest": self.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": "0" * 20,
            "fileCount": len(self.sizes),
            "createdAt": _TIME,
            "updatedAt": _TIME,
            "aliases": [alias],
        }

    def membership(self) -> dict[str, Any]:
        artifact = self.to_graphql()
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": f"membership-{self.id}",
            "versionIndex": self.number,
            "createdAt": _TIME,
            "aliases": artifact["aliases"],
            "artifactCollection": artifact["artifactSequence"],
            "artifact": artifact,
        }


class WandbServer:
    """The state of the server and its answers.

    Attributes:
        url: For WANDB_BASE_URL.
        versions: Artifacts by name, oldest first.
        stored: Uploaded bytes by path.
        operations: Names of the GraphQL operations that were asked for.
        used: Artifacts that runs named as their inputs.
        refuse: Answers instead of the server where it returns a status; gets the operation's name or the path.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.versions: dict[str, list[_Version]] = {}
        self.stored: dict[str, bytes] = {}
        self.operations: list[str] = []
        self.used: list[str] = []
        self.refuse: Callable[[str], int | None] = lambda what: None

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of a GraphQL answer."""
        operation = _OPERATION.search(query)[1]
        self.operations.append(operation)
        return getattr(self, f"_{operation}")(**variables)

    def _find(self, name: str) -> _Version | None:
        collection, _, alias = name.partition(":")
        committed = [version for version in self.versions.get(collection, []) if version.committed]
        if alias == "latest":
            return committed[-1] if committed else None
        return next((version for version in committed if alias == f"v{version.number}"), None)

    def _by_id(self, artifact_id: str) -> _Version:
        return next(v for versions in self.versions.values() for v in versions if v.id == artifact_id)

    def _upload(self, path: str) -> dict[str, Any]:
        return {"uploadUrl": f"{self.url}/storage/{path}", "uploadHeaders": []}

    # ---- what the operations return; argument names are those of the queries

    def _ServerFeaturesQuery(self) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _Viewer(self, **_: Any) -> dict[str, Any]:
        viewer = {
            "id": "user-1",
            "entity": ENTITY,
            "name": "somebody",
            "username": "somebody",
            "email": "somebody@example.org",
            "admin": False,
            "flags": "{}",
            "teams": {"edges": [{"node": {"name": ENTITY}}]},
            "apiKeys": {"edges": []},
        }
        return {"viewer": viewer}

    def _GetDefaultEntity(self) -> dict[str, Any]:
        return {"viewer": {"id": "user-1", "entity": ENTITY}}

    def _RunResumeStatus(self, **_: Any) -> dict[str, Any]:
        return {"model": None}

    def _UpsertBucket(self, name: str, **_: Any) -> dict[str, Any]:
        bucket = {"id": "run-1", "name": name, "displayName": name, "config": "{}", "project": _project()}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}

    def _CreateRunFiles(self, run: str, files: list[str], **_: Any) -> dict[str, Any]:
        uploads = [{"name": name, "uploadUrl": f"{self.url}/storage/runs/{run}/{name}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": uploads}}

    def _CreateArtifact(self, input: dict[str, Any]) -> dict[str, Any]:
        (name,) = input.get("artifactCollectionNames") or [input["artifactCollectionName"]]
        versions = self.versions.setdefault(name, [])
        version = _Version(
            name, input["artifactTypeName"], len(versions), input["metadata"], input["digest"], input["clientID"]
        )
        versions.append(version)
        return {"createArtifact": {"artifact": version.to_graphql()}}

    def _CreateArtifactManifest(self, artifactID: str, **_: Any) -> dict[str, Any]:
        file = {"id": "file-1", **self._upload(f"{artifactID}/manifest")}
        return {"createArtifactManifest": {"artifactManifest": {"id": artifactID, "file": file}}}

    def _UpdateArtifactManifest(self, artifactManifestID: str, **_: Any) -> dict[str, Any]:
        file = {"id": "file-1", **self._upload(f"{artifactManifestID}/manifest")}
        return {"updateArtifactManifest": {"artifactManifest": {"id": artifactManifestID, "file": file}}}

    def _CreateArtifactFiles(self, **variables: Any) -> dict[str, Any]:
        edges = []
        # Older clients have it by itself.
        for file in variables.get("input", variables)["artifactFiles"]:
            path = f"{file['artifactID']}/{file['name']}"
            node = {"storagePath": path, "artifact": {"id": file["artifactID"]}, "uploadMultipartUrls": None}
            edges.append({"node": {**node, **self._upload(path)}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, artifactID: str) -> dict[str, Any]:
        version = self._by_id(artifactID)
        prefix = f"{artifactID}/"
        manifest = json.loads(self.stored[f"{prefix}manifest"])
        version.sizes = {name: len(self.stored[prefix + name]) for name in manifest["contents"]}
        version.committed = True
        return {"commitArtifact": {"artifact": {"id": version.id, "digest": version.digest}}}

    def _ArtifactByID(self, id: str, **_: Any) -> dict[str, Any]:
        return {"artifact": self._by_id(id).to_graphql()}

    def _ArtifactMembershipByName(self, entity: str, project: str, name: str, **_: Any) -> dict[str, Any]:
        if (entity, project) != (ENTITY, PROJECT):
            return {"project": None}
        version = self._find(name)
        return {"project": {"artifactCollectionMembership": None if version is None else version.membership()}}

    def _FetchArtifactManifest(self, id: str) -> dict[str, Any]:
        return {"artifact": {"currentManifest": {"file": {"directUrl": f"{self.url}/storage/{id}/manifest"}}}}

    def _GetArtifactMembershipFileUrls(self, collection: str, alias: str, **_: Any) -> dict[str, Any]:
        version = self._find(f"{collection}:{alias}")
        edges = [
            {"node": {"__typename": "File", "name": name, "directUrl": f"{self.url}/storage/{version.id}/{name}"}}
            for name in version.sizes
        ]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        membership = {"files": {"pageInfo": page, "edges": edges}}
        collection_node = {"__typename": "ArtifactSequence", "artifactMembership": membership}
        return {"project": {"artifactCollection": collection_node}}

    def _UseArtifact(self, artifactID: str, **_: Any) -> dict[str, Any]:
        self.used.append(artifactID)
        return {"useArtifact": {"artifact": self._by_id(artifactID).to_graphql()}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_HTTPServer"

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body, state = self._body(), self.server.state
        if self.path != "/graphql":  # a run's stream of metrics
            self._send(200, b"{}")
            return
        asked = json.loads(body)
        if status := state.refuse(_OPERATION.search(asked["query"])[1]):
            self._send(status, b'{"errors": [{"message": "refused"}]}')
            return
        try:
            with self.server.lock:
                answer = {"data": state.answer(asked["query"], asked.get("variables") or {})}
        except (AttributeError, TypeError) as error:  # an operation, or an argument, that this server lacks
            answer = {"data": None, "errors": [{"message": f"{asked['query'][:60]!r}: {error}"}]}
        self._send(200, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        self.server.state.stored[self.path.removeprefix("/storage/")] = self._body()
        self._send(200, b"")

    def do_GET(self) -> None:
        state = self.server.state
        content = state.stored.get(self.path.removeprefix("/storage/"))
        if status := state.refuse(self.path):
            self._send(status, b"refused")
        elif content is None:
            self._send(404, b"")
        else:
            self._send(200, content)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    state: WandbServer
    lock: threading.Lock


@contextmanager
def running() -> Iterator[WandbServer]:
    """Give a server that answers until the block ends."""
    server = _HTTPServer(("127.0.0.1", 0), _Handler)
    server.lock = threading.Lock()
    with answering(server) as address:
        server.state = WandbServer(address)
        yield server.state
