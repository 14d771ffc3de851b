"""How many connections and readers there are at a time is bounded, and so is the time a head may take."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import WatchedBackend, served, wait_until

from cn_clip.clip.encoder import Encoder
from cn_clip.serve import gate, server
from cn_clip.serve.gate import Hosts
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


def test_too_many_readers_are_told_so_but_probes_and_the_api_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_READERS", 0)
    with served(Encoder(WatchedBackend())) as address:
        refused: dict[str, Any] = httpx.get(f"{address}/openapi.json").json()["error"]
        assert (refused["code"], refused["type"]) == ("busy", "server_error")
        for path in ("/healthz", "/readyz", "/metrics", "/v1/models"):
            assert httpx.get(f"{address}{path}").status_code == 200


def test_a_reader_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_READERS", 1)
    with served(Encoder(WatchedBackend())) as address:
        for _ in range(2):
            assert httpx.get(f"{address}/openapi.json").status_code == 200


class Stream:
    """A request for a stream of events, through a gate that has room for one; `sent` is what the client sees."""

    def __init__(self, door: gate.Gate) -> None:
        self.sent: list[str] = []
        self.may_send, self.left = asyncio.Event(), asyncio.Event()
        scope = {"type": "http", "method": "GET", "path": "/stream", "headers": [(b"host", b"localhost")]}
        self.answer = asyncio.ensure_future(door(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> dict[str, object]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, object]) -> None:
        await self.may_send.wait()
        self.sent.append(str(message.get("status", message["type"])))


def streaming(stopping: asyncio.Event) -> gate.Gate:
    async def app(scope: object, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while (await receive())["type"] != "http.disconnect":
            pass

    return gate.Gate(app, Limits(), api_key=None, hosts=Hosts(), stopping=stopping)


def test_a_reader_of_a_stream_who_left_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_READERS", 1)

    async def main() -> None:
        door = streaming(asyncio.Event())
        for _ in range(2):
            first = Stream(door)
            first.may_send.set()
            await asyncio.sleep(0.01)
            refused = Stream(door)
            refused.may_send.set()
            await refused.answer
            assert (first.sent, refused.sent[0]) == (["200"], "503")
            first.left.set()
            await first.answer
        leaving = Stream(door)
        await asyncio.sleep(0.01)
        leaving.answer.cancel()
        await asyncio.wait((leaving.answer,))
        last = Stream(door)
        last.may_send.set()
        last.left.set()
        await last.answer
        assert last.sent == ["200"]

    asyncio.run(main())


def test_a_stream_that_has_not_begun_when_the_server_stops_begins_before_it_ends() -> None:
    async def main() -> list[str]:
        stopping = asyncio.Event()
        stream = Stream(streaming(stopping))
        stopping.set()
        await asyncio.sleep(0.01)
        assert not stream.answer.done()
        stream.may_send.set()
        await asyncio.wait_for(stream.answer, 60)
        return stream.sent

    assert asyncio.run(main()) == ["200", "http.response.body"]
