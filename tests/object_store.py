"""An S3 server for tests, of moto, that may be killed: what it has answered lies in a folder, and is there again.

python tests/object_store.py PORT FOLDER runs it; `ObjectStore` starts and kills that.
"""

import contextlib
import datetime
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from milvus_server import free_port

SECONDS_TO_START = 60
# What pyarrow and boto find in the environment; the server asks for none.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "pw-hush-7", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "bucket"


class ObjectStore:
    """The server, its port, and what it keeps in `folder`."""

    def __init__(self, folder: Path, *, is_open: bool = True) -> None:
        """is_open: it asks for no credentials; else it knows nobody's."""
        self.folder, self.port, self._is_open = folder, free_port(), is_open
        self._process: subprocess.Popen[bytes] | None = None
        (folder / BUCKET).mkdir(parents=True, exist_ok=True)
        self.start()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def uri(self, path: str) -> str:
        """s3://…, as a user would write it for a server of their own."""
        return f"s3://{BUCKET}/{quote(path)}?endpoint_override=127.0.0.1:{self.port}&scheme=http"

    def start(self) -> None:
        """Starts it, again after a kill, and waits until it answers."""
        command = [sys.executable, __file__, str(self.port), str(self.folder)]
        environment = {**os.environ, **({} if self._is_open else {"INITIAL_NO_AUTH_ACTION_COUNT": "0"})}
        with open(self.folder / ".log", "ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError, urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/moto-api/data.json", timeout=2).close()
                return
            time.sleep(0.05)
        raise AssertionError((self.folder / ".log").read_text(encoding="utf-8")[-2000:])

    def kill(self) -> None:
        """SIGKILL; what it has not answered is lost."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def put(self, path: str, data: bytes) -> None:
        """An object."""
        address = f"http://127.0.0.1:{self.port}/{BUCKET}/{quote(path)}"
        request = urllib.request.Request(address, data=data, method="PUT")
        request.add_header("Content-Type", "application/octet-stream")
        urllib.request.urlopen(request, timeout=20).close()

    def names(self, prefix: str = "") -> list[str]:
        """The keys of what it keeps."""
        found = (unquote(one.name) for one in (self.folder / BUCKET).iterdir() if not one.name.startswith("."))
        return sorted(name for name in found if name.startswith(prefix) and not name.endswith("/"))

    def path(self, name: str) -> Path:
        """The file that keeps an object."""
        return self.folder / BUCKET / quote(name, safe="")


@contextlib.contextmanager
def object_store(folder: Path, *, is_open: bool = True) -> Iterator[ObjectStore]:
    """A server while the block runs."""
    store = ObjectStore(folder, is_open=is_open)
    try:
        yield store
    finally:
        store.kill()


class ManyKeys(http.server.BaseHTTPRequestHandler):
    """A server that lists so many empty pictures, a thousand a page, and has no object else."""

    protocol_version, number, page = "HTTP/1.1", 10**6, 1000

    def do_GET(self) -> None:
        asked = dict(parse_qsl(urlsplit(self.path).query))
        if "list-type" not in asked:
            return self._answer(404, b"")
        first = int(asked.get("continuation-token", "0"))
        keys = range(first, min(first + int(asked.get("max-keys", self.page)), self.number))
        found = "".join(
            f"<Contents><Key>many/{key:07d}.jpg</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            '<ETag>"0"</ETag><Size>9</Size><StorageClass>STANDARD</StorageClass></Contents>'
            for key in keys
        )
        more = keys.stop < self.number
        token = f"<NextContinuationToken>{keys.stop}</NextContinuationToken>" if more else ""
        return self._answer(
            200,
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>many/</Prefix><KeyCount>{len(keys)}</KeyCount><MaxKeys>{self.page}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{found}</ListBucketResult>".encode(),
        )

    def do_HEAD(self) -> None:
        self._answer(404, b"")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def many_keys(number: int) -> Iterator[str]:
    """The URI of a folder with so many keys."""
    handler = type("Keys", (ManyKeys,), {"number": number})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"s3://{BUCKET}/many?endpoint_override=127.0.0.1:{server.server_address[1]}&scheme=http"
        server.shutdown()


def _serve(port: int, folder: Path) -> None:
    from moto.s3 import models  # type: ignore[import-not-found, unused-ignore]
    from moto.server import ThreadedMotoServer  # type: ignore[import-not-found, unused-ignore]

    def date(key: Any, path: Path) -> Any:
        """An object is as old after a kill as it was before."""
        key.last_modified = datetime.datetime.fromtimestamp(int(path.stat().st_mtime), datetime.timezone.utc).replace(
            tzinfo=None
        )
        return key

    backend = models.s3_backends["123456789012"]["aws"]
    for bucket in (one for one in folder.iterdir() if one.is_dir()):
        backend.create_bucket(bucket.name, "us-east-1")
        for one in bucket.iterdir():
            if not one.name.startswith("."):
                date(backend.put_object(bucket.name, unquote(one.name), one.read_bytes()), one)
    kind: Any = models.S3Backend
    put, complete, delete = kind.put_object, kind.complete_multipart_upload, kind.delete_object

    def keep(bucket: str, name: str, data: bytes) -> Path:
        path = folder / bucket / quote(name, safe="")
        path.parent.mkdir(exist_ok=True)
        aside = path.with_name(f".{os.getpid()}.{time.monotonic_ns()}")
        aside.write_bytes(data)
        return aside.replace(path)

    def put_object(self: Any, bucket_name: str, key_name: str, value: bytes, *args: Any, **more: Any) -> Any:
        path = keep(bucket_name, key_name, value)
        return date(put(self, bucket_name, key_name, value, *args, **more), path)

    def complete_multipart_upload(self: Any, bucket_name: str, *args: Any, **more: Any) -> Any:
        key = complete(self, bucket_name, *args, **more)
        if key is not None:
            date(key, keep(bucket_name, key.name, key.value))
        return key

    def delete_object(self: Any, bucket_name: str, key_name: str, *args: Any, **more: Any) -> Any:
        (folder / bucket_name / quote(key_name, safe="")).unlink(missing_ok=True)
        return delete(self, bucket_name, key_name, *args, **more)

    kind.put_object, kind.complete_multipart_upload, kind.delete_object = (
        put_object,
        complete_multipart_upload,
        delete_object,
    )
    ThreadedMotoServer("127.0.0.1", port, verbose=False).start()
    signal.pause()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]))
