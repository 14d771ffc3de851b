"""Which names a service without a key answers to: a page of another site, open in a browser here, must not reach it.

Such a page may have its own name resolve to this machine (DNS rebinding); then `Host` bears that name, and what it asks
for counts as its own. Or it sends a form, whose answer it cannot read; then `Origin` bears its name.
"""

import ipaddress
import re
from collections.abc import Iterable

from starlette.types import Scope

from cn_clip.errors import ConfigError
from cn_clip.serve.refusals import RefusalError, shown

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Addresses of all interfaces, as --host may spell them.
EVERYWHERE = ("", "0.0.0.0", "::")
_AUTHORITY = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\s\[\]:/@]+))(?::\d{1,5})?", re.IGNORECASE)
_READING = ("GET", "HEAD")


class Hosts:
    """This machine's own names, the address that is listened at, and those allowed besides.

    listens_at: --host. allowed: names or addresses, without scheme and port; raises ConfigError for others.
    """

    def __init__(self, listens_at: str = LOOPBACK[1], allowed: Iterable[str] = ()) -> None:
        self._names = {*LOOPBACK, listens_at.lower(), *map(_allowed_name, allowed)}
        self._any_address = listens_at in EVERYWHERE

    def check(self, scope: Scope) -> None:
        """Raises RefusalError (403) for a foreign `Host`, and for what a page of a foreign `Origin` sends."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = _name(host)
        # No page can have an address for its name that is not its own.
        if name is None or not (name in self._names or (self._any_address and _is_address(name))):
            raise _refused("Host", host, "host_not_allowed")
        if b"origin" in headers and scope.get("method") not in _READING:
            origin = headers[b"origin"].decode("latin-1")
            authority = origin.partition("://")[2]
            if authority.lower() != host.lower() and _name(authority) not in self._names:
                raise _refused("Origin", origin, "origin_not_allowed")


def _name(authority: str) -> str | None:
    """The name or address in `host[:port]`, in lower case; None where there is none."""
    found = _AUTHORITY.fullmatch(authority)
    return None if found is None else (found["v6"] or found["name"]).lower().removesuffix(".")


def _allowed_name(given: str) -> str:
    name = given.lower().removeprefix("[").removesuffix("]")
    if not _is_address(name) and (":" in name or _name(name) is None):
        raise ConfigError(f"--allowed-host: expected a name or an address without scheme and port, got {given!r}")
    return name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _refused(header: str, given: str, code: str) -> RefusalError:
    name = "HOST" if (found := _name(given.partition("://")[2] or given)) is None else found
    message = f"{header}: {shown(given)} is not served here; if it should be, start the server with"
    return RefusalError(403, f"{message} --allowed-host {name[:80]}, or with an API key", param=header, code=code)
