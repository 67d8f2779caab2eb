"""A Hub on the loopback interface: what the real clients send is stored, served and checked as the Hub would.

Speaks what huggingface_hub 2.4 calls for a push without Xet (repository, branch, preupload, LFS batch with upload and
verification, commit), and what it and datasets 5.2 call to read: repository info, tree, and files by revision.
Content is only accepted with the size and SHA-256 that were announced. Large files are served by a second server, as
the Hub's are: it answers signed URLs only, and is no place for a token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_only_for_this_test"
SIGNATURE = "signature-of-this-test"
_LARGE = (".arrow", ".parquet", ".safetensors", ".tar")


class Refused(Exception):
    """An answer that is an error: its status, and the code by which the client knows what it means."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message or code)
        self.status = status
        self.headers = {"X-Error-Code": code} if code else {}
        if message:
            self.headers["X-Error-Message"] = message


@dataclass
class Repo:
    """Files by branch, and what was said of each commit. A branch's tip is a commit, named by what it holds."""

    private: bool = True
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[str] = field(default_factory=list)

    def commit_of(self, branch: str) -> str:
        digest = hashlib.sha1()
        for path, data in sorted(self.branches[branch].items()):
            digest.update(f"{path} {_blob(data)}\n".encode())
        return digest.hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """(commit, files) of a branch, or of the commit that is its tip."""
        for branch, files in self.branches.items():
            commit = self.commit_of(branch)
            if revision in (branch, commit):
                return commit, files
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")


@dataclass(frozen=True)
class Request:
    """What was asked of the Hub or of its storage, and with which token, if any."""

    server: str
    method: str
    path: str
    byte_range: str | None
    token: str | None


@dataclass
class Hub:
    """State of the server, to be set and looked at by tests. Datasets are `datasets/OWNER/NAME`, models OWNER/NAME."""

    url: str = ""
    storage_url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    page_size: int = 1000
    serves_ranges: bool = True
    on_request: Callable[[Request], None] = lambda request: None

    def reset(self) -> None:
        """Forget everything but the servers."""
        vars(self).update(vars(Hub(self.url, self.storage_url)))

    def asked(self, path: str) -> list[Request]:
        """The requests for paths that match."""
        return [request for request in self.requests if re.search(path, request.path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A request whose answer is two small packets must not wait for the client's acknowledgement in between.
    disable_nagle_algorithm = True
    hub: Hub
    server_name: str

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        authorization = self.headers.get("Authorization")
        self.token = authorization.removeprefix("Bearer ") if authorization else None
        byte_range = self.headers.get("Range")
        asked = Request(self.server_name, self.command, unquote(parts.path), byte_range, self.token)
        self.hub.requests.append(asked)
        self.hub.on_request(asked)
        try:
            self.route(parts.path, body)
        except Refused as refused:
            self.answer(refused.status, {"error": str(refused)}, refused.headers)

    do_POST = do_PUT = do_HEAD = do_GET

    def route(self, path: str, body: bytes) -> None:
        """Answer one request. Each server has its own; this class has the connection and the faults."""
        raise NotImplementedError

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        """The file, or the range of it that was asked for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None or not self.hub.serves_ranges:
            self.send(200, data, headers)
            return
        start, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if start > last:
            raise Refused(416)
        headers = headers | {"Accept-Ranges": "bytes", "Content-Range": f"bytes {start}-{last}/{len(data)}"}
        self.send(206, data[start : last + 1], headers)


class _StorageHandler(_Handler):
    server_name = "storage"

    def route(self, path: str, body: bytes) -> None:
        if self.query.get("Signature") != SIGNATURE or self.token is not None:
            raise Refused(403, message="the URL is signed; a token is not asked for")
        self.send_file(self.hub.objects[path.strip("/")], {"ETag": f'"{path.strip("/")}"'})


class _HubHandler(_Handler):
    server_name = "hub"

    def route(self, path: str, body: bytes) -> None:
        if self.token not in (None, TOKEN):
            raise Refused(401, message="Invalid credentials in Authorization header")
        for method, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == (self.command if self.command != "HEAD" else "GET"):
                function(self, body, *(unquote(group or "") for group in match.groups()))
                return
        raise Refused(404, message=f"no such endpoint: {self.command} {path}")

    def repo(self, kind: str, name: str) -> Repo:
        """The repository, if this request may see it."""
        repo = self.hub.repos.get(name if kind in ("", "models/") else f"{kind}{name}")
        if (repo is None or repo.private) and self.token is None:
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        return repo

    def signed_in(self) -> None:
        if self.token is None:
            raise Refused(401, message="Invalid username or password.")

    def info(self, body: bytes, kind: str, name: str, revision: str) -> None:
        repo = self.repo(kind, name)
        commit, files = repo.at(revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self.answer(200, {"id": name, "private": repo.private, "siblings": siblings, "sha": commit})

    def tree(self, body: bytes, kind: str, name: str, revision: str, folder: str) -> None:
        _, files = self.repo(kind, name).at(revision)
        prefix = f"{folder}/" if folder else ""
        entries = _entries(files, prefix, self.query.get("recursive") == "true")
        if prefix and not entries:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        start = int(self.query.get("cursor", "0"))
        headers = {}
        if start + self.hub.page_size < len(entries):
            query = f"recursive={self.query.get('recursive')}&cursor={start + self.hub.page_size}"
            headers["Link"] = f'<{self.hub.url}{urlsplit(self.path).path}?{query}>; rel="next"'
        self.answer(200, entries[start : start + self.hub.page_size], headers)

    def resolve(self, body: bytes, kind: str, name: str, revision: str, path: str) -> None:
        commit, files = self.repo(kind, name).at(revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        data = files[path]
        if not path.endswith(_LARGE):
            self.send_file(data, headers | {"ETag": f'"{_blob(data)}"'})
            return
        oid = hashlib.sha256(data).hexdigest()
        self.hub.objects[oid] = data
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"', "ETag": f'"{_blob(data)}"'}
        self.send(302, b"", headers | {"Location": f"{self.hub.storage_url}/{oid}?Signature={SIGNATURE}"})

    def create(self, body: bytes) -> None:
        self.signed_in()
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "not-mine":
            raise Refused(403, message="You don't have the rights to create a model under the namespace")
        if name in self.hub.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
            return
        self.hub.repos[name] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self.answer(200, {"url": f"{self.hub.url}/{name}", "id": name})

    def branch(self, body: bytes, name: str, branch: str) -> None:
        self.signed_in()
        branches = self.repo("", name).branches
        if branch in branches:
            raise Refused(409, message="Reference already exists")
        branches[branch] = dict(branches["main"])
        self.answer(200, {})

    def preupload(self, body: bytes, name: str, branch: str) -> None:
        self.signed_in()
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer(200, {"files": files})

    def batch(self, body: bytes, name: str) -> None:
        self.signed_in()
        objects = [
            {
                **wanted,
                "actions": {
                    "upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify/{wanted['oid']}"},
                },
            }
            for wanted in json.loads(body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="the content has another SHA-256")
        self.hub.objects[oid] = body
        self.answer(200, {})

    def verify(self, body: bytes, oid: str) -> None:
        self.signed_in()
        if len(self.hub.objects.get(oid, b"")) != json.loads(body)["size"]:
            raise Refused(404, message="no such object")
        self.answer(200, {})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        self.signed_in()
        repo = self.repo("", name)
        files = dict(repo.branches[branch])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, message=f"unknown operation {entry['key']}")
        repo.branches[branch] = files
        repo.commits.append(summary)
        oid = repo.commit_of(branch)
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


_NAME, _REVISION = r"([^/]+/[^/]+)", r"([^/]+)"
_API = rf"/api/(models/|datasets/){_NAME}"
_ROUTES = [
    ("GET", rf"{_API}(?:/revision/{_REVISION})?", _HubHandler.info),
    ("GET", rf"{_API}/tree/{_REVISION}(?:/(.+))?", _HubHandler.tree),
    ("GET", rf"/(datasets/)?{_NAME}/resolve/{_REVISION}/(.+)", _HubHandler.resolve),
    ("POST", r"/api/repos/create", _HubHandler.create),
    ("POST", rf"/api/models/{_NAME}/branch/{_REVISION}", _HubHandler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REVISION}", _HubHandler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _HubHandler.batch),
    ("PUT", r"/objects/([0-9a-f]{64})", _HubHandler.upload),
    ("POST", r"/verify/([0-9a-f]{64})", _HubHandler.verify),
    ("POST", r"/api/validate-yaml", _HubHandler.validate),
    ("POST", rf"/api/models/{_NAME}/commit/{_REVISION}", _HubHandler.commit),
]


def _blob(data: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(files: dict[str, bytes], prefix: str, is_recursive: bool) -> list[dict[str, Any]]:
    """What lies below a folder, in the words of the tree endpoint."""
    found: dict[str, dict[str, Any]] = {}
    for path, data in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        *folders, _ = path[len(prefix) :].split("/")
        for depth in range(1, len(folders) + 1 if is_recursive else min(len(folders), 1) + 1):
            folder = prefix + "/".join(folders[:depth])
            found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": _blob(folder.encode())}
        if is_recursive or not folders:
            found[path] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
            if path.endswith(_LARGE):
                oid = hashlib.sha256(data).hexdigest()
                found[path]["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
    return list(found.values())


@contextmanager
def running_hub() -> Iterator[Hub]:
    """An empty Hub, for as long as this is open."""
    hub = Hub()
    with ExitStack() as stack:
        urls = []
        for kind in (_HubHandler, _StorageHandler):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": hub}))
            server.daemon_threads = True
            stack.callback(server.server_close)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(server.shutdown)
            urls.append(f"http://127.0.0.1:{server.server_address[1]}")
        hub.url, hub.storage_url = urls
        yield hub
