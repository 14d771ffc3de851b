"""A local server that takes and gives whole repositories as the Hugging Face hub does, for tests."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_may_write"
# The client says so of its own call.
UPLOADS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class ModelHub(ThreadingHTTPServer):
    """`repos`: OWNER/NAME -> {path: bytes}; of those in `private` and `gated` nothing is given."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.branches: list[str] = []
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, repo: str, folder: Path) -> None:
        """Publishes the files of a folder."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.repos[repo] = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class _Handler(BaseHTTPRequestHandler):
    server: ModelHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(send_body=False)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        if not path.startswith("/api/models/"):
            return self._file(send_body=True)
        repo, _, revision = path.removeprefix("/api/models/").replace("/tree/", "/revision/").partition("/revision/")
        if self._is_refused(repo, revision.partition("/")[0]):
            return None
        if "/" in revision:  # a folder in it: these have none
            return self._refuse(404, "EntryNotFound")
        if "/tree/" in path:
            files = self.server.repos[repo].items()
            return self._json([{"type": "file", "path": name, "size": len(one), "oid": COMMIT} for name, one in files])
        siblings = [{"rfilename": name} for name in sorted(self.server.repos[repo])]
        return self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repos.setdefault(repo, {})
            return self._json({"url": f"{self.server.endpoint}/{repo}", "id": repo, "name": repo})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return self._json({"transfer": "basic", "objects": [self._upload(one) for one in objects]})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        repo = "/".join(path.split("/")[3:5])
        if "/branch/" in path:
            self.server.branches.append(path.partition("/branch/")[2])
            return self._json({})
        if "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["size"] > 50_000 else "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        self._commit(repo, [json.loads(line) for line in body.splitlines()])
        return self._json({"commitOid": COMMIT, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{COMMIT}"})

    def do_PUT(self) -> None:
        body = self._body()
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._json({})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _upload(self, one: dict[str, Any]) -> dict[str, Any]:
        return {**one, "actions": {"upload": {"href": f"{self.server.endpoint}/storage/{one['oid']}"}}}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                self.server.repos[repo][value["path"]] = self.server.objects[value["oid"]]

    def _file(self, *, send_body: bool) -> None:
        repo, _, rest = unquote(urlsplit(self.path).path).removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if self._is_refused(repo, revision):
            return
        content = self.server.repos[repo].get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if send_body:
            self.wfile.write(content)

    def _is_refused(self, repo: str, revision: str) -> bool:
        if repo in self.server.gated:
            self._refuse(403, "GatedRepo")
        elif repo not in self.server.repos or repo in self.server.private:
            self._refuse(401 if repo in self.server.private else 404, "RepoNotFound")
        elif revision not in ("", "main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        else:
            return False
        return True

    def _json(self, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[ModelHub]:
    """A hub that HF_ENDPOINT names, with an empty cache of its client, in this process and those that it starts."""
    with ModelHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub
        hub.shutdown()
        thread.join()
