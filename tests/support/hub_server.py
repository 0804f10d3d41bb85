"""A stand-in of the Hub's HTTP interface on 127.0.0.1: repositories with branches and atomic commits, in memory.

It knows the requests that huggingface_hub sends to create a repository, push, and download. Weights go through LFS:
their content is uploaded first, and appears with the commit.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

TOKEN = "hf_a_token_of_the_stand_in"
LFS_SUFFIX = ".safetensors"
REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repository:
    """Branches by name; each is the list of its commits, and a commit has the files at it."""

    private: bool = False
    branches: dict[str, list[str]] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        history = self.branches.setdefault(branch, [])
        digest = hashlib.sha1(f"{branch} {len(history)} {sorted(files)}".encode())
        for content in files.values():
            digest.update(content)
        self.commits[digest.hexdigest()] = files
        history.append(digest.hexdigest())
        return digest.hexdigest()

    def find(self, revision: str) -> str | None:
        """The commit of a branch or of a hash."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.find(revision)]


class HubServer(ThreadingHTTPServer):
    """The state of the stand-in.

    failures: (method, part of a path) to the status that is answered instead.
    log: "METHOD path" of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.failures: dict[tuple[str, str], int] = {}
        self.log: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers a request by the first route that matches."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:  # noqa: N802
        self.handle_method("GET")

    def do_HEAD(self) -> None:  # noqa: N802
        self.handle_method("HEAD")

    def do_POST(self) -> None:  # noqa: N802
        self.handle_method("POST")

    def do_PUT(self) -> None:  # noqa: N802
        self.handle_method("PUT")

    def handle_method(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.log.append(f"{method} {path}")
        for (failing, part), status in self.server.failures.items():
            if failing == method and part in path:
                return self.answer(status, {"error": "a failure of the test"})
        for verbs, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method in verbs:
                values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                return action(self, **values)
        return self.answer(404, {"error": f"no route for {method} {path}"})

    # ---- answers -------------------------------------------------------------------------------------------------

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        return False

    def find(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        """A repository and a commit; None after an answer that says which of them does not exist."""
        repository = self.server.repositories.get(repo)
        is_hidden = repository is not None and repository.private and not self.headers.get("Authorization")
        if repository is None or is_hidden:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = repository.find(revision)
        if commit is None:
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    # ---- reading -------------------------------------------------------------------------------------------------

    def info(self, repo: str, revision: str = "main") -> None:
        if found := self.find(repo, revision):
            repository, commit = found
            siblings = [{"rfilename": name} for name in repository.commits[commit]]
            self.answer(200, {"id": repo, "sha": commit, "private": repository.private, "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        if found := self.find(repo, revision):
            repository, commit = found
            self.answer(200, [describe(name, content) for name, content in repository.commits[commit].items()])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not (found := self.find(repo, revision)):
            return
        repository, commit = found
        if path not in repository.commits[commit]:
            self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = repository.commits[commit][path]
        description = describe(path, content)
        etag = description["lfs"]["oid"] if "lfs" in description else description["oid"]
        self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "X-Linked-Size": str(len(content))})

    # ---- writing -------------------------------------------------------------------------------------------------

    def create(self) -> None:
        if not self.may_write():
            return
        request = json.loads(self.body)
        name = f"{request['organization']}/{request['name']}"
        address = {"url": f"{self.server.endpoint}/{name}", "name": name}
        if name in self.server.repositories:
            self.answer(409, {"error": "You already created this model repo", **address})
            return
        is_private = request.get("visibility") == "private" or bool(request.get("private"))
        repository = Repository(private=is_private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.server.repositories[name] = repository
        self.answer(200, address)

    def create_branch(self, repo: str, branch: str) -> None:
        if not self.may_write() or not (found := self.find(repo, "main")):
            return
        repository, commit = found
        if branch in repository.branches:
            self.answer(409, {"error": "Reference already exists"})
            return
        repository.branches[branch] = [commit]
        self.answer(200, {})

    def preupload(self, repo: str, revision: str) -> None:
        if not self.may_write() or not self.find(repo, revision):
            return
        files = []
        for file in json.loads(self.body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIX) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer(200, {"files": files})

    def lfs_batch(self, repo: str) -> None:
        if not self.may_write():
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.endpoint}/lfs/{item['oid']}", "header": {}}
            objects.append({**item, "actions": {"upload": upload}})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.large_files[oid] = self.body
        self.answer(200, {})

    def commit(self, repo: str, revision: str) -> None:
        if not self.may_write() or not (found := self.find(repo, revision)):
            return
        repository, head = found
        files = dict(repository.commits[head])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header" and value.get("parentCommit", head) != head:
                self.answer(412, {"error": "A commit has happened since"})
                return
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(revision, files)
        self.answer(200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{commit}", "commitOid": commit})

    def validate_yaml(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})


ROUTES = (
    (("POST",), "/api/repos/create", Handler.create),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("GET",), f"/api/models/{REPO}", Handler.info),
    (("GET",), f"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    (("GET",), f"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (("POST",), f"/api/models/{REPO}/branch/(?P<branch>[^/]+)", Handler.create_branch),
    (("POST",), f"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (("POST",), f"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    (("POST",), f"/{REPO}.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]+)", Handler.lfs_upload),
    (("GET", "HEAD"), f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
)


def describe(name: str, content: bytes) -> dict:
    """The entry of a file in the listing of a commit."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": name, "size": len(content), "oid": oid}
    if name.endswith(LFS_SUFFIX):
        large = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        entry["lfs"] = large
    return entry


@contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[HubServer]:
    """Serve in a thread; mmx and huggingface_hub talk to it, with a token and a cache in `folder`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in knows LFS only
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MMX_CACHE", str(folder / "cache"))
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
