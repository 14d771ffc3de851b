"""Connects to Milvus: a server that comes up is waited for, what waiting cannot mend is said at once.

`milvus_collection` uses it. gRPC says of each failure only that it failed, so the first bytes are exchanged here.
"""

import contextlib
import logging
import re
import socket
import ssl
import time
import urllib.request
import weakref
from typing import Any

from cn_clip import extras
from cn_clip.errors import AwayError, ConfigError, StoreError
from cn_clip.retrieval.milvus_address import Address, Tls

RETRY_PAUSE = 0.5
OLDEST = (2, 3)
_NO_CONNECTION, _NO_DATABASE = 2, 800
# What opens a connection of HTTP/2, which gRPC is, with a frame of settings; the other side begins with one as well.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"
_FRAME_BYTES, _SETTINGS = 9, 4
_CLOSED = "it closed the connection"


class _NotYetError(Exception):
    """What may be over in a moment, in words."""


def connect(address: Address, package: Any, grpc: Any) -> Any:
    """A client of a server that answers, of the module `package`; raises StoreError, ConfigError.

    AwayError: within the address's timeout none did.
    """
    # It logs tracebacks of what it raises as well.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    if address.lite is not None:
        return package.MilvusClient(uri=_lite_uri(address), timeout=address.timeout)
    context, deadline = (
        None if address.tls is None else _context(address, address.tls),
        time.monotonic() + address.timeout,
    )
    while True:
        left = max(deadline - time.monotonic(), RETRY_PAUSE)
        try:
            _greet(address, context, left)
            return _client(address, package, left)
        except _NotYetError as error:
            reason = str(error)
        except (grpc.RpcError, package.MilvusException) as error:
            if not is_away(error, grpc):
                raise refusal(error, address, grpc) from error
            reason = reason_of(error)
        if time.monotonic() + RETRY_PAUSE > deadline:
            raise away(address, reason)
        time.sleep(RETRY_PAUSE)


def _client(address: Address, package: Any, timeout: float) -> Any:
    more: dict[str, Any] = {}
    tls = address.tls
    if tls is not None:
        ca = str(tls.ca or ssl.get_default_verify_paths().cafile or "")
        if tls.cert is None:
            more["server_pem_path"] = ca
        else:
            more |= {"ca_pem_path": ca, "client_pem_path": str(tls.cert), "client_key_path": str(tls.key)}
        # Others of this process are shared by address and login alone, whatever they know of TLS.
        more |= {"secure": True, "server_name": tls.server_name, "dedicated": True}
    client = package.MilvusClient(
        uri=f"{'http' if tls is None else 'https'}://{address.server}",
        user=address.user,
        password=address.password.reveal(),
        token=address.token.reveal(),
        db_name=address.database,
        timeout=timeout,
        **more,
    )
    return client


def closing_with(owner: object, client: Any, address: Address) -> None:
    """Closes a connection of one owner when nobody holds the owner any more."""
    if address.tls is not None:
        weakref.finalize(owner, client.close)


# --- the first bytes


def _context(address: Address, tls: Tls) -> ssl.SSLContext:
    """Raises ConfigError for files that are no certificates, or no key of theirs."""
    try:
        context = ssl.create_default_context(cafile=tls.ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{address}: ca {tls.ca}: expected certificates in PEM ({_first_line(error)})") from error
    if tls.cert is not None:
        try:
            context.load_cert_chain(tls.cert, tls.key, password=lambda: "")  # which would else be asked for
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{address}: cert {tls.cert} and key {tls.key}: expected a certificate in PEM and its key, without a "
                f"password ({_first_line(error)})"
            ) from error
    context.set_alpn_protocols(["h2"])
    return context


def _greet(address: Address, context: ssl.SSLContext | None, timeout: float) -> None:
    """Exchanges the first bytes; raises _NotYetError, and StoreError for what waiting cannot mend."""
    if {"grpc", "https", "http"} & set(urllib.request.getproxies()) and not urllib.request.proxy_bypass(address.host):
        return  # gRPC goes through a proxy
    begun = _exchanged(address, context, timeout)
    if len(begun) >= _FRAME_BYTES and begun[3] == _SETTINGS:
        return
    if begun.startswith((b"HTTP/", b"<!DOCTYP", b"<html")):  # Python's own gives some refusals without a head
        raise StoreError(
            "an HTTP server answers there, not Milvus, whose port is 19530 unless it was changed; give its port",
            at=address,
        )
    if begun:
        raise StoreError("what answers there is not Milvus; check the host and the port", at=address)
    if context is None and _wants_tls(address, timeout):
        raise StoreError("the server wants TLS; write https:// in place of milvus://", at=address)
    raise _NotYetError(_CLOSED)


def _exchanged(address: Address, context: ssl.SSLContext | None, timeout: float) -> bytes:
    """What the server begins with, b"" where it closes the connection."""
    begun, deadline = b"", time.monotonic() + timeout
    try:
        with contextlib.ExitStack() as open_ones:
            bare = open_ones.enter_context(socket.create_connection((address.host, address.port), timeout))
            connection = bare
            if context is not None and address.tls is not None:
                name = address.tls.server_name or address.host
                connection = open_ones.enter_context(context.wrap_socket(bare, server_hostname=name))
            connection.sendall(_PREFACE)
            while len(begun) < _FRAME_BYTES:
                connection.settimeout(max(deadline - time.monotonic(), 0.01))
                part = connection.recv(_FRAME_BYTES)
                if not part:
                    break
                begun += part
    except ssl.SSLCertVerificationError as error:
        raise StoreError(
            f"the certificate of the server is not accepted ({error.verify_message}); give the certificate that signed "
            "it as ca, or as server_name the name that it is of",
            at=address,
        ) from error
    except ssl.SSLEOFError as error:
        raise _NotYetError(_CLOSED) from error
    except ssl.SSLError as error:
        raise _tls_refusal(error, address) from error
    except socket.gaierror as error:
        raise _NotYetError(f"the name {address.host} is not known") from error
    except TimeoutError as error:
        raise _NotYetError("no answer") from error
    except ConnectionRefusedError as error:
        raise _NotYetError("connection refused: nothing listens on that port") from error
    except OSError as error:
        if begun:
            return begun
        if isinstance(error, (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)):
            return b""
        raise _NotYetError(error.strerror or str(error)) from error
    return begun


def _tls_refusal(error: ssl.SSLError, address: Address) -> StoreError:
    reason = (error.reason or str(error)).replace("_", " ").lower()
    if "alert" in reason and ("certificate" in reason or "unknown ca" in reason or "handshake failure" in reason):
        if address.tls is not None and address.tls.cert is not None:
            return StoreError(
                f"the server does not accept cert ({reason}); give one that its authority has signed", at=address
            )
        return StoreError(
            f"the server wants a certificate of this side ({reason}); give one that its authority has signed as cert "
            "and key",
            at=address,
        )
    if "wrong version number" in reason or "record layer failure" in reason:
        return StoreError(
            "the server speaks no TLS there; write milvus:// in place of https://, and leave tls out", at=address
        )
    return StoreError(f"the TLS handshake failed ({reason}); check which TLS the server speaks", at=address)


def _wants_tls(address: Address, timeout: float) -> bool:
    """Whether a server that closes plain connections answers a TLS handshake."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection((address.host, address.port), timeout) as bare, context.wrap_socket(bare):
            return True
    except ssl.SSLEOFError:
        return False
    except ssl.SSLError as error:
        return "alert" in (error.reason or "").lower()
    except OSError:
        return False


# --- what a client says


def is_away(error: BaseException, grpc: Any) -> bool:
    """Whether no server answered, not in time, or not yet."""
    if _code(error, grpc) in ("UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED") or _is_tls(error):
        return False
    if isinstance(error, grpc.RpcError):
        return _code(error, grpc) in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
    if getattr(error, "code", None) == _NO_CONNECTION:
        return not _is_login(error)
    name = getattr(getattr(error, "code", None), "name", "")
    return name in ("DEADLINE_EXCEEDED", "UNAVAILABLE") or "timeout" in reason_of(error).lower()


def away(address: Address, reason: str) -> AwayError:
    """No server answered within the timeout."""
    return AwayError(
        f"Milvus did not answer within {address.timeout:g} s ({reason}); check that it runs there, or give it more "
        "time with ?timeout=SECONDS after the address",
        at=address,
    )


def refusal(error: BaseException, address: Address, grpc: Any) -> StoreError:
    """What a server that answers means."""
    reason, login = reason_of(error), address.user or address.token
    if _is_login(error) or _code(error, grpc) == "UNAUTHENTICATED":
        if not login:
            return StoreError(
                "the server wants a login; give CN_CLIP_MILVUS_USER and CN_CLIP_MILVUS_PASSWORD, or "
                "CN_CLIP_MILVUS_TOKEN",
                at=address,
            )
        if address.token:
            return StoreError("the server does not accept the token; correct it", at=address)
        return StoreError(
            f"the server does not accept the user {address.user!r} or the password; correct it", at=address
        )
    if _code(error, grpc) == "PERMISSION_DENIED" or "permission deny" in reason.lower():
        return StoreError(f"the login may not do that on this server ({reason}); have it granted", at=address)
    if getattr(error, "code", None) == _NO_DATABASE or "database not found" in reason:
        return StoreError(
            f"the server has no database {address.database or 'default'!r}; make it there, or name another", at=address
        )
    if _code(error, grpc) == "UNIMPLEMENTED":
        return StoreError(
            f"what answers there does not know what is asked ({reason}); expected Milvus {OLDEST[0]}.{OLDEST[1]} or "
            "later",
            at=address,
        )
    if _is_tls(error):
        return StoreError(f"the TLS handshake failed ({reason}); check ca and server_name", at=address)
    return StoreError(f"Milvus refused the request ({reason})", at=address)


def too_old(client: Any, timeout: float) -> str:
    """The version of a server that is older than what is asked of it, else ""."""
    try:
        version = str(client.get_server_version(timeout=timeout))
    except Exception:  # it has just failed otherwise, which is what is told
        return ""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return version if found and (int(found[1]), int(found[2])) < OLDEST else ""


def _causes(error: BaseException) -> list[BaseException]:
    found, one = list[BaseException](), error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__  # type: ignore[assignment]
    return found


def _code(error: BaseException, grpc: Any) -> str:
    """The name of gRPC's status, wherever in the chain it is."""
    for one in _causes(error):
        if isinstance(one, grpc.RpcError):
            return str(getattr(one.code(), "name", ""))
    return ""


def _details(error: BaseException) -> str:
    return " ".join(str(details()) for one in _causes(error) if callable(details := getattr(one, "details", None)))


def _is_login(error: BaseException) -> bool:
    text = f"{_details(error)} {getattr(error, 'message', '')}".lower()
    return "auth check failure" in text or "missing authorization" in text or "unauthenticated" in text


def _is_tls(error: BaseException) -> bool:
    return "tls handshake failed" in _details(error).lower()


def reason_of(error: BaseException) -> str:
    """One line of at most 200 letters."""
    message = getattr(error, "message", "") or ""
    if getattr(error, "code", None) == _NO_CONNECTION or not message:
        message = _details(error) or message or str(error)
    return _first_line(message)


def _first_line(text: object) -> str:
    return (str(text).splitlines() or ["no details"])[0][:200]


# --- Milvus Lite


class _Kept(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _lite_uri(address: Address) -> str:
    """Where Milvus Lite listens in this process for what is in the folder; raises StoreError, MissingExtraError."""
    manager = extras.require("milvus_lite.server_manager", extra="milvus-lite", purpose="an index in Milvus Lite")
    assert address.lite is not None
    # Its server logs a traceback for each call that it has not, such as one of every client's beginning.
    logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
    logger, handler = logging.getLogger("milvus_lite"), _Kept()
    logger.propagate = False  # tracebacks of what is told below
    logger.addHandler(handler)
    try:
        uri = manager.server_manager_instance.start_and_get_uri(str(address.lite))
    finally:
        logger.removeHandler(handler)
    if uri is not None:
        return str(uri)
    cause = next((one.exc_info[1] for one in handler.records if one.exc_info), None)
    if type(cause).__name__ == "DataDirLockedError":
        raise StoreError(
            "another process has it open, and Milvus Lite is for one at a time; end that one, or use a folder or a "
            "server",
            at=address,
        ) from cause
    raise StoreError(f"Milvus Lite cannot open it ({_first_line(cause)})", at=address) from cause
