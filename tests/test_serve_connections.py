"""How many connections there are at a time is bounded, and so is the time a head may take."""

import contextlib
import socket
from collections.abc import Iterator

import httpx
import pytest
from serving import WatchedBackend, served, wait_until

from cn_clip.clip.encoder import Encoder
from cn_clip.serve import server
from cn_clip.serve.limits import Limits

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        yield connection


def closed(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            answer += piece
    return answer


def answered(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"\r\n")
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        piece = connection.recv(65536)
        assert piece, answer
        answer += piece
    assert answer.startswith(b"HTTP/1.1 200")


def test_one_connection_too_many_is_told_so_and_the_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Encoder(WatchedBackend())) as address, contextlib.ExitStack() as connections:
        wait_until(lambda: httpx.get(f"{address}/healthz", headers={"Connection": "close"}).status_code == 200)
        monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
        opened = [connections.enter_context(connected(address)) for _ in range(3)]
        for connection in opened:
            answered(connection)
        with connected(address) as refused:
            head, _, body = closed(refused).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n")
        assert b"retry-after: 1" in head
        assert b'"code":"busy"' in body
        answered(opened[0])
        opened[0].close()
        wait_until(lambda: httpx.get(f"{address}/healthz", headers={"Connection": "close"}).status_code == 200)


def test_a_head_that_does_not_come_closes_the_connection() -> None:
    with served(Encoder(WatchedBackend()), Limits(timeout=1)) as address:
        with connected(address) as silent:
            assert closed(silent) == b""
        with connected(address) as slow:
            slow.sendall(HEAD)
            assert closed(slow) == b""
        with connected(address) as second:
            answered(second)
            second.sendall(HEAD)
            assert closed(second) == b""


def test_the_deadline_of_a_head_ends_with_the_head() -> None:
    backend = WatchedBackend()
    with served(Encoder(backend), Limits(timeout=2)) as address, connected(address) as connection:
        backend.going.clear()
        body = b'{"model": "tiny", "input": "x"}'
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 504")
        backend.going.set()
