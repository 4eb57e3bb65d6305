"""A small model hub on loopback, spoken to by the real huggingface_hub library: listing, files, storage.

It keeps whole repositories in memory, answers as the public hub does (status, X-Error-Code, ETag, X-Repo-Commit,
Location, Range), and writes down every request. Leaves out: uploads, Xet storage, paging."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    allowed: tuple[str, ...] = ()  # tokens that may read a gated or private repository
    private: bool = False
    forbidden: bool = False  # answers 403 to everybody

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit that holds just these files; the branch moves to it."""
        text = repr(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in files.items()))
        name = hashlib.sha1(f"{len(self.commits)}{text}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = dict(files), name
        return name

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass
class Seen:
    server: str  # "hub" or "storage"
    method: str
    path: str
    token: str | None
    range: str | None


class HubServer:
    """``with HubServer() as hub``: ``hub.endpoint`` is its address, ``hub.repos`` what it holds, ``hub.seen`` a record.

    Files of ``large`` bytes or more lie on the storage server, another port, to which the hub redirects. ``cut``: the
    next answer from storage ends after so many bytes."""

    def __init__(self, large: int = 2000):
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        self.large, self.cut, self.down = large, 0, False
        self._blobs: dict[str, bytes] = {}
        self._servers = {name: self._serve(name) for name in ("hub", "storage")}

    def _serve(self, name: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"owner": self, "role": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self._servers[name].server_address[1]}"

    @property
    def endpoint(self) -> str:
        return self.address("hub")

    def add(self, name: str, **about: object) -> Repo:
        self.repos[name] = Repo(**about)  # type: ignore[arg-type]
        return self.repos[name]

    def requests(self, server: str, method: str | None = None) -> list[Seen]:
        return [one for one in self.seen if one.server == server and method in (None, one.method)]


class _Handler(BaseHTTPRequestHandler):
    owner: HubServer
    role: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._do("HEAD")

    def do_GET(self) -> None:
        self._do("GET")

    def _do(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.owner.seen.append(Seen(self.role, method, path, token, self.headers.get("range")))
        if self.owner.down:
            return self._answer(503, b"down")
        if self.role == "storage":
            return self._data(self.owner._blobs[path.rsplit("/", 1)[-1]], may_cut=True)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._listing(match[1], match[2] or "main", token)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(match[1], match[2], match[3], token)
        return self._answer(404, b"")

    def _repo(self, name: str, token: str | None, files: bool) -> Repo | None:
        repo = self.owner.repos.get(name)
        if repo is None or (repo.private and token not in repo.allowed):
            self._answer(404 if token else 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif repo.forbidden:
            self._answer(403, b"", {"X-Error-Message": "the token has no right to read this"})
        elif files and repo.gated and token not in repo.allowed:
            self._answer(403 if token else 401, b"", {"X-Error-Code": "GatedRepo"})
        else:
            return repo
        return None

    def _commit(self, repo: Repo, revision: str) -> str | None:
        if (commit := repo.find(revision)) is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return commit

    def _listing(self, name: str, revision: str, token: str | None) -> None:
        if (repo := self._repo(name, token, False)) and (commit := self._commit(repo, revision)):
            siblings = [{"rfilename": file} for file in repo.commits[commit]]
            body = {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
            self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, revision: str, file: str, token: str | None) -> None:
        if not ((repo := self._repo(name, token, True)) and (commit := self._commit(repo, revision))):
            return None
        data = repo.commits[commit].get(file)
        about = {"X-Repo-Commit": commit}
        if data is None:
            return self._answer(404, b"", about | {"X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(data).hexdigest()
        if len(data) < self.owner.large:
            return self._data(data, about | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        self.owner._blobs[digest] = data
        about |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        return self._answer(302, b"", about | {"Location": f"{self.owner.address('storage')}/blobs/{digest}"})

    def _data(self, data: bytes, about: dict[str, str] | None = None, may_cut: bool = False) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or "")
        start = int(match[1]) if match else 0
        about = (about or {}) | {"Accept-Ranges": "bytes"}
        if match:
            about["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        rest = data[start:]
        cut, self.owner.cut = (self.owner.cut, 0) if may_cut else (0, self.owner.cut)
        self._answer(206 if match else 200, rest, about, rest[:cut] if cut else None)

    def _answer(self, status: int, body: bytes, about: dict[str, str] | None = None, only: bytes | None = None) -> None:
        self.send_response(status)
        for key, value in (about or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if only is None else only)
        if only is not None:
            self.wfile.flush()
            self.close_connection = True
