"""What the gate refuses before a route sees it: large heads and bodies, guesses of a key; and what all answers bear."""

import asyncio
import http.client
import os
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from serving import WatchedBackend, served
from starlette.types import Message, Receive, Scope, Send

from cn_clip.clip.encoder import Encoder
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve import access, gate
from cn_clip.serve.access import MAX_GUESSES, Access, Guesses
from cn_clip.serve.gate import STEP
from cn_clip.serve.limits import MAX_HEAD_BYTES, Limits
from cn_clip.serve.schemas import RefusalError


def raw(address: str, request: bytes) -> bytes:
    """All that comes back until the server closes, or waits."""
    host = urlsplit(address)
    connection = http.client.HTTPConnection(str(host.hostname), host.port, timeout=2)
    connection.connect()
    assert connection.sock is not None
    connection.sock.sendall(request)
    answer = b""
    try:
        while piece := connection.sock.recv(65536):
            answer += piece
    except TimeoutError:
        pass
    finally:
        connection.close()
    return answer


def test_a_large_head_is_refused_also_where_it_comes_at_once() -> None:
    with served(Encoder(WatchedBackend())) as address:
        for headers, query in (({"X": "x" * MAX_HEAD_BYTES}, ""), ({}, "x" * MAX_HEAD_BYTES)):
            head = f"GET /healthz?{query} HTTP/1.1\r\nHost: localhost\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
            assert raw(address, head.encode()).startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
        assert httpx.get(f"{address}/healthz", headers={"X": "x" * 8000}).status_code == 200


def test_a_client_that_waits_to_send_too_much_is_not_told_to() -> None:
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Expect: 100-continue\r\nContent-Length: {}\r\n\r\n"
    )
    with served(Encoder(WatchedBackend()), Limits(max_body_mb=1)) as address:
        refused = raw(address, head.format(100 << 20).encode())
        assert refused.startswith(b"HTTP/1.1 413")
        assert b"100 Continue" not in refused
        assert raw(address, head.format(20).encode()).startswith(b"HTTP/1.1 100 Continue")


def test_a_long_body_is_taken_in_slowly_while_short_requests_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []

    async def rest(seconds: float) -> None:
        rests.append(seconds)

    async def scenario() -> tuple[int, int, int]:
        answer = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if len((await receive())["body"]) < STEP:
                await answer.wait()

        one = gate.Gate(app, Limits(), access=Access(api_key="key"))
        headers = [(b"authorization", b"Bearer key")]
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": headers}

        async def request(num_pieces: int, size: int) -> None:
            pieces = [{"type": "http.request", "body": b" " * size, "more_body": True}] * num_pieces
            left = iter([*pieces, {"type": "http.request", "body": b" "}])

            async def receive() -> Message:
                return next(left, None) or await asyncio.Event().wait()  # type: ignore[return-value]

            async def send(message: Message) -> None:
                pass

            await one(scope, receive, send)

        await request(8, STEP)
        alone = len(rests)
        short = asyncio.ensure_future(request(1, 10))
        while not one._num_short:
            await asyncio.sleep.__wrapped__(0)  # type: ignore[attr-defined]
        await request(8, STEP)
        beside = len(rests)
        await request(800, STEP // 100)  # as slow networks bring it
        answer.set()
        await short
        await request(8, STEP)
        return alone, beside, len(rests)

    rest.__wrapped__ = asyncio.sleep  # type: ignore[attr-defined]
    monkeypatch.setattr(gate.asyncio, "sleep", rest)
    # A pause a step, however many pieces the step came in, and none where nothing short waits.
    alone, beside, end = asyncio.run(scenario())
    assert (alone, beside) == (0, 8)
    assert 6 <= end - beside <= 8
    assert set(rests) == {gate.PAUSE}


def test_no_other_site_may_show_what_is_answered() -> None:
    with served(Encoder(WatchedBackend())) as address:
        for path in ("/v1/models", "/healthz", "/v1/none", "/openapi.json"):
            headers = httpx.get(f"{address}{path}").headers
            assert headers["content-security-policy"] == "frame-ancestors 'self'"
            assert headers["cross-origin-resource-policy"] == "same-origin"
            assert headers["x-content-type-options"] == "nosniff"
        refused = httpx.get(f"{address}/v1/models", headers={"Host": "evil.example"})
        assert (refused.status_code, refused.headers["x-content-type-options"]) == (403, "nosniff")


def test_wrong_keys_of_an_address_are_counted_before_the_next_is_compared() -> None:
    with served(Encoder(WatchedBackend()), api_key="k" * 16) as address, httpx.Client(base_url=address) as client:
        statuses = [
            client.get("/v1/models", headers={"Authorization": f"Bearer {number}"}).status_code
            for number in range(MAX_GUESSES * 3)
        ]
        assert statuses[:MAX_GUESSES] == [401] * MAX_GUESSES
        assert 429 in statuses
        right = client.get("/v1/models", headers={"Authorization": f"Bearer {'k' * 16}"})
        assert right.status_code in (200, 429)
        assert right.status_code == 200 or right.json()["error"]["code"] == "too_many_guesses"
        assert client.get("/healthz").status_code == 200


def test_a_guess_is_given_back_after_its_time_and_each_network_has_its_own() -> None:
    now = 100.0
    counted = Guesses(lambda: now)
    for _ in range(MAX_GUESSES):
        counted.check("10.0.0.1")
        counted.add("10.0.0.1")
    with pytest.raises(
        RefusalError, match="too many wrong API keys from this address; ask again in 1 seconds"
    ) as caught:
        counted.check("10.0.0.1")
    assert (caught.value.status, caught.value.retry_after) == (429, 1)
    counted.check("10.0.0.2")
    now += 1
    counted.check("10.0.0.1")
    counted.add("10.0.0.1")
    with pytest.raises(RefusalError):
        counted.check("10.0.0.1")
    for number in range(MAX_GUESSES):
        counted.add(f"2001:db8::{number:x}")
    with pytest.raises(RefusalError):
        counted.check("2001:db8::ffff")
    counted.check("2001:db8:0:1::1")


def test_addresses_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "MAX_ADDRESSES", 10)
    counted = Guesses(lambda: 0.0)
    for number in range(100):
        counted.add(f"10.0.0.{number}")
    assert len(counted._free_at) == 10


def test_an_item_whose_name_is_no_text_is_found_and_has_an_address(tmp_path: Path) -> None:
    names = {
        os.fsdecode("照片/a.jpg".encode("gbk")): "gbk:照片/a.jpg",
        "\udcff.jpg": "bytes:%FF.jpg",
        "gbk:照片/b.jpg": "gbk:照片/b.jpg",
    }
    row = np.eye(4, dtype=np.float32)[0]
    with open_writer(tmp_path / "index", Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
        writer.commit([NewItem(name, row, {"note": f"/{name}"}, name.encode(errors="replace")) for name in names])
    with (
        served(Encoder(WatchedBackend()), index=open_index(tmp_path / "index")) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        hits = client.post("/v1/search", json={"query": "猫"}).json()["data"]
        assert sorted(hit["id"] for hit in hits) == sorted(names.values())
        assert sorted(hit["metadata"]["note"] for hit in hits) == sorted(f"/{spelling}" for spelling in names.values())
        for hit in hits:
            (name,) = [name for name, spelling in names.items() if spelling == hit["id"]]
            assert client.get(hit["thumbnail"]).content == name.encode(errors="replace")
            again = client.post("/v1/search", json={"query": {"id": hit["id"]}})
            assert again.status_code == 200
        surrogate = client.post(
            "/v1/search", content=rb'{"query": {"id": "\udcff.jpg"}}', headers={"Content-Type": "application/json"}
        )
        assert surrogate.status_code in (400, 404)
