"""Who may ask: which names a service without a key answers to, keys and sessions, wrong keys, pages of other sites.

A page of another site, open in a browser here, must not reach the service. Such a page may have its own name resolve to
this machine (DNS rebinding); then `Host` bears that name, and what it asks for counts as its own. Or it asks by a name
of this machine, and `Origin` bears its own. An address may send few wrong keys, so that guessing the right one takes
years instead of hours.
"""

import functools
import hashlib
import hmac
import ipaddress
import math
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import Scope

from cn_clip.errors import ConfigError
from cn_clip.serve.schemas import RefusalError, shown

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
        self.check_origin(scope)

    def check_origin(self, scope: Scope) -> None:
        """Raises RefusalError (403) for what a page of a foreign `Origin` asks; what names none is no page."""
        headers = dict(scope["headers"])
        if b"origin" in headers:
            origin, host = (headers.get(one, b"").decode("latin-1") for one in (b"origin", b"host"))
            page = _name(origin.partition("://")[2])
            if page is None or page not in (_name(host), *self._names):
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


@functools.lru_cache(maxsize=256)
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


# --- sessions

COOKIE = "cn_clip_session"
SESSION_SECONDS = 7 * 86400
MAX_SESSIONS = 1024


class Sessions:
    """Who has shown the key, by a cookie that no script reads. They end with the process. now: seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ends: OrderedDict[bytes, float] = OrderedDict()

    def begin(self) -> str:
        """A new one; the oldest end where there are too many."""
        token = secrets.token_urlsafe(32)
        self._ends[_digest(token)] = self._now() + SESSION_SECONDS
        while len(self._ends) > MAX_SESSIONS:
            self._ends.popitem(last=False)
        return token

    def has(self, token: str) -> bool:
        """Whether it lasts."""
        return self._ends.get(_digest(token), 0) > self._now()

    def end(self, token: str) -> None:
        """From now on there is none of this cookie."""
        self._ends.pop(_digest(token), None)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


# --- all of it

_ORIGIN = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?")
_ROOT = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")


@dataclass(frozen=True)
class Access:
    """Who may ask, and by which addresses; raises ConfigError.

    hosts: what a server without a key may be called, and from where a page with a session may ask. api_key: what every
    request but the probes must bear. origins: other sites whose pages may ask, as browsers name them. root_path: what
    the addresses begin with that a proxy in front takes for this server; requests may come with it or without.
    """

    hosts: Hosts = field(default_factory=Hosts)
    api_key: str | None = None
    origins: Sequence[str] = ()
    root_path: str = ""
    sessions: Sessions = field(default_factory=Sessions)
    guesses: Guesses = field(default_factory=Guesses)

    def __post_init__(self) -> None:
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "--cors-origin: expected the beginning of an address as browsers write it, such as "
                    f"https://photos.example.com, got {origin!r}; for several give it several times"
                )
        if self.root_path and not _ROOT.fullmatch(self.root_path):
            raise ConfigError(f"--root-path: expected a path such as /photos, got {self.root_path!r}")

    def check(self, scope: Scope) -> None:
        """Raises RefusalError: 403 for a foreign name or page, 401 without a valid key or session, 429."""
        headers = Headers(scope=scope)
        if self.api_key is None:
            if headers.get("origin") not in self.origins:
                self.hosts.check(scope)
        elif self._given(headers) is None and self.sessions.has(session_of(headers)):
            # A browser adds the cookie by itself, whoever asks it to.
            self.hosts.check_origin(scope)
        else:
            self.check_key(scope)

    def check_key(self, scope: Scope) -> None:
        """Raises RefusalError: 401 without a valid key, 429 after too many wrong ones."""
        given = self._given(Headers(scope=scope))
        address = str((scope.get("client") or ("",))[0])
        if given is not None:
            self.guesses.check(address)
            if self.api_key is not None and hmac.compare_digest(given, self.api_key.encode("utf-8")):
                return
            self.guesses.add(address)
        message = "no valid API key; send the header Authorization: Bearer KEY, or x-api-key: KEY"
        raise RefusalError(401, message, code="invalid_api_key")

    @staticmethod
    def _given(headers: Headers) -> bytes | None:
        """The key of a request, right or wrong; None without any."""
        authorization = headers.get("authorization")
        if authorization is not None:
            scheme, _, key = authorization.encode("latin-1").partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
        given = headers.get("x-api-key")
        return None if given is None else given.encode("latin-1").strip()


def session_of(headers: Headers) -> str:
    """The session that a request names; "" for none."""
    # Programs at other ports of this name set cookies too, in forms at which http.cookies gives up on all of them.
    return cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
