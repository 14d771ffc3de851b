"""What a request passes before a route sees it: key or host, bounds on body and time, a client that leaves.

Which names a service without a key answers to: a page of another site, open in a browser here, must not reach it. Such
a page may have its own name resolve to this machine (DNS rebinding); then `Host` bears that name, and what it asks for
counts as its own. Or it asks by a name of this machine, and `Origin` bears its own. An address may send few wrong keys,
so that guessing the right one takes years instead of hours.
"""

import asyncio
import hmac
import io
import ipaddress
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cn_clip.errors import ConfigError
from cn_clip.serve.limits import BODIES_HELD, MAX_HEAD_BYTES, MAX_JSON_MARKS, Limits
from cn_clip.serve.schemas import RefusalError, shown, stopping

# --- names of the server

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[!-~]+?))(?::\d{1,5})?", re.IGNORECASE)
_NO_NAME = re.compile(r"[\s\[\]:/@*]")


class Hosts:
    """This machine's own names, the address that is listened at, and those allowed besides.

    listens_at: --host. allowed: names or addresses, without scheme and port; raises ConfigError for others.
    """

    def __init__(self, listens_at: str = LOOPBACK[1], allowed: Iterable[str] = ()) -> None:
        self._names = {*LOOPBACK, normal_name(listens_at)} - {None}
        for given in allowed:
            is_v6 = given.startswith("[") and given.endswith("]") and ":" in given
            name = normal_name(given[1:-1] if is_v6 else given)
            if name is None:
                raise ConfigError(
                    f"--allowed-host: expected a name or an address, without scheme, port and *, got {given!r}; "
                    "for several names give it several times"
                )
            self._names.add(name)
        is_unspecified = _is_address(listens_at) and ipaddress.ip_address(listens_at).is_unspecified
        self._any_address = not listens_at or is_unspecified

    def check(self, scope: Scope) -> None:
        """Raises RefusalError (403) for a foreign `Host`, and for what a page of a foreign `Origin` asks.

        Ports do not count: whoever serves a page at another port of an allowed host is trusted as well.
        """
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = _name(host)
        # No page can have an address for its name that is not its own.
        if name is None or not (name in self._names or (self._any_address and _is_address(name))):
            raise _refused("Host", host, name, "host_not_allowed")
        if b"origin" in headers:
            origin = headers[b"origin"].decode("latin-1")
            page = _name(origin.partition("://")[2])
            if page is None or page not in (name, *self._names):
                raise _refused("Origin", origin, page, "origin_not_allowed")


def normal_name(given: str) -> str | None:
    """A name or an address, an IPv6 one without brackets, as browsers write it; None for what is neither."""
    name = given.removesuffix(".")
    if _is_address(name):
        return str(ipaddress.ip_address(name))
    try:
        return None if not name or _NO_NAME.search(name) else name.encode("idna").decode().lower()
    except UnicodeError:  # a part is empty, or too long
        return None


def _name(authority: str) -> str | None:
    """The name or address in `host[:port]`; None where there is none."""
    found = _AUTHORITY.fullmatch(authority)
    return None if found is None else normal_name(found["v6"] or found["name"])


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _refused(header: str, given: str, name: str | None, code: str) -> RefusalError:
    if name is None:
        message = f"{header}: {shown(given)} names no host; a server without an API key answers none such"
    else:
        message = (
            f"{header}: {shown(given)} is not served here; if it should be, start the server with "
            f"--allowed-host {name[:80]}, or with an API key"
        )
    return RefusalError(403, message, param=header, code=code)


# --- wrong keys

# Wrong keys that an address may send at once, and the seconds after which it may send one more.
MAX_GUESSES = 20
SECONDS_PER_GUESS = 1.0
# Addresses that are remembered: those that guessed last.
MAX_ADDRESSES = 4096
# A shorter key, or one of fewer characters, can be guessed.
LEAST_KEY_CHARS, LEAST_KEY_ALPHABET = 16, 6


class Guesses:
    """The wrong keys of each address, for one event loop. now: seconds, from any start."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        # When what an address has used will be given back in full.
        self._free_at: OrderedDict[str, float] = OrderedDict()

    def check(self, address: str) -> None:
        """Raises RefusalError (429) for an address with no guess left; its key is not looked at, right or wrong."""
        wait = self._free_at.get(_network(address), 0) - self._now() - (MAX_GUESSES - 1) * SECONDS_PER_GUESS
        if wait > 0:
            message = f"too many wrong API keys from this address; ask again in {math.ceil(wait)} seconds"
            raise RefusalError(429, message, code="too_many_guesses", retry_after=math.ceil(wait))

    def add(self, address: str) -> None:
        """Counts a wrong key."""
        network = _network(address)
        self._free_at[network] = max(self._free_at.get(network, 0), self._now()) + SECONDS_PER_GUESS
        self._free_at.move_to_end(network)
        if len(self._free_at) > MAX_ADDRESSES:
            self._free_at.popitem(last=False)


def is_weak(key: str) -> bool:
    """Whether a key is so short or so uniform that it can be guessed."""
    return len(key) < LEAST_KEY_CHARS or len(set(key)) < LEAST_KEY_ALPHABET


def _network(address: str) -> str:
    """The address; of IPv6 its network, of which a customer has all addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if parsed.version == 4 else str(ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))


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


class ClientLeftError(Exception):
    """The connection was closed before the request was whole."""


class Gate:
    """ASGI middleware. All but the probes need the key, or else one of `hosts`; body and time are bounded.

    What is only read outside /v1/, such as the files of the page, takes no time and is not bounded. A client that
    leaves, or waits too long, has its request cancelled, wherever that is. While short requests are answered, long
    bodies are taken in slowly, for each piece of one keeps them waiting.
    """

    def __init__(self, app: ASGIApp, limits: Limits, *, api_key: str | None, hosts: Hosts) -> None:
        self.app, self.limits, self.hosts = app, limits, hosts
        self._key = None if api_key is None else api_key.encode("utf-8")
        self._guesses = Guesses()
        self._bytes_held = self._num_short = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        sender = _Sender(send)
        try:
            path = scope["path"]
            num_bytes = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
            if num_bytes + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
                message = f"the head of the request is larger than {MAX_HEAD_BYTES} bytes"
                raise RefusalError(431, message, code="head_too_large")
            if path not in OPEN_PATHS:
                self._check_caller(scope)
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

    def _check_caller(self, scope: Scope) -> None:
        if self._key is None:
            self.hosts.check(scope)
            return
        if scope["path"] in PAGE_PATHS or scope["path"].startswith(PAGE_PREFIX):
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
            try:
                await asyncio.wait_for(self._read(scope, receive, body), self.limits.timeout)
            except asyncio.TimeoutError as error:
                message = f"the request did not arrive within {self.limits.timeout:g} seconds"
                raise RefusalError(408, message, code="timeout") from error
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


async def _refuse(refusal: RefusalError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await refusal.response()(scope, receive, send)


class _Sender:
    """A `send` that adds the headers an answer does not have. has_begun: whether the answer has."""

    def __init__(self, send: Send) -> None:
        self._send, self.has_begun = send, False

    async def __call__(self, message: Message) -> None:
        self.has_begun = True
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            own = {name.lower() for name, _ in headers}
            message = {**message, "headers": headers + [one for one in _HEADERS if one[0] not in own]}
        await self._send(message)


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
