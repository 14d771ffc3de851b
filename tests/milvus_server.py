"""A Milvus server for tests: started once, stopped at exit; or the one that MILVUS_ADDRESS=HOST:PORT names.

Besides, servers with users, TLS or both, each in a network of its own, for all of them want the same ports.
"""

import atexit
import contextlib
import functools
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cn_clip.errors import StoreError
from cn_clip.retrieval.milvus_address import Address, lite_address
from cn_clip.retrieval.milvus_collection import Collection

SECONDS_TO_START = 60
_numbers = itertools.count()


@contextlib.contextmanager
def collection(name: str | None = None) -> Iterator[Address]:
    """The address of a collection that is not there yet, and is dropped at the end."""
    host, _, port = started().rpartition(":")
    address = Address(host, int(port), name or f"test_{os.getpid()}_{next(_numbers)}")
    yield address
    opened = Collection(address)
    if opened.call("has_collection"):
        opened.call("drop_collection")


@contextlib.contextmanager
def lite() -> Iterator[Address]:
    """The address of a collection of Milvus Lite that is not there yet; skips the test without the package."""
    pytest.importorskip("milvus_lite")
    with tempfile.TemporaryDirectory(prefix="milvus-", ignore_cleanup_errors=True) as folder:
        address = lite_address(Path(folder) / "photos.db")
        yield address
        release(address)


def release(address: Address) -> None:
    """Closes what this process has open of Milvus Lite, so that another process can open it."""
    pytest.importorskip("milvus_lite.server_manager").server_manager_instance.release_server(str(address.lite))


@contextlib.contextmanager
def kept_by(store: str) -> Iterator[Address]:
    """The address of a collection on a server ("milvus") or in Milvus Lite ("milvus-lite")."""
    with lite() if store == "milvus-lite" else collection() as address:
        yield address


BOTH = tuple(pytest.param(one, marks=pytest.mark.milvus) for one in ("milvus", "milvus-lite"))


@functools.cache
def started() -> str:
    """HOST:PORT of a server that answers; skips the test where there is none to start."""
    given = os.environ.get("MILVUS_ADDRESS")
    if given:
        return given
    program = shutil.which(os.environ.get("MILVUS_SERVER", "milvus-server"))
    if program is None:
        pytest.skip("needs a Milvus server: pip install milvus==2.3.5 brings the command milvus-server")
    folder, port = Path(tempfile.mkdtemp(prefix="milvus-")), free_port()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [program, "--data", str(folder), "--proxy-port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    atexit.register(_stop, process, folder)
    deadline = time.monotonic() + SECONDS_TO_START
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(StoreError):
            Collection(Address("127.0.0.1", port, "absent", timeout=2)).call("has_collection")
            return f"127.0.0.1:{port}"
        time.sleep(1)
    pytest.exit(f"no Milvus server within {SECONDS_TO_START} s; does another one run on this machine?", returncode=1)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def own(*options: str, runner: Sequence[str] = ()) -> Iterator[int]:
    """The port of a server that is started with these options of milvus-server, and stopped at the end.

    runner: what to start in its place, with the same options.

    It runs in a network of its own; a socket in the file system leads there.
    """
    program = shutil.which(os.environ.get("MILVUS_SERVER", "milvus-server"))
    if program is None and not runner:
        pytest.skip("needs a Milvus server: pip install milvus==2.3.5 brings the command milvus-server")
    folder = Path(tempfile.mkdtemp(prefix="milvus-"))
    inner = [
        sys.executable,
        __file__,
        str(folder / "socket"),
        *(runner or [str(program)]),
        "--data",
        str(folder / "data"),
        *options,
    ]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *inner],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not (folder / "socket").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.exit(f"no network of its own: {(folder / 'log').read_text(encoding='utf-8')}", returncode=1)
            time.sleep(0.05)
        with contextlib.closing(Relay(str(folder / "socket"), 0)) as relay:
            yield relay.port
    finally:
        _stop(process, folder)


def _run_inside(path: str, *command: str) -> None:
    """In the network of the server: runs it, and leads the socket to it."""
    listener = socket.socket(socket.AF_UNIX)
    with subprocess.Popen(command):
        listener.bind(path)
        listener.listen()
        Relay("127.0.0.1", 19530, listener=listener)


class Relay:
    """Passes bytes on between a port of its own and a server, until it is told to keep them.

    host: may be the path of a socket. listener: in place of a port of its own.
    """

    def __init__(self, host: str, port: int, own_port: int = 0, *, listener: socket.socket | None = None) -> None:
        self._target, self._is_stalled = (host, port), threading.Event()
        self._listener = listener or socket.create_server(("127.0.0.1", own_port))
        self._sockets: list[socket.socket] = [self._listener]
        self.port: int = 0 if listener else self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Nothing passes any more; connections stay open."""
        self._is_stalled.set()

    def close(self) -> None:
        """Ends all connections."""
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                try:
                    ends = near, self._connected()
                except OSError:  # of one that comes up
                    near.close()
                    continue
                self._sockets += ends
                for source, sink in (ends, ends[::-1]):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _connected(self) -> socket.socket:
        if not self._target[0].startswith("/"):
            return socket.create_connection(self._target)
        far = socket.socket(socket.AF_UNIX)
        far.connect(self._target[0])
        return far

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._is_stalled.is_set():
                    return
                sink.sendall(data)
        with contextlib.suppress(OSError):  # one end has closed
            sink.shutdown(socket.SHUT_WR)


def _stop(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    # The command only starts the server proper, which outlives it; both are in the session.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _run_inside(*sys.argv[1:])
