"""A local server that answers as the Hugging Face hub does, for tests of downloads."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PATH = "/OFA-Sys/chinese-clip-rn50/resolve/main/clip_cn_rn50.pt"
CONTENT = bytes(range(256)) * 3000
STORAGE_PATH = "/storage/clip_cn_rn50.pt"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(ThreadingHTTPServer):
    """Serves one file. `cuts`: so many GETs get half of the body; `refusals`: so many after those get status 403.

    `stalls`: so many GETs get half of the body and then nothing, the connection staying open until `release` is set.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = CONTENT
        self.etag = hashlib.sha256(CONTENT).hexdigest()
        self.cuts = 0
        self.refusals = 0
        self.stalls = 0
        self.release = threading.Event()
        self.ranges_work = True
        self.redirects = False
        self.requests: list[tuple[str, str, str | None]] = []
        self.tokens: list[tuple[str, str | None]] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self) -> list[str | None]:
        """The Range header of each GET of the file so far."""
        return [range_header for method, path, range_header in self.requests if (method, path) == ("GET", PATH)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, *, send_body: bool) -> None:
        hub_server, asked = self.server, self.headers.get("Range")
        hub_server.requests.append((self.command, self.path, asked))
        hub_server.tokens.append((self.path, self.headers.get("Authorization")))
        if self.path not in (PATH, STORAGE_PATH):
            return self._refuse(404, "EntryNotFound")
        if self.path == PATH and hub_server.redirects:
            return self._redirect(f"http://localhost:{hub_server.server_port}{STORAGE_PATH}")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and hub_server.ranges_work else 0
        cut = send_body and hub_server.cuts > 0
        stall = send_body and hub_server.stalls > 0
        if send_body and not cut and hub_server.refusals > 0:
            hub_server.refusals -= 1
            return self._refuse(403, "Forbidden")
        hub_server.cuts -= cut
        hub_server.stalls -= stall
        self._send(hub_server.content, start, send_body=send_body, cut=cut or stall)
        if stall:
            hub_server.release.wait()

    def _send(self, content: bytes, start: int, *, send_body: bool, cut: bool) -> None:
        body = content[start:]
        self.send_response(206 if start else 200)
        self._send_metadata()
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut

    def _redirect(self, location: str) -> None:
        self.send_response(302)
        self._send_metadata()
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_metadata(self) -> None:
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"of-the-storage"')
        self.send_header("X-Linked-Etag", f'"{self.server.etag}"')
        self.send_header("X-Linked-Size", str(len(self.server.content)))
        self.send_header("Accept-Ranges", "bytes")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A server that HF_ENDPOINT names, in this process and those that it starts."""
    with FakeHub() as fake:
        thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
        # Bytes reach the disk in chunks of 10 MB otherwise, and none of this small file would be there to go on from.
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 14)
        yield fake
        fake.release.set()
        fake.shutdown()
        thread.join()


def leftovers(root: Path) -> list[str]:
    """What lies in the folder beside the empty lock file."""
    return sorted(path.name for path in root.rglob("*") if not path.name.endswith(".lock"))
