"""What a request passes before a route sees it: key or host, bounds on body and time, a client that leaves."""

import asyncio
import hmac
import io
import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cn_clip.serve.guesses import Guesses
from cn_clip.serve.hosts import Hosts
from cn_clip.serve.limits import BODIES_HELD, MAX_HEAD_BYTES, MAX_JSON_MARKS, MAX_READERS, Limits
from cn_clip.serve.refusals import RefusalError

log = logging.getLogger(__name__)

# Probes carry no key, and name the machine as they like.
OPEN_PATHS = ("/healthz", "/readyz")
# Who watches the service sees it also while readers of the page fill it.
UNCOUNTED_PATHS = (*OPEN_PATHS, "/metrics")
BOUNDED_PREFIX = "/v1/"
# Pages of other sites may neither show what is answered here, as a picture or in a frame, nor take it for a script.
_HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
)

# Bytes of a body that are taken in at a time, and seconds between two such times: 12 MB a second.
STEP, PAUSE = 256 << 10, 0.02


class ClientLeftError(Exception):
    """The connection was closed before the request was whole."""


class Gate:
    """ASGI middleware. All but the probes need the key, or else one of `hosts`; body and time are bounded.

    Not so what is only read outside /v1/: the web page listens to streams of events, which end when `stopping` is set;
    of these requests, the number is bounded. A client that leaves, or waits too long, has its request cancelled,
    wherever that is. While short requests are answered, long bodies are taken in slowly, for each piece of one keeps
    them waiting.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, *, api_key: str | None, hosts: Hosts, stopping: asyncio.Event
    ) -> None:
        self.app, self.limits, self.hosts, self.stopping = app, limits, hosts, stopping
        self._key = None if api_key is None else api_key.encode("utf-8")
        self._guesses = Guesses()
        self._bytes_held = self._num_readers = self._num_short = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        sender = _Sender(send)
        try:
            _check_head(scope)
            if scope["path"] not in OPEN_PATHS:
                self._check_caller(scope)
            if _is_bounded(scope):
                await self._bounded(scope, receive, sender)
            elif scope["path"] in UNCOUNTED_PATHS:
                await self.app(scope, receive, sender)
            else:
                await self._read_by_one_more(scope, receive, sender)
        except ClientLeftError:
            pass
        except RefusalError as refusal:
            await _refuse(refusal, scope, receive, sender)
        except asyncio.CancelledError:  # the server stops, and has waited for its requests as long as it may
            if not sender.has_begun:
                stopping = RefusalError(503, "the server is stopping", code="stopping", retry_after=5)
                await _refuse(stopping, scope, receive, sender)

    def _check_caller(self, scope: Scope) -> None:
        if self._key is None:
            self.hosts.check(scope)
            return
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        address = str((scope.get("client") or ("",))[0])
        self._guesses.check(address)
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            self._guesses.add(address)
            raise RefusalError(
                401, "no valid API key; send the header Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def _bounded(self, scope: Scope, receive: Receive, send: "_Sender") -> None:
        body = io.BytesIO()
        try:
            await self._read_in_time(scope, receive, body)
            is_short = body.tell() <= STEP
            self._num_short += is_short
            try:
                await self._answer_in_time(scope, body.getvalue(), receive, send)
            finally:
                self._num_short -= is_short
        finally:
            self._bytes_held -= body.tell()

    async def _read_in_time(self, scope: Scope, receive: Receive, body: io.BytesIO) -> None:
        try:
            await asyncio.wait_for(self._read(scope, receive, body), self.limits.timeout)
        except asyncio.TimeoutError as error:
            message = f"the request did not arrive within {self.limits.timeout:g} seconds"
            raise RefusalError(408, message, code="timeout") from error

    async def _read(self, scope: Scope, receive: Receive, body: io.BytesIO) -> None:
        """Fills `body`; never holds more than the bound, whatever Content-Length says."""
        if _announced_size(scope) > self.limits.max_body_bytes:
            await self._too_large(receive, is_waiting=_waits_to_send(scope))
        marks_left, more, next_pause = MAX_JSON_MARKS, True, STEP
        is_json = not _is_upload(scope)
        while more:
            piece, more = await _next_piece(receive)
            if body.tell() + len(piece) > self.limits.max_body_bytes:
                await self._too_large(receive)
            if body.tell() >= next_pause and self._num_short:
                await asyncio.sleep(PAUSE)
                next_pause = body.tell() + STEP
            body.write(piece)
            self._bytes_held += len(piece)
            if self._bytes_held > BODIES_HELD * self.limits.max_body_bytes:
                raise RefusalError(
                    503, "too many large requests at a time; ask again later", code="busy", retry_after=1
                )
            if is_json:
                marks_left -= _num_marks(piece, marks_left)
                if marks_left < 0:
                    message = (
                        f"the body holds more than {MAX_JSON_MARKS} commas and opening brackets; send several requests"
                    )
                    raise RefusalError(413, message, code="request_too_large")

    async def _too_large(self, receive: Receive, *, is_waiting: bool = False) -> None:
        """Raises the refusal once the client has sent a little more: one that is still sending may not hear it.

        is_waiting: it sends nothing before it is told to; to receive would tell it to.
        """
        thrown_away, more = 0, not is_waiting
        while more and thrown_away < self.limits.max_body_bytes:
            piece, more = await _next_piece(receive)
            thrown_away += len(piece)
        message = f"the body is larger than {self.limits.max_body_bytes} bytes"
        raise RefusalError(413, message, code="request_too_large")

    async def _answer_in_time(self, scope: Scope, body: bytes, receive: Receive, send: "_Sender") -> None:
        left = asyncio.Event()
        unread = True

        async def whole_body() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        answer = asyncio.ensure_future(self.app(scope, whole_body, send))
        leaving = asyncio.ensure_future(_disconnected(receive))
        try:
            done, _ = await asyncio.wait(
                (answer, leaving), timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            left.set()
            leaving.cancel()
            if not answer.done():
                answer.cancel()
                await asyncio.wait((answer,))
        if not answer.cancelled():
            answer.result()
        elif not done and not send.has_begun:
            raise RefusalError(
                504,
                f"not answered within {self.limits.timeout:g} seconds; ask for less at a time",
                code="timeout",
                retry_after=1,
            )

    async def _read_by_one_more(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._num_readers >= MAX_READERS:
            message = f"{MAX_READERS} requests for the page are open; ask again later"
            raise RefusalError(503, message, code="busy", retry_after=5)
        self._num_readers += 1
        try:
            await self._until_stopping(scope, receive, send)
        finally:
            self._num_readers -= 1

    async def _until_stopping(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers; a stream of events, which has no end of its own, until the server stops."""
        # Set once the stream has begun, for only then can it be ended.
        streaming = asyncio.Event()
        is_whole = False

        async def noting(message: Message) -> None:
            nonlocal is_whole
            await send(message)
            if message["type"] == "http.response.start" and _is_event_stream(message):
                streaming.set()
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        async def stopping() -> None:
            await streaming.wait()
            await self.stopping.wait()

        answer, end = asyncio.ensure_future(self.app(scope, receive, noting)), asyncio.ensure_future(stopping())
        try:
            done, _ = await asyncio.wait((answer, end), return_when=asyncio.FIRST_COMPLETED)
        finally:
            end.cancel()
            if not answer.done():
                answer.cancel()
                await asyncio.wait((answer,))
        if answer in done:
            answer.result()
            return
        if not answer.cancelled() and answer.exception() is not None:
            log.debug("a stream did not end as it was told", exc_info=answer.exception())
        if not is_whole:
            await send({"type": "http.response.body"})


def _check_head(scope: Scope) -> None:
    num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
    if num_bytes > MAX_HEAD_BYTES:
        raise RefusalError(431, f"the head of the request is larger than {MAX_HEAD_BYTES} bytes", code="head_too_large")


async def _refuse(refusal: RefusalError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await refusal.response()(scope, receive, send)


class _Sender:
    """A `send` that adds to the headers. has_begun: whether the answer has."""

    def __init__(self, send: Send) -> None:
        self._send, self.has_begun = send, False

    async def __call__(self, message: Message) -> None:
        self.has_begun = True
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
        await self._send(message)


def _is_bounded(scope: Scope) -> bool:
    return scope["type"] == "http" and (
        scope["path"].startswith(BOUNDED_PREFIX) or scope["method"] not in ("GET", "HEAD")
    )


def _is_event_stream(start: Message) -> bool:
    content_type: bytes = dict(start.get("headers", ())).get(b"content-type", b"")
    return content_type.startswith(b"text/event-stream")


def _is_upload(scope: Scope) -> bool:
    """Whether the body is never read as JSON."""
    # The first of several, as the routes read it.
    return Headers(scope=scope).get("content-type", "").startswith("multipart/form-data;")


def _num_marks(piece: bytes, most: int) -> int:
    """An upper bound on the values of a piece of JSON, up to one more than `most`.

    `find` takes a tenth of the time of `count` where there are few, as in base64.
    """
    found = 0
    for mark in b",[{":
        at = piece.find(mark)
        while at >= 0 and found <= most:
            found += 1
            at = piece.find(mark, at + 1)
    return found


def _announced_size(scope: Scope) -> int:
    given = dict(scope["headers"]).get(b"content-length", b"0")
    return int(given) if given.isdigit() else 0


def _waits_to_send(scope: Scope) -> bool:
    return bool(dict(scope["headers"]).get(b"expect", b"").lower() == b"100-continue")


async def _next_piece(receive: Receive) -> tuple[bytes, bool]:
    """(the next piece of the body, whether there are more)."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientLeftError
    return message.get("body", b""), message.get("more_body", False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
