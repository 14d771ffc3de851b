"""Where an index in Postgres is: an address, which libpq completes by its environment and files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from urllib.parse import parse_qsl, unquote, urlsplit

from cn_clip.errors import ConfigError
from cn_clip.secret import NO_SECRET, Secret, without_secrets

SCHEME = "pgvector://"
DEFAULT_TIMEOUT = 20.0
# Of libpq, behind the `?`; what an address leaves out comes from PGHOST, PGPASSWORD, PGSERVICE, ~/.pgpass and so on.
SETTINGS = (
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslcrl",
    "sslnegotiation",
    "ssl_min_protocol_version",
    "channel_binding",
    "require_auth",
    "gssencmode",
    "krbsrvname",
    "service",
    "passfile",
    "host",
    "hostaddr",
    "target_session_attrs",
    "application_name",
    "keepalives_idle",
    "tcp_user_timeout",
)
GRAMMAR = (
    "expected pgvector://HOST:PORT/DATABASE/NAME, NAME of letters, digits and _; before the host at most "
    "USER:PASSWORD@, after the name at most ?timeout=SECONDS and libpq's settings, as &sslmode=verify-full; what is "
    "left out comes from PGHOST, PGPASSWORD, PGSERVICE and so on"
)

# Names of indexes and constraints are made of it, and 63 letters are all that Postgres reads.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,49}")
_SECRET_SETTINGS = ("sslpassword",)


@dataclass(frozen=True)
class Address:
    """Where a table is. timeout: seconds within which Postgres answers, or is given up. settings: for libpq, with
    neither user nor password; host, port and database are empty where libpq is to find them."""

    host: str
    port: int
    database: str
    name: str
    timeout: float = DEFAULT_TIMEOUT
    user: str = ""
    password: Secret = NO_SECRET
    settings: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    key_password: Secret = NO_SECRET

    @property
    def store(self) -> str:
        """What keeps it."""
        return "Postgres"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port else ""
        return f"{SCHEME}{host}{port}/{self.database + '/' if self.database else ''}{self.name}"


def parse_address(text: str) -> Address:
    """pgvector://[USER[:PASSWORD]@][HOST[:PORT]]/[DATABASE/]NAME[?timeout=SECONDS&sslmode=…]; raises ConfigError."""
    refused = ConfigError(f"{without_secrets(text)}: {GRAMMAR}")
    try:
        parts = urlsplit(text)
        if not text.startswith(SCHEME) or parts.fragment:
            raise refused
        database, _, name = unquote(parts.path).removeprefix("/").rpartition("/")
        if _NAME.fullmatch(name) is None or "/" in database or "\0" in database:
            raise refused
        pairs = parse_qsl(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True)
        host, port = unquote(parts.hostname or ""), parts.port or 0
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
    except ValueError:  # which may repeat the password
        raise refused from None
    if any("\0" in one for one in (host, user, password)) or (password and not user):
        raise refused
    settings, timeout = dict[str, str](), DEFAULT_TIMEOUT
    for key, value in pairs:
        if key == "timeout":
            timeout = _seconds(value, refused)
        elif key not in SETTINGS or not value or "\0" in value or (key == "host" and host):
            raise refused
        else:
            settings[key] = value
    key_password = Secret(settings.pop(_SECRET_SETTINGS[0], ""))
    return Address(
        host, port, database, name, timeout, user, Secret(password), MappingProxyType(settings), key_password
    )


def _seconds(value: str, refused: ConfigError) -> float:
    try:
        seconds = float(value)
    except ValueError:
        raise refused from None
    if not 0 < seconds < 86400:
        raise refused
    return seconds
