"""Who may ask: keys and sessions, pages of other sites, and a service below a path of a proxy."""

import asyncio
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from serving import WatchedBackend, served
from starlette.types import Message, Receive, Scope, Send

from cn_clip.clip.encoder import Encoder
from cn_clip.errors import ConfigError
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import Index, open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve.access import COOKIE, MAX_SESSIONS, SESSION_SECONDS, Access, Sessions
from cn_clip.serve.gate import Gate
from cn_clip.serve.limits import Limits

KEY = "a-long-key-of-24-letters"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index") / "photos.index"
    with open_writer(folder, Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
        writer.commit([NewItem("a", np.array([1, 0, 0, 0], dtype=np.float32), {}, b"\xff\xd8")])
    return open_index(folder)


@pytest.fixture(scope="module")
def with_key() -> Iterator[str]:
    with served(Encoder(WatchedBackend()), api_key=KEY) as address:
        yield address


@pytest.fixture(scope="module")
def below(index: Index) -> Iterator[str]:
    """A server for a page of another site too, at /photos of a proxy."""
    encoder = Encoder(WatchedBackend())
    origins = ("https://a.example", "http://localhost:5173")
    with served(encoder, index=index, origins=origins, root_path="/photos", with_page=True) as address:
        yield address


# --- keys and sessions


def test_the_key_may_come_by_either_header(with_key: str) -> None:
    for headers, status in (
        ({"x-api-key": KEY}, 200),
        ({"X-API-Key": "wrong"}, 401),
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": "Bearer wrong", "x-api-key": KEY}, 401),
        ({}, 401),
    ):
        assert httpx.get(f"{with_key}/v1/models", headers=headers).status_code == status, headers


def test_a_session_stands_for_the_key_until_it_is_ended(with_key: str) -> None:
    with httpx.Client(base_url=with_key) as client:
        assert client.post("/v1/session").status_code == 401
        begun = client.post("/v1/session", headers={"Authorization": f"Bearer {KEY}"})
        cookie = begun.headers["set-cookie"]
        assert begun.status_code == 204
        assert {"HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={SESSION_SECONDS}"} <= set(cookie.split("; "))
        assert "Secure" not in cookie
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/session").status_code == 401  # a session begins no other
        # A wrong key is a wrong key, whatever the cookie says.
        assert client.get("/v1/models", headers={"x-api-key": "wrong"}).status_code == 401
        assert client.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403
        assert client.get("/v1/models", headers={"Origin": with_key}).status_code == 200
        kept = client.cookies[COOKIE]
        assert client.delete("/v1/session").status_code == 204
        assert COOKIE not in client.cookies
        assert client.get("/v1/models", headers={"Cookie": f"{COOKIE}={kept}"}).status_code == 401


@pytest.mark.parametrize("other", ['state={"page":1}', "a[b]=1", "words=two words", "名=1", 'quote="', "alone"])
def test_a_session_holds_whatever_cookies_another_program_at_this_name_has_set(with_key: str, other: str) -> None:
    begun = httpx.post(f"{with_key}/v1/session", headers={"x-api-key": KEY})
    for cookies in (f"{other}; {COOKIE}={begun.cookies[COOKIE]}", f"{COOKIE}={begun.cookies[COOKIE]}; {other}"):
        assert httpx.get(f"{with_key}/v1/models", headers={"Cookie": cookies.encode()}).status_code == 200, cookies


def test_over_tls_the_cookie_is_for_tls_alone(with_key: str) -> None:
    headers = {"x-api-key": KEY, "Origin": "https://photos.example.com"}
    assert "Secure" in httpx.post(f"{with_key}/v1/session", headers=headers).headers["set-cookie"]


def test_wrong_keys_are_counted_whichever_header_they_come_by_and_requests_without_any_are_not() -> None:
    with served(Encoder(WatchedBackend()), api_key=KEY) as address, httpx.Client(base_url=address) as client:
        assert [client.get("/v1/models").status_code for _ in range(30)] == [401] * 30
        wrong = [{"x-api-key": "wrong"}, {"Authorization": "Bearer wrong"}]
        statuses = [client.get("/v1/models", headers=wrong[number % 2]).status_code for number in range(30)]
        assert statuses[:20] == [401] * 20
        assert 429 in statuses[20:]


def test_without_a_key_there_is_no_session(below: str) -> None:
    assert httpx.post(f"{below}/v1/session").json()["error"]["code"] == "no_key"


def test_sessions_end_by_themselves_and_are_so_many() -> None:
    now = 0.0
    sessions = Sessions(lambda: now)
    first = sessions.begin()
    assert (sessions.has(first), sessions.has(first + "x"), sessions.has("")) == (True, False, False)
    now = SESSION_SECONDS
    assert not sessions.has(first)
    now = 0.0
    for _ in range(MAX_SESSIONS):
        last = sessions.begin()
    assert (sessions.has(first), sessions.has(last)) == (False, True)


# --- pages of other sites


def test_only_pages_of_named_sites_may_ask(below: str) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-api-key"}
    for origin, is_named in (
        ("https://a.example", True),
        ("http://localhost:5173", True),
        ("http://a.example", False),
        ("https://a.example.evil.example", False),
        ("null", False),
    ):
        before = httpx.options(f"{below}/v1/embeddings", headers={"Origin": origin, **asked})
        answer = httpx.get(f"{below}/v1/models", headers={"Origin": origin})
        allowed = [one.headers.get("access-control-allow-origin") for one in (before, answer)]
        assert allowed == ([origin] * 2 if is_named else [None] * 2), origin
        assert answer.status_code == (200 if is_named or origin == "http://localhost:5173" else 403), origin
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("origin", ["*", "a.example", "https://a.example/", "https://A.example", "null", "ftp://a"])
def test_what_is_no_site_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-origin: expected the beginning of an address"):
        Access(origins=[origin])


# --- below a path


def test_addresses_are_below_the_path_and_requests_come_with_it_or_without(below: str) -> None:
    for prefix in ("", "/photos"):
        (hit,) = httpx.post(f"{below}{prefix}/v1/search", json={"query": {"id": "a"}}).json()["data"]
        assert hit["thumbnail"] == "/photos/v1/index/thumbnails/a"
        assert httpx.get(below + hit["thumbnail"]).content == b"\xff\xd8"
        assert httpx.get(f"{below}{prefix}/openapi.json").json()["servers"] == [{"url": "/photos"}]
        assert httpx.get(f"{below}{prefix}/").headers["content-type"] == "text/html; charset=utf-8"
    moved = httpx.get(f"{below}/photos")
    assert (moved.status_code, moved.headers["location"]) == (307, "/photos/")
    assert httpx.get(f"{below}/photosx").status_code == 404
    assert httpx.get(f"{below}/photos/readyz").status_code == 200


@pytest.mark.parametrize("path", ["photos", "/photos/", "/a b", "/<script>", "//evil.example", "/%2e"])
def test_a_path_that_no_proxy_would_show_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match="--root-path: expected a path such as /photos"):
        Access(root_path=path)


# --- long answers


def test_a_long_answer_goes_on_while_the_client_takes_it_and_ends_when_it_does_not() -> None:
    pieces = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(8):
            await asyncio.sleep(0.05)
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def answered(taken: int) -> int:
        nonlocal pieces
        pieces = 0
        left = asyncio.Event()
        unread = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal pieces
            pieces += message.get("body") == b"x"
            if pieces > taken:
                await left.wait()  # a client that takes no more

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/index/items/a",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
        }
        await asyncio.wait_for(Gate(app, Limits(timeout=0.2), access=Access())(scope, receive, send), 30)
        return pieces

    assert asyncio.run(answered(8)) == 8
    assert asyncio.run(answered(3)) == 4
