"""Which names a service without a key answers to: a page of another site, open in a browser here, must not reach it.

Such a page may have its own name resolve to this machine (DNS rebinding); then `Host` bears that name, and what it asks
for counts as its own. Or it asks by a name of this machine, and `Origin` bears its own: Gradio lets any page read the
answer.
"""

import ipaddress
import re
from collections.abc import Iterable

from starlette.types import Scope

from cn_clip.errors import ConfigError
from cn_clip.serve.refusals import RefusalError, shown

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[!-~]+?))(?::\d{1,5})?", re.IGNORECASE)
_NO_NAME = re.compile(r"[\s\[\]:/@*]")


class Hosts:
    """This machine's own names, the address that is listened at, and those allowed besides.

    listens_at: --host. allowed: names or addresses, without scheme and port; raises ConfigError for others.
    """

    def __init__(self, listens_at: str = LOOPBACK[1], allowed: Iterable[str] = ()) -> None:
        self._names = {*LOOPBACK, normal_name(listens_at), *map(_allowed_name, allowed)} - {None}
        self._any_address = not listens_at or _is_unspecified(listens_at)

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


def _allowed_name(given: str) -> str:
    is_v6 = given.startswith("[") and given.endswith("]") and ":" in given
    name = normal_name(given[1:-1] if is_v6 else given)
    if name is None:
        raise ConfigError(
            f"--allowed-host: expected a name or an address, without scheme, port and *, got {given!r}; "
            "for several names give it several times"
        )
    return name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_unspecified(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_unspecified


def _refused(header: str, given: str, name: str | None, code: str) -> RefusalError:
    if name is None:
        message = f"{header}: {shown(given)} names no host; a server without an API key answers none such"
    else:
        message = (
            f"{header}: {shown(given)} is not served here; if it should be, start the server with "
            f"--allowed-host {name[:80]}, or with an API key"
        )
    return RefusalError(403, message, param=header, code=code)
