"""What a request passes before a route sees it: who asks, bounds on body and time, a client that leaves."""

import asyncio
import io
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeAlias

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cn_clip.serve.access import Access
from cn_clip.serve.limits import BODIES_HELD, MAX_HEAD_BYTES, MAX_JSON_MARKS, Limits
from cn_clip.serve.schemas import RefusalError, stopping

# --- the gate

# Probes carry no key, and name the machine as they like.
OPEN_PATHS = ("/healthz", "/readyz", "/health")
# The files of the web page, which are the same for everyone: what asks for the key needs none itself.
PAGE_PATHS, PAGE_PREFIX = ("/", "/favicon.ico"), "/page/"
BOUNDED_PREFIX = "/v1/"
# Pages of other sites may neither show what is answered here, as a picture or in a frame, nor take it for a script.
_HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
)

# Bytes of a body that are taken in at a time, and seconds between two such times: 12 MB a second.
STEP, PAUSE = 256 << 10, 0.02


# Of a request that is complete: its answer, or None if the routes are to give it; raises RefusalError.
Shortcut: TypeAlias = Callable[[Scope, bytes], Awaitable[Response | None]]


class ClientLeftError(Exception):
    """The connection was closed before the request was whole."""


class Gate:
    """ASGI middleware. All but the probes need the key, or else one of `hosts`; body and time are bounded.

    What is only read outside /v1/, such as the files of the page, takes no time and is not bounded. A client that
    leaves, or waits too long, has its request cancelled, wherever that is. While short requests are answered, long
    bodies are taken in slowly, for each piece of one keeps them waiting.

    shortcuts: by path, what answers most POST requests to it without the way through the routes, which takes longer
    than the rest of a request for one text.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, *, access: Access, shortcuts: Mapping[str, Shortcut] | None = None
    ) -> None:
        self.app, self.limits, self.access = app, limits, access
        self._shortcuts = shortcuts or {}
        self._bytes_held = self._num_short = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        sender = _Sender(send)
        _strip(self.access.root_path, scope)
        try:
            path = scope["path"]
            if not path:  # addresses relative to the page would begin above it
                await RedirectResponse(f"{self.access.root_path}/")(scope, receive, sender)
                return
            num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
            if num_bytes + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
                message = f"the head of the request is larger than {MAX_HEAD_BYTES} bytes"
                raise RefusalError(431, message, code="head_too_large")
            if self._needs_leave(path):
                self.access.check(scope)
            if scope["type"] == "http" and (path.startswith(BOUNDED_PREFIX) or scope["method"] not in ("GET", "HEAD")):
                await self._bounded(scope, receive, sender)
            else:
                await self.app(scope, receive, sender)
        except ClientLeftError:
            pass
        except RefusalError as refusal:
            await _refuse(refusal, scope, receive, sender)
        except asyncio.CancelledError:  # the server stops, and has waited for its requests as long as it may
            if not sender.has_begun:
                await _refuse(stopping(), scope, receive, sender)

    def _needs_leave(self, path: str) -> bool:
        """Whether not everyone may ask for it: the page's files ask for the key, and need none themselves."""
        is_of_page = path in PAGE_PATHS or path.startswith(PAGE_PREFIX)
        return path not in OPEN_PATHS and not (is_of_page and self.access.api_key is not None)

    async def _bounded(self, scope: Scope, receive: Receive, send: "_Sender") -> None:
        body = io.BytesIO()
        try:
            given_up = _GivenUp()
            given_up.after(self.limits.timeout)
            try:
                await self._read(scope, receive, body)
            except asyncio.CancelledError:
                if not given_up.caught():
                    raise
                message = f"the request did not arrive within {self.limits.timeout:g} seconds"
                raise RefusalError(408, message, code="timeout") from None
            finally:
                given_up.end()
            is_short = body.tell() <= STEP
            self._num_short += is_short
            try:
                await self._answer_in_time(scope, body.getvalue(), receive, send)
            finally:
                self._num_short -= is_short
        finally:
            self._bytes_held -= body.tell()

    async def _read(self, scope: Scope, receive: Receive, body: io.BytesIO) -> None:
        """Fills `body`; never holds more than the bound, whatever Content-Length says."""
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.limits.max_body_bytes:
            await self._too_large(receive, is_waiting=headers.get(b"expect", b"").lower() == b"100-continue")
        marks_left, more, next_pause = MAX_JSON_MARKS, True, STEP
        # What no route reads as JSON. The first of several headers counts, as for the routes.
        is_json = not Headers(scope=scope).get("content-type", "").startswith("multipart/form-data;")
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

        given_up = _GivenUp()
        # A long file takes as long as it takes, while the client goes on taking it.
        given_up.after(self.limits.timeout, since=lambda: send.sent_at)
        leaving = asyncio.ensure_future(_disconnected(receive))
        leaving.add_done_callback(given_up.now)
        try:
            await self._answer(scope, body, whole_body, send)
        except asyncio.CancelledError:
            if not given_up.caught():
                raise
            if not leaving.done() and not send.has_begun:
                raise RefusalError(
                    504,
                    f"not answered within {self.limits.timeout:g} seconds; ask for less at a time",
                    code="timeout",
                    retry_after=1,
                ) from None
        finally:
            given_up.end()
            left.set()
            leaving.cancel()

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: "_Sender") -> None:
        shortcut = self._shortcuts.get(scope["path"]) if scope["method"] == "POST" else None
        response = None if shortcut is None else await shortcut(scope, body)
        await (self.app if response is None else response)(scope, receive, send)


class _GivenUp:
    """Cancels the task that made it when there is no more reason to go on; `end` is to be called before that ends."""

    def __init__(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._is_ended = self._has_cancelled = False

    def after(self, seconds: float, since: Callable[[], float] = lambda: 0.0) -> None:
        """Later: once this much time has passed since the call, and since a time of the event loop that may change."""
        called = self._loop.time()

        def look() -> None:
            left = max(called, since()) + seconds - self._loop.time()
            if left > 0:
                self._timer = self._loop.call_later(left, look)
            else:
                self.now()

        self._timer = self._loop.call_later(seconds, look)

    def now(self, _: object = None) -> None:
        if not self._is_ended and not self._has_cancelled and self._task is not None:
            self._has_cancelled = True
            self._task.cancel()

    def caught(self) -> bool:
        """Whether a cancellation that was caught came from here, and is over with that; others are to be raised."""
        if self._has_cancelled and self._task is not None and hasattr(self._task, "uncancel"):
            return int(self._task.uncancel()) == 0
        return self._has_cancelled

    def end(self) -> None:
        self._is_ended = True
        if self._timer is not None:
            self._timer.cancel()


def _strip(root_path: str, scope: Scope) -> None:
    """Makes the request one to a server at the root: proxies in front may leave `root_path` in the path or not."""
    if root_path and f"{scope['path']}/".startswith(f"{root_path}/"):
        scope["path"] = scope["path"].removeprefix(root_path)
        scope["raw_path"] = (scope.get("raw_path") or b"").removeprefix(root_path.encode())


async def _refuse(refusal: RefusalError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await refusal.response()(scope, receive, send)


class _Sender:
    """A `send` that adds the headers an answer does not have.

    has_begun: whether the answer has. sent_at: when the client took the last piece.
    """

    def __init__(self, send: Send) -> None:
        self._send, self.has_begun, self.sent_at = send, False, 0.0

    async def __call__(self, message: Message) -> None:
        self.has_begun = True
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            own = {name.lower() for name, _ in headers}
            message = {**message, "headers": headers + [one for one in _HEADERS if one[0] not in own]}
        await self._send(message)
        self.sent_at = asyncio.get_running_loop().time()


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


async def _next_piece(receive: Receive) -> tuple[bytes, bool]:
    """(the next piece of the body, whether there are more)."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientLeftError
    return message.get("body", b""), message.get("more_body", False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
