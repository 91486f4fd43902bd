"""A small HTTP server that speaks the part of the Hub's API which pushing and pulling a model needs.

It keeps every request, stores files by content as the Hub does (git blobs and LFS objects), refuses writes without the
token, and answers 501 to what it does not know, so that a test can assert that nothing unknown was asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"
LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt")


@dataclass
class Commit:
    oid: str
    title: str
    changed: list[str]
    deleted: list[str]
    files: dict[str, bytes]  # the whole tree after it


@dataclass
class Repo:
    commits: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files if self.commits else {".gitattributes": b"*.safetensors filter=lfs\n"}

    @property
    def head(self) -> str:
        return self.commits[-1].oid if self.commits else "0" * 40


@dataclass
class Request:
    method: str
    path: str
    body_bytes: int


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """State of the server; ``url`` is what HF_ENDPOINT has to be."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.requests: list[Request] = []
        self.unknown: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None: ...

            def handle_any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(Request(self.command, path, size))
                allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/lfs/")
                if self.command not in ("GET", "HEAD") and not allowed:
                    return self.answer(401, {"error": "no token"})
                self.answer(*hub.respond(self.command, path, body))

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    # --- answers ------------------------------------------------------------------------------------------------

    def respond(self, method: str, path: str, body: bytes) -> tuple:
        parts = path.strip("/").split("/")
        if method == "PUT" and parts[0] == "lfs":
            return self.put_object(parts[1], body)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body))
        if parts[0] == "api" and parts[1] == "models" and len(parts) >= 4:
            return self.api(method, self.named(parts[2:4]), "/".join(parts[2:4]), parts[4:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": [self.wanted(entry) for entry in json.loads(body)["objects"]]}
        if method in ("GET", "HEAD") and len(parts) >= 5 and parts[2] == "resolve":
            return self.resolve(self.named(parts[:2]), parts[3], "/".join(parts[4:]))
        if parts[0] == "api" and method == "GET":
            return 404, {}  # what the client asks for its own sake, not for a repository's
        self.unknown.append(f"{method} {path}")
        return 501, {"error": f"not spoken here: {method} {path}"}

    def named(self, parts: list[str]) -> Repo | None:
        return self.repos.get("/".join(parts))

    def create(self, wanted: dict[str, Any]) -> tuple:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repos[name] = Repo()
        return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}

    def validate(self, wanted: dict[str, Any]) -> tuple:
        """As the Hub does, a card is refused whose base model cannot be on the Hub."""
        head = wanted["content"].split("---")[1] if wanted["content"].startswith("---") else ""
        named = [line.split(":", 1)[1].strip() for line in head.splitlines() if line.startswith("base_model:")]
        bad = [name for name in named if name.startswith(("/", ".")) or name.count("/") > 1]
        return 200, {"errors": [{"message": f"base_model {name} is no id"} for name in bad], "warnings": []}

    def api(self, method: str, repo: Repo | None, name: str, rest: list[str], body: bytes) -> tuple:
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if method == "POST" and rest[0] == "preupload":
            return 200, {"files": [self.mode(repo, entry["path"]) for entry in json.loads(body)["files"]]}
        if method == "POST" and rest[0] == "commit":
            return self.commit(repo, name, [json.loads(line) for line in body.splitlines()])
        if method == "GET" and rest[:1] == ["tree"]:
            return 200, [self.entry(path, data) for path, data in sorted(repo.files.items())]
        if method == "GET" and (not rest or rest[0] == "revision"):
            files = [{"rfilename": path} for path in repo.files]
            return 200, {
                "id": name,
                "modelId": name,
                "sha": repo.head,
                "siblings": files,
                "tags": [],
                "private": False,
            }
        self.unknown.append(f"{method} api {name} {rest}")
        return 501, {"error": "not spoken here"}

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        found = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
        return found | ({"lfs": lfs} if is_lfs(path) else {})

    def mode(self, repo: Repo, path: str) -> dict[str, Any]:
        data, lfs = repo.files.get(path), is_lfs(path)
        known = None if data is None else hashlib.sha256(data).hexdigest() if lfs else blob_id(data)
        return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": known}

    def wanted(self, entry: dict[str, Any]) -> dict[str, Any]:
        answer = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] in self.objects:
            return answer  # known already: nothing to upload
        return answer | {"actions": {"upload": {"href": f"{self.url}/lfs/{entry['oid']}", "header": {}}}}

    def put_object(self, oid: str, body: bytes) -> tuple:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "other content than announced"}
        self.objects[oid] = body
        return 200, {}

    def commit(self, repo: Repo, name: str, lines: list[dict[str, Any]]) -> tuple:
        files, changed, deleted, title = dict(repo.files), [], [], ""
        for line in lines:
            kind, value = line["key"], line["value"]
            if kind == "header":
                title = value["summary"]
                continue
            if kind == "deletedFile":
                files.pop(value["path"])
                deleted.append(value["path"])
                continue
            assert kind == ("lfsFile" if is_lfs(value["path"]) else "file"), line
            data = self.objects[value["oid"]] if kind == "lfsFile" else base64.b64decode(value["content"])
            files[value["path"]] = data
            changed.append(value["path"])
        oid = hashlib.sha1(f"{repo.head}{len(repo.commits)}".encode()).hexdigest()
        repo.commits.append(Commit(oid, title, sorted(changed), deleted, files))
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None}

    def resolve(self, repo: Repo | None, revision: str, path: str) -> tuple:
        if repo is None:
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        commit = next((c for c in repo.commits if c.oid == revision), None)
        files = repo.files if commit is None else commit.files
        head = {"X-Repo-Commit": repo.head if commit is None else commit.oid}
        if path not in files:
            return 404, {}, {"X-Error-Code": "EntryNotFound", **head}
        data = files[path]
        etag = hashlib.sha256(data).hexdigest() if is_lfs(path) else blob_id(data)
        return 200, data, {"ETag": f'"{etag}"', **head}
