"""A Hugging Face Hub on loopback: enough of its HTTP interface for the real `huggingface_hub` client, both ways.

Repositories live in memory as a chain of commits. What a client may do: look a repository up, list and download its
files at any revision, create it, upload files (small ones in the commit, weights through git-LFS), ask whether a card
is valid, make a branch, open a pull request. Uploading, and reading what is private, needs a token. The client reads
`HF_ENDPOINT` when it is imported, so it runs in a process of its own, with the environment that `client_environment`
gives.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import diffusers_dino

TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class Repository:
    """Commits by id, and branches and tags by name."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def __post_init__(self) -> None:
        self.commit({}, "initial commit")

    def commit(self, changes: dict[str, bytes | None], message: str, branch: str = "main") -> str:
        """Add files, or remove those whose content is None; returns the commit's id."""
        files = {**self.files(branch), **changes} if branch in self.references else dict(changes)
        files = {path: content for path, content in files.items() if content is not None}
        listing = json.dumps({path: _sha1(content) for path, content in sorted(files.items())})
        commit_id = _sha1(f"{listing}{message}{len(self.commits)}".encode())
        self.commits[commit_id] = files
        self.references[branch] = commit_id
        return commit_id

    def resolve(self, revision: str) -> str | None:
        """The id of the commit that a branch, tag or id names."""
        return self.references.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to content."""
        return self.commits[self.resolve(revision)]


class HubServer:
    """Serve repositories while the context is open.

    Attributes:
        repositories: By `"org/name"`.
        requests: `"METHOD /path"` of all that was asked for, in order.
        ranges: `(path, bytes)` of each range of a file that was sent.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.ranges: list[tuple[str, int]] = []
        self.lfs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_folder(self, repo_id: str, folder: Path, message: str = "Add files") -> str:
        """Commit all files of a folder to a repository, which is made if need be; returns the commit's id."""
        repository = self.repositories.setdefault(repo_id, Repository())
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return repository.commit({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, message)

    def client_environment(self, home: Path) -> dict[str, str]:
        """Environment for a process whose Hub is this one and whose caches are in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        kept.pop("HF_HUB_OFFLINE", None)
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
        }


def run_client(code: str, environment: dict[str, str], *arguments: object) -> None:
    """Run Python code as a process of its own; fails with its error if it does."""
    # -I: neither PYTHONPATH nor the working folder, only the package that is tested
    code = f"import sys; sys.path.insert(0, {str(Path(diffusers_dino.__file__).parents[1])!r})\n{code}"
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing: the test's output is not a server log."""

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        self.hub.requests.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        body = self._read_body()
        for expected, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == expected:
                if method in ("POST", "PUT") and "/lfs/" not in path and not self._authorized():
                    return self._fail(401, "InvalidToken", "Uploading needs a token.")
                return action(self, body, **match.groupdict())
        return self._fail(404, "RouteNotFound", f"This server does not know {method} {path}.")

    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _find(self, repo: str, revision: str | None = None) -> tuple[Repository, str] | None:
        """The repository and the commit; answers the request itself where there is none."""
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not self._authorized()):  # the real one does not tell which
            self._fail(404 if self._authorized() else 401, "RepoNotFound", f"There is no repository {repo}.")
            return None
        commit_id = repository.resolve(revision or "main")
        if commit_id is None:
            self._fail(404, "RevisionNotFound", f"There is no revision {revision}.")
            return None
        return repository, commit_id

    def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        if found := self._find(repo, revision):
            repository, commit_id = found
            siblings = [{"rfilename": path} for path in sorted(repository.files(commit_id))]
            facts = {"id": repo, "modelId": repo, "sha": commit_id, "private": repository.private}
            self._json({**facts, "siblings": siblings})

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        if found := self._find(repo, revision):
            repository, commit_id = found
            self._json([_tree_entry(path, content) for path, content in sorted(repository.files(commit_id).items())])

    def resolve(self, _: bytes, repo: str, revision: str, path: str) -> None:
        if not (found := self._find(repo, revision)):
            return
        repository, commit_id = found
        headers = {"X-Repo-Commit": commit_id}
        content = repository.files(commit_id).get(path)
        if content is None:
            self._fail(404, "EntryNotFound", f"There is no file {path}.", headers)
            return
        headers = {**headers, "ETag": f'"{_etag(path, content)}"', "Accept-Ranges": "bytes"}
        status = 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
            self.hub.ranges.append((path, len(content)))
        self._send(status, content, headers, "application/octet-stream")

    def create(self, body: bytes) -> None:
        request = json.loads(body)
        repo = f"{request.get('organization') or 'tester'}/{request['name']}"
        status = 409 if repo in self.hub.repositories else 200
        private = bool(request.get("private") or request.get("visibility") == "private")
        self.hub.repositories.setdefault(repo, Repository(private=private))
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}, status)

    def validate_card(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "The card has no metadata."}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def choose_upload_modes(self, body: bytes, repo: str, revision: str) -> None:
        if self._find(repo, revision):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
            self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def offer_lfs_uploads(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.lfs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def store_lfs(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._fail(422, "HashMismatch", "The content does not have the hash that was announced.")
        self.hub.lfs[oid] = body
        return self._json({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if not (found := self._find(repo, revision)):
            return
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        changes: dict[str, bytes | None] = {}
        message = ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        repository, answer = found[0], {}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.references)
            repository.references[f"refs/pr/{number}"] = found[1]
            revision = f"refs/pr/{number}"
            answer = {"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/{number}"}
        commit_id = repository.commit(changes, message, revision)
        url = f"{self.hub.url}/{repo}/commit/{commit_id}"
        self._json({"commitUrl": url, "commitOid": commit_id, "success": True, **answer})

    def branch(self, _: bytes, repo: str, revision: str) -> None:
        if found := self._find(repo):
            exists = revision in found[0].references
            found[0].references.setdefault(revision, found[1])
            self._json({}, 409 if exists else 200)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {}, "application/json")

    def _fail(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {**(headers or {}), "X-Error-Code": code, "X-Error-Message": message}
        self._send(status, json.dumps({"error": message}).encode(), headers, "application/json")

    def _send(self, status: int, content: bytes, headers: dict[str, str], content_type: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_blob(content)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else _git_blob(content)


def _git_blob(content: bytes) -> str:
    return _sha1(b"blob %d\0" % len(content) + content)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("GET", f"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
    ("GET", f"/api/models/{_REPO}/tree/(?P<revision>[^/]+)/?", _Handler.tree),
    ("GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_card),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.choose_upload_modes),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.offer_lfs_uploads),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.store_lfs),
    ("POST", f"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", f"/api/models/{_REPO}/branch/(?P<revision>.+)", _Handler.branch),
]
