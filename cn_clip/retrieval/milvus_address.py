"""Where a collection of Milvus is and what connects to it: an address, completed by a file and the environment."""

import os
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from cn_clip import extras
from cn_clip.digests import is_there
from cn_clip.errors import ConfigError
from cn_clip.language import both
from cn_clip.secret import NO_SECRET, Secret, without_secrets
from cn_clip.spelling import meant
from cn_clip.terminal import say

SCHEME = "milvus://"
# Those of Milvus's own `uri`.
SCHEMES = (SCHEME, "https://", "http://")
GRAMMAR = "expected milvus://HOST:PORT/COLLECTION, the name of letters, digits and _"
DEFAULT_PORT = 19530
DEFAULT_TIMEOUT = 20.0
LEVELS = ("strong", "bounded", "session", "eventually")
LITE_SUFFIX = ".db"
# Milvus Lite keeps several in one place; this is the one of an index.
LITE_COLLECTION = "cn_clip"
VARIABLE = "CN_CLIP_MILVUS_"
CONFIG_VARIABLE = f"{VARIABLE}CONFIG"

# Name -> what it is; for all but `uri` also behind the `?` of an address.
_KINDS: dict[str, type] = {
    "uri": str,
    "user": str,
    "password": Secret,
    "token": Secret,
    "database": str,
    "tls": bool,
    "ca": Path,
    "cert": Path,
    "key": Path,
    "server_name": str,
    "timeout": float,
    "consistency": str,
}
# What pymilvus calls them.
_ELSEWHERE = {
    "db_name": "database",
    "secure": "tls",
    "ca_pem_path": "ca",
    "server_pem_path": "ca",
    "client_pem_path": "cert",
    "client_key_path": "key",
    "consistency_level": "consistency",
    "username": "user",
    "api_key": "token",
}
_LOGIN, _OF_TLS = ("user", "password", "token"), ("ca", "cert", "key", "server_name")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_CLOUD = re.compile(r"\.(zillizcloud\.com|zillizcloud\.com\.cn|cloud\.zilliz\.com\.cn)$")


@dataclass(frozen=True)
class Tls:
    """How the server proves who it is, and this side too. ca: certificates it may be signed by; None: the system's.

    cert, key: of this side, in PEM. server_name: what its certificate is of, where that is not the host.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    server_name: str = ""


@dataclass(frozen=True)
class Address:
    """Where a collection is. timeout: seconds within which Milvus answers, or is given up. consistency: of reading,
    as Milvus spells it; "" leaves it to who opens it. database: "" is Milvus's default one. lite: the folder of
    Milvus Lite in place of a server."""

    host: str
    port: int
    collection: str
    timeout: float = DEFAULT_TIMEOUT
    user: str = ""
    password: Secret = NO_SECRET
    consistency: str = ""
    token: Secret = NO_SECRET
    database: str = ""
    tls: Tls | None = None
    lite: Path | None = None

    @property
    def server(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def store(self) -> str:
        """What keeps it."""
        return "Milvus"

    def __str__(self) -> str:
        if self.lite is not None:
            return str(self.lite)
        scheme = SCHEME if self.tls is None else "https://"
        return f"{scheme}{self.server}/{self.database + '/' if self.database else ''}{self.collection}"


class _Given(NamedTuple):
    """A setting and where it was found."""

    value: Any
    origin: str


class _Server(NamedTuple):
    """What stands before the path of an address or uri; host is "" in milvus:///photos."""

    host: str
    port: int
    is_tls: bool | None
    path: str
    settings: dict[str, Any]


def parse_address(text: str, config: str | None = None, *, environment: Mapping[str, str] | None = None) -> Address:
    """milvus://[USER:PASSWORD@]HOST[:PORT]/[DATABASE/]COLLECTION[?NAME=VALUE&…], or the same with https:// or http://.

    What it leaves out is taken from `config`, a TOML file, then from CN_CLIP_MILVUS_…, then from the file that
    CN_CLIP_MILVUS_CONFIG names if `config` is None. Where one of these has a `uri`, it is for that server alone; the
    address milvus:///COLLECTION takes its server from there. Raises ConfigError for anything else, and for settings
    that contradict each other.
    """
    refused = ConfigError(
        f"{without_secrets(text)}: {GRAMMAR}; before it at most a DATABASE/, after it at most "
        f"?timeout=SECONDS&consistency=LEVEL, {', '.join(LEVELS)}, or {', '.join(list(_KINDS)[1:-2])}"
    )
    try:
        typed = _server_of(text)
        database, _, name = typed.path.removeprefix("/").rpartition("/")
        if _NAME.fullmatch(name) is None or (database and _NAME.fullmatch(database) is None):
            raise refused
        if "uri" in typed.settings or (database and "database" in typed.settings):
            raise refused
        own = {key: _Given(value, "the address") for key, value in typed.settings.items()}
    except ValueError:  # which may repeat the password
        raise refused from None
    if database:
        own["database"] = _Given(database, "the address")
    server, settings = typed, own
    for source in _sources(config, os.environ if environment is None else environment):
        given = source.get("uri")
        if given is not None:
            there, inner = _server_in(given)
            is_same = server.host == there.host and (
                _port(server) == _port(there) or (not server.port and server.is_tls is None)
            )
            if server.host and not is_same:
                continue
            if there.is_tls is not None:
                if "tls" in source and source["tls"].value != there.is_tls:
                    raise ConfigError(f"{source['tls'].origin}: contradicts {given.origin}; leave it out")
                inner["tls"] = _Given(there.is_tls, given.origin)
            server = server._replace(host=there.host, port=server.port or _port(there))
            source = {**inner, **source}
        settings = _completed(settings, source)
    if not server.host:
        raise ConfigError(
            f"{without_secrets(text)}: names no server; write milvus://HOST:PORT/{name}, or give its uri in "
            f"{VARIABLE}URI or in a file of settings"
        )
    return _address(text, server, name, settings)


def _completed(first: dict[str, _Given], second: dict[str, _Given]) -> dict[str, _Given]:
    """Both, the first before the second; a password goes with the user whom it was given for."""
    left_out = set[str]()
    if "password" in first or "token" in first:
        left_out = set(_LOGIN)
    elif "user" in first:
        user = second.get("user")
        is_other = user is not None and user.value != first["user"].value
        left_out = set(_LOGIN) if is_other else {"user", "token"}
    return {**{name: one for name, one in second.items() if name not in left_out}, **first}


def _port(server: _Server) -> int:
    is_cloud = _CLOUD.search(server.host) is not None
    return server.port or (443 if server.is_tls or (is_cloud and server.is_tls is None) else DEFAULT_PORT)


def _address(text: str, server: _Server, name: str, settings: dict[str, _Given]) -> Address:
    values = {key: given.value for key, given in settings.items()}
    where = without_secrets(text)

    def contradiction(one: str, other: str, why: str) -> ConfigError:
        pair = " and ".join(f"{key} ({settings[key].origin})" for key in (one, other) if key in settings)
        return ConfigError(f"{where}: {pair}: {why}")

    if values.get("token") and ("user" in values or values.get("password")):
        raise contradiction("token", "user" if "user" in values else "password", "one login is enough; leave one out")
    if bool(values.get("user")) != bool(values.get("password")):
        one = "user" if values.get("user") else "password"
        raise contradiction(one, one, f"needs a {'password' if one == 'user' else 'user'} too")
    is_cloud = _CLOUD.search(server.host) is not None
    tls = server.is_tls if server.is_tls is not None else values.get("tls", is_cloud)
    if "tls" in values and values["tls"] != tls:
        raise contradiction("tls", "tls", f"the address says {'https' if tls else 'http'}; leave one out")
    for key in _OF_TLS:
        if key in values and not tls:
            raise contradiction(key, "tls", "is for TLS; write https:// in place of milvus://, or tls=true")
    if is_cloud and not tls:
        raise ConfigError(f"{where}: Zilliz Cloud takes TLS alone; leave http:// and tls=false out")
    for one, other in (("cert", "key"), ("key", "cert"), ("cert", "ca")):
        if one in values and other not in values:
            raise contradiction(one, one, f"needs {other} too")
    for key in ("ca", "cert", "key"):
        if key in values and not is_there(values[key]):
            raise contradiction(key, key, f"there is no file {values[key]}")
    return Address(
        server.host,
        _port(server),
        name,
        values.get("timeout", DEFAULT_TIMEOUT),
        values.get("user", ""),
        values.get("password", NO_SECRET),
        values.get("consistency", ""),
        values.get("token", NO_SECRET),
        values.get("database", ""),
        Tls(**{key: values[key] for key in _OF_TLS if key in values}) if tls else None,
    )


def lite_address(folder: Path) -> Address:
    """The collection in a folder of Milvus Lite."""
    return Address("", 0, LITE_COLLECTION, lite=folder)


def is_lite(path: Path) -> bool:
    """Whether Milvus Lite keeps its collections there, or is to: a name with .db where nothing is yet.

    Raises ConfigError for a file of such a name.
    """
    if path.is_dir():
        return (path / "collections").is_dir() and (path / "LOCK").exists()
    if path.suffix != LITE_SUFFIX or not os.path.basename(path):
        return False
    if os.path.lexists(path):
        raise ConfigError(
            f"{path}: is a file; Milvus Lite keeps a folder there since its version 3; give another name, or copy the "
            "collection with the version that made it"
        )
    return True


def _server_of(text: str) -> _Server:
    """Raises ValueError for what is no address."""
    parts = urlsplit(text)
    if f"{parts.scheme}://" not in SCHEMES or parts.fragment or not text[len(parts.scheme) :].startswith("://"):
        raise ValueError
    pairs = parse_qs(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True)
    settings = {name: _value(name, values[-1], "the address") for name, values in pairs.items()}
    for name, value in (("user", parts.username), ("password", parts.password)):
        if value is not None:
            settings[name] = _value(name, unquote(value), "the address")
    if not parts.netloc and not parts.path.strip("/"):
        raise ValueError
    if parts.netloc and not parts.hostname:
        raise ValueError
    if parts.port == 0:
        raise ValueError
    is_tls = None if parts.scheme == "milvus" else parts.scheme == "https"
    return _Server(parts.hostname or "", parts.port or 0, is_tls, parts.path, settings)


def _server_in(given: _Given) -> tuple[_Server, dict[str, _Given]]:
    """Of a `uri`, and the settings in it."""
    try:
        server = _server_of(given.value if "://" in given.value else f"{SCHEME}{given.value}")
        database = server.path.strip("/")
        if not server.host or (database and _NAME.fullmatch(database) is None):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{given.origin}: expected https://HOST:PORT or http://HOST:PORT, got {without_secrets(given.value)}"
        ) from None
    values = server.settings | ({"database": database} if database else {})
    return server, {key: _Given(value, given.origin) for key, value in values.items()}


def _sources(config: str | None, environment: Mapping[str, str]) -> list[dict[str, _Given]]:
    """The settings besides those of the address, in their order of precedence."""
    found = dict[str, _Given]()
    for variable, value in environment.items():
        name = variable.removeprefix(VARIABLE).lower()
        if not variable.startswith(VARIABLE) or variable == CONFIG_VARIABLE or not value:
            continue
        if name not in _KINDS:
            known = [f"{VARIABLE}{one.upper()}" for one in (*_KINDS, "config")]
            raise ConfigError(f"{variable}: is no setting{_meant(variable, known)}")
        found[name] = _Given(_value(name, value, variable), variable)
    if config is not None:
        return [_read(Path(config)), found]
    named = environment.get(CONFIG_VARIABLE)
    return [found, _read(Path(named))] if named else [found]


def _read(path: Path) -> dict[str, _Given]:
    """The settings of a TOML file; files that it names lie beside it. Raises ConfigError."""
    toml: Any = extras.require(
        "tomllib" if sys.version_info >= (3, 11) else "tomli", extra="milvus", purpose="a file of settings"
    )
    try:
        with open(path, "rb") as file:
            values, mode = toml.load(file), os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise ConfigError(f"{path}: the settings cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # which says where, and not what stands there
        where = re.search(r"line \d+", str(error))
        raise ConfigError(
            f"{path}: is no TOML{f', see {where[0]}' if where else ''}; write lines as timeout = 20"
        ) from None
    found = dict[str, _Given]()
    for name, value in values.items():
        origin = f"{path}: {name}"
        if name not in _KINDS:
            raise ConfigError(f"{origin}: is no setting{_meant(name, _KINDS)}")
        read = _value(name, value, origin)
        found[name] = _Given(path.parent / read if isinstance(read, Path) else read, origin)
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH) and _has_secret(found):
        _warn_of(path, mode)
    return found


def _has_secret(settings: Mapping[str, _Given]) -> bool:
    uri = settings.get("uri")
    return bool({"password", "token"} & set(settings)) or (uri is not None and without_secrets(uri.value) != uri.value)


_warned = set[Path]()


def _warn_of(path: Path, mode: int) -> None:
    """Says once in a process that others can read a password."""
    if path not in _warned:
        _warned.add(path)
        say(
            both(
                f"注意：{path} 里有密码或令牌，而本机其他用户可以读它（{stat.filemode(mode)}）；请运行 "
                f"chmod 600 {path}",
                f"warning: {path} holds a password or token, and other users of this machine can read it "
                f"({stat.filemode(mode)}); run: chmod 600 {path}",
            ),
            to=sys.stderr,
        )


def _meant(name: str, known: Any) -> str:
    elsewhere = _ELSEWHERE.get(name.removeprefix(VARIABLE).lower())
    if elsewhere is not None:
        return f"; did you mean {next(one for one in known if one.removeprefix(VARIABLE).lower() == elsewhere)!r}?"
    return meant(name, known) or f"; known are {', '.join(known)}"


def _value(name: str, value: Any, origin: str) -> Any:
    """A setting as it is used; raises ConfigError, without what was given where that is secret."""
    kind = _KINDS.get(name)
    if kind is None:
        raise ValueError
    if kind is float:
        with_number = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        try:
            seconds = float(value) if with_number else -1.0
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < 86400:
            raise ConfigError(f"{origin}: expected seconds, above 0 and below 86400, got {value!r}")
        return seconds
    if kind is bool:
        word = str(value).lower()
        if word not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigError(f"{origin}: expected true or false, got {value!r}")
        return word in ("true", "1", "yes")
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{origin}: expected a text that is not empty")
    if name == "consistency":
        if value.lower() not in LEVELS:
            raise ConfigError(f"{origin}: expected one of {', '.join(LEVELS)}, got {value!r}")
        return value.capitalize()
    if name == "database" and _NAME.fullmatch(value) is None:
        raise ConfigError(f"{origin}: expected a name of letters, digits and _, got {value!r}")
    return Path(value).expanduser() if kind is Path else kind(value)
