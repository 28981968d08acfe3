"""A server that speaks the Hugging Face hub's protocol, and a second origin as its content delivery network (CDN).

Spoken: repository and revision info, tree (in pages), paths-info, resolve (HEAD and GET; small files behind a relative
redirect, LFS files behind a signed address on the other origin), ranges, LFS upload, preupload and commit, and the
error headers that clients distinguish cases by. Xet is not spoken: clients fall back to LFS.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

HOST, TOKEN = "127.0.0.1", "hf_test"
LFS = (".safetensors", ".pt", ".gz", ".parquet", ".bin")
PAGE = 20  # entries of a page of the tree


class Request(NamedTuple):
    """A logged request."""

    origin: str  # "hub" or "cdn"
    method: str
    path: str
    range: str
    token: str


class Repo:
    """One repository.

    Attributes:
        commits: files of each commit.
        refs: branches and tags.
        access: "open", "private" (needs a token) or "gated" (refused with a token too).
    """

    def __init__(self, files: dict[str, bytes], access: str = "open") -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.access = access
        self.commit(files)

    def commit(self, files: dict[str, bytes]) -> str:
        """Make `files` the content of main."""
        sha = hashlib.sha1(repr([(n, hashlib.sha256(b).digest()) for n, b in sorted(files.items())]).encode())
        self.commits[sha.hexdigest()] = dict(files)
        self.refs["main"] = sha.hexdigest()
        return sha.hexdigest()


class Hub:
    """The two servers.

    Attributes:
        repos: by ("models" or "datasets", "ORG/NAME").
        requests: log of every request.
        faults: (request) -> "", a status as text, "cut" (half of the body, then the connection ends) or "reset".
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}  # uploaded to LFS storage
        self.requests: list[Request] = []
        self.faults = lambda request: ""
        self._servers = [self._serve(origin) for origin in ("hub", "cdn")]
        self.url, self.cdn = (f"http://{HOST}:{server.server_port}" for server in self._servers)

    def add(self, name: str, files: dict[str, bytes] | Path, kind: str = "models", access: str = "open") -> Repo:
        """Add a repository of files, or of a folder's files."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in sorted(files.rglob("*")) if p.is_file()}
        self.repos[kind, name] = repo = Repo(files, access)
        return repo

    def fetched(self) -> list[str]:
        """Names of the files whose content was downloaded, in order."""
        return [unquote(r.path.split("?")[0].rsplit("/", 1)[-1]) for r in self.requests if _downloads(r)]

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _serve(self, origin: str) -> ThreadingHTTPServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def _answer(self):
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                request = Request(origin, self.command, self.path, self.headers.get("Range", ""), token)
                hub.requests.append(request)
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size) if "chunked" not in self.headers.get("Transfer-Encoding", "") else b""
                while "chunked" in self.headers.get("Transfer-Encoding", ""):
                    part = self.rfile.read(int(self.rfile.readline(), 16))
                    self.rfile.readline()
                    if not part:
                        break
                    body += part
                fault = hub.faults(request)
                if fault == "reset":
                    self.close_connection = True
                    return
                if fault.isdigit():
                    status, headers, data = int(fault), {}, b"busy"
                else:
                    status, headers, data = (hub.answer if origin == "hub" else hub.store)(request, body)
                if status == 200 and (found := re.fullmatch(r"bytes=(\d+)-(\d*)", request.range)):
                    first, last = int(found[1]), int(found[2] or len(data) - 1)
                    status, whole = (206 if first < len(data) else 416), len(data)
                    data = data[first : last + 1]
                    headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{whole}"
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if fault == "cut":
                    data, self.close_connection = data[: len(data) // 2], True
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = do_PUT = _answer

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # connections that clients have cut
                pass

        server = Server((HOST, 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def store(self, request: Request, body: bytes) -> tuple[int, dict, bytes]:
        """The content delivery network: signed addresses, by the SHA-256 sum of the content."""
        assert not request.token, "a token was sent to the content delivery network"
        name = request.path.split("?")[0].split("/")[2]
        if request.method == "PUT":
            if hashlib.sha256(body).hexdigest() != name:
                return 400, {}, b""
            self.blobs[name] = body
            return 200, {}, b""
        every = (files for repo in self.repos.values() for files in repo.commits.values())
        for data in itertools.chain(*(files.values() for files in every)):
            if hashlib.sha256(data).hexdigest() == name:
                return 200, {"Accept-Ranges": "bytes", "ETag": f'"{name[:32]}"'}, data
        return 404, {}, b""

    def answer(self, request: Request, body: bytes) -> tuple[int, dict, bytes]:
        """The hub itself."""
        path = urlsplit(request.path).path
        if path == "/api/repos/create":
            return self._create(request, json.loads(body))
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            kind, name, action, revision, inside = found.groups()
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path):
            prefix, name, action, revision, inside = found.groups()
            kind = (prefix or "models/")[:-1]
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path):
            prefix, name, action = found.groups()
            kind, revision, inside = (prefix or "models/")[:-1], None, None
        elif found := re.fullmatch(r"/api/resolve-cache/(models|datasets)/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            kind, name, revision, inside = found.groups()
            action = "content"
        else:
            return _error(404, "", "Not Found")
        if request.token not in ("", TOKEN):
            return _error(401, "", "Invalid credentials in Authorization header")
        repo = self.repos.get((kind, name))
        if repo is None or (repo.access == "private" and not request.token):
            return _error(404 if request.token else 401, "RepoNotFound", "Repository not found")
        files_action = action in ("resolve", "content")
        if repo.access == "gated" and files_action:
            return _error(403 if request.token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        revision = unquote(revision or "main")
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[sha]
        if action in (None, "revision"):
            siblings = [{"rfilename": file} for file in sorted(files)]
            about = {"_id": "0", "id": name, "sha": sha, "private": repo.access == "private", "siblings": siblings}
            return _json(about | {"gated": repo.access == "gated", "tags": [], "downloads": 0, "likes": 0})
        if action == "tree":
            return self._tree(request, files, unquote(inside or ""))
        if action == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            known = {entry["path"]: entry for entry in _entries(files, "", True)}
            return _json([known[one] for one in wanted if one in known])
        if files_action:
            return self._file(kind, name, sha, files, unquote(inside), action == "content")
        if request.token != TOKEN:
            return _error(401, "", "Invalid username or password.")
        if action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(file["path"], files[file["path"]]) if file["path"] in files else None,
                }
                for file in json.loads(body)["files"]
            ]
            return _json({"files": modes})
        if action == "batch":
            return self._batch(files, name, json.loads(body))
        if action == "verify":
            return _json({}) if json.loads(body)["oid"] in self.blobs else _error(404, "", "not uploaded")
        if action == "commit":
            return self._commit(repo, name, body)
        return _error(404, "", f"no action {action}")

    def _create(self, request: Request, payload: dict) -> tuple[int, dict, bytes]:
        if request.token != TOKEN:
            return _error(401, "", "Invalid username or password.")
        name = f"{payload['organization']}/{payload['name']}"
        kind = f"{payload.get('type') or 'model'}s"
        if (kind, name) in self.repos:
            answer = {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            return 409, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        self.add(name, {".gitattributes": b""}, kind)
        return _json({"url": f"{self.url}/{name}", "name": name})

    def _tree(self, request: Request, files: dict[str, bytes], inside: str) -> tuple[int, dict, bytes]:
        query = parse_qs(urlsplit(request.path).query)
        entries = _entries(files, inside, query.get("recursive", ["False"])[0].lower() == "true")
        if inside and not entries:
            return _error(404, "EntryNotFound", f"{inside} does not exist")
        first = int(query.get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if first + PAGE < len(entries):
            path = urlsplit(request.path).path
            recursive = query.get("recursive", ["False"])[0]
            headers["Link"] = f'<{self.url}{path}?recursive={recursive}&cursor={first + PAGE}>; rel="next"'
        return 200, headers, json.dumps(entries[first : first + PAGE]).encode()

    def _file(self, kind: str, name: str, sha: str, files: dict, path: str, direct: bool) -> tuple[int, dict, bytes]:
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path not in files:
            status, error, data = _error(404, "EntryNotFound", "Entry not found")
            return status, error | headers, data
        data = files[path]
        oid, size = _oid(path, data), str(len(data))
        if path.endswith(LFS):
            sha256 = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": size, "ETag": f'"{oid}"'}
            return 302, headers | linked | {"Location": f"{self.cdn}/blobs/{sha256}/{path}?Signature=x"}, b""
        if direct:
            return 200, headers | {"ETag": f'"{oid}"'}, data
        location = f"/api/resolve-cache/{kind}/{name}/{sha}/{path}"
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": size}
        return 307, headers | linked | {"Location": location}, b""

    def _batch(self, files: dict[str, bytes], name: str, payload: dict) -> tuple[int, dict, bytes]:
        stored = set(self.blobs) | {hashlib.sha256(data).hexdigest() for data in files.values()}
        objects = []
        for one in payload["objects"]:
            actions = {
                "upload": {"href": f"{self.cdn}/blobs/{one['oid']}?Signature=x"},
                "verify": {"href": f"{self.url}/{name}.git/info/lfs/objects/verify"},
            }
            objects.append(one if one["oid"] in stored else one | {"actions": actions})
        return _json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: Repo, name: str, body: bytes) -> tuple[int, dict, bytes]:
        files = dict(repo.commits[repo.refs["main"]])
        by_digest = {hashlib.sha256(data).hexdigest(): data for data in files.values()} | self.blobs
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = by_digest[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"])
        sha = repo.commit(files)
        return _json({"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})


def _downloads(request: Request) -> bool:
    return request.method == "GET" and ("/resolve-cache/" in request.path or request.path.startswith("/blobs/"))


def _entries(files: dict[str, bytes], inside: str, recursive: bool) -> list[dict]:
    """Entries of the tree below a folder."""
    prefix = f"{inside}/" if inside else ""
    found: dict[str, dict] = {}
    for path, data in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        folders = path.removeprefix(prefix).split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            folder = prefix + "/".join(folders[:depth])
            if recursive or depth == 1:
                found[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
        if recursive or not folders:
            found[path] = {"type": "file", "oid": _oid(path, data), "size": len(data), "path": path}
            if path.endswith(LFS):
                sha256 = hashlib.sha256(data).hexdigest()
                found[path]["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return list(found.values())


def _oid(path: str, data: bytes) -> str:
    """Git's id of a blob: of the content, or of the LFS pointer."""
    if path.endswith(LFS):
        sha256 = hashlib.sha256(data).hexdigest()
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
        data = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _json(value) -> tuple[int, dict, bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, code: str, message: str) -> tuple[int, dict, bytes]:
    headers = {"X-Error-Message": message, "Content-Type": "application/json"}
    if code:
        headers["X-Error-Code"] = code
    return status, headers, json.dumps({"error": message}).encode()


@contextmanager
def hub_server(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a hub that this process's client and child processes use, with an empty cache."""
    from huggingface_hub import constants

    hub = Hub()
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # The library reads its environment once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    forget()
    try:
        yield hub
    finally:
        hub.close()
        forget()


def forget() -> None:
    """Forget resolved references, as in a new process."""
    from huggingface_hub.utils import close_session

    from avocado_jax.checkpoint import references

    references._snapshot.cache_clear()
    references._commits.clear()
    close_session()
