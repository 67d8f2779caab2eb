"""A Hub on the loopback interface: what the real client sends, stored and checked as the Hub would.

Speaks the endpoints that huggingface_hub 2.4 calls for a push without Xet: repository, branch, preupload, LFS batch
with upload and verification, and the commit. Content is only accepted with the size and SHA-256 that were announced.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import pytest

TOKEN = "hf_only_for_this_test"


@dataclass
class Repo:
    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """State of the server, to be looked at by tests."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._serve()

        do_POST = do_PUT = do_HEAD = do_GET

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(self.path.split("?")[0])
            hub.requests.append(f"{self.command} {path}")
            open_to_all = path.startswith(("/objects/", "/api/validate-yaml"))
            if not open_to_all and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._answer(401, {"error": "Invalid username or password."})
                return
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    try:
                        status, answer = function(self, body, *match.groups())
                    except KeyError as error:
                        status, answer = 404, {"error": f"{error} not found"}
                    self._answer(status, answer, {"X-Error-Code": "RepoNotFound"} if status == 404 else {})
                    return
            self._answer(404, {"error": f"no such endpoint: {self.command} {path}"})

        def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, text in (headers or {}).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def create(self, body: bytes) -> tuple[int, Any]:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["organization"] == "not-mine":
                return 403, {"error": "You don't have the rights to create a model under the namespace"}
            if name in hub.repos:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            hub.repos[name] = Repo(private)
            return 200, {"url": f"{hub.url}/{name}", "id": name}

        def info(self, body: bytes, name: str) -> tuple[int, Any]:
            repo = hub.repos[name]
            files = [{"rfilename": path} for path in repo.branches["main"]]
            return 200, {"id": name, "private": repo.private, "siblings": files, "sha": "0" * 40}

        def revision(self, body: bytes, name: str, branch: str) -> tuple[int, Any]:
            files = [{"rfilename": path} for path in hub.repos[name].branches[branch]]
            return 200, {"id": name, "private": hub.repos[name].private, "siblings": files, "sha": "0" * 40}

        def tree(self, body: bytes, name: str, branch: str) -> tuple[int, Any]:
            files = hub.repos[name].branches[branch]
            return 200, [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]

        def branch(self, body: bytes, name: str, branch: str) -> tuple[int, Any]:
            if branch in hub.repos[name].branches:
                return 409, {"error": "Reference already exists"}
            hub.repos[name].branches[branch] = dict(hub.repos[name].branches["main"])
            return 200, {}

        def preupload(self, body: bytes, name: str, branch: str) -> tuple[int, Any]:
            def mode(path: str) -> str:
                return "lfs" if path.endswith(".safetensors") else "regular"

            files = [
                {"path": file["path"], "uploadMode": mode(file["path"]), "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}

        def batch(self, body: bytes, name: str) -> tuple[int, Any]:
            objects = [
                {
                    **wanted,
                    "actions": {
                        "upload": {"href": f"{hub.url}/objects/{wanted['oid']}"},
                        "verify": {"href": f"{hub.url}/verify/{wanted['oid']}"},
                    },
                }
                for wanted in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}

        def upload(self, body: bytes, oid: str) -> tuple[int, Any]:
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "the content has another SHA-256"}
            hub.objects[oid] = body
            return 200, {}

        def verify(self, body: bytes, oid: str) -> tuple[int, Any]:
            wanted = json.loads(body)
            good = oid in hub.objects and len(hub.objects[oid]) == wanted["size"]
            return (200, {}) if good else (404, {"error": "no such object"})

        def validate(self, body: bytes) -> tuple[int, Any]:
            return 200, {"errors": [], "warnings": []}

        def commit(self, body: bytes, name: str, branch: str) -> tuple[int, Any]:
            files = dict(hub.repos[name].branches[branch])
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    summary = value["summary"]
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
                else:
                    return 400, {"error": f"unknown operation {entry['key']}"}
            hub.repos[name].branches[branch] = files
            hub.repos[name].commits.append(summary)
            oid = hashlib.sha1(body).hexdigest()
            url = f"{hub.url}/{name}/commit/{oid}"
            return 200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}

    name, branch = r"([^/]+/[^/]+)", r"([^/]+)"
    ROUTES = [
        ("POST", r"/api/repos/create", Handler.create),
        ("GET", rf"/api/models/{name}", Handler.info),
        ("GET", rf"/api/models/{name}/revision/{branch}", Handler.revision),
        ("GET", rf"/api/models/{name}/tree/{branch}", Handler.tree),
        ("POST", rf"/api/models/{name}/branch/{branch}", Handler.branch),
        ("POST", rf"/api/models/{name}/preupload/{branch}", Handler.preupload),
        ("POST", rf"/{name}\.git/info/lfs/objects/batch", Handler.batch),
        ("PUT", r"/objects/([0-9a-f]{64})", Handler.upload),
        ("POST", r"/verify/([0-9a-f]{64})", Handler.verify),
        ("POST", r"/api/validate-yaml", Handler.validate),
        ("POST", rf"/api/models/{name}/commit/{branch}", Handler.commit),
    ]
    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state
    server.shutdown()
    thread.join(10)
    server.server_close()
