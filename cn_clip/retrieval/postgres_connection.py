"""Connects to Postgres: a server that comes up is waited for, and whatever goes wrong is one sentence.

`postgres_table` uses it.
"""

import contextlib
import re
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from cn_clip import extras
from cn_clip.errors import AwayError, StoreError
from cn_clip.retrieval.postgres_address import Address
from cn_clip.secret import hidden_in

RETRY_PAUSE = 0.5
OLDEST_PGVECTOR = (0, 8)
# Seconds that the client waits longer than the server, whose own sentence is better.
_MARGIN = 1.0

# Of connecting, libpq gives no code but a sentence, in English where the client is meant.
_NOT_YET = re.compile(
    r"connection refused|timeout expired|no route to host|network is unreachable|could not translate host name|"
    r"failed to resolve host|temporary failure|name or service not known|closed the connection unexpectedly|"
    r"connection reset|starting up|shutting down|not yet accepting|recovery mode|too many clients|"
    r"remaining connection slots|no such file or directory|is the server running|connection timeout",
    re.I,
)
# SQLSTATEs of what may be over in a moment.
_TOOK_TOO_LONG = "57014"
_AWAY_STATES = ("57P01", "57P02", "57P03", "53300", _TOOK_TOO_LONG)


def packages() -> tuple[Any, Any]:
    """psycopg and what teaches it vectors; raises MissingExtraError."""
    purpose = "an index in Postgres"
    psycopg = extras.require("psycopg", extra="pgvector", purpose=purpose)
    return psycopg, extras.require("pgvector.psycopg", extra="pgvector", purpose=purpose)


class LostError(AwayError):
    """The connection was lost, and what was asked may have been done or not."""


class Limit:
    """How long the client waits for an answer, in seconds; None waits for any time."""

    def __init__(self, seconds: float) -> None:
        self.seconds: float | None = seconds


def connect(address: Address, psycopg: Any) -> Any:
    """A connection that commits each statement by itself; raises StoreError.

    AwayError: within the address's timeout no server answered. Its `limit` is a `Limit`.
    """
    deadline = time.monotonic() + address.timeout
    while True:
        left = max(deadline - time.monotonic(), RETRY_PAUSE)
        try:
            connection = psycopg.connect(**_settings(address, left), autocommit=True)
            connection.limit = Limit(address.timeout + _MARGIN)
            connection.wait = _limited(connection.wait, connection.limit)
        except psycopg.Error as error:
            if not _is_away(error, psycopg):
                raise refusal(error, address, psycopg) from error
            reason = reason_of(error)
        else:
            return connection
        if time.monotonic() + RETRY_PAUSE > deadline:
            raise away(address, reason)
        time.sleep(RETRY_PAUSE)


def _settings(address: Address, timeout: float) -> dict[str, Any]:
    given = {
        "host": address.host,
        "port": address.port,
        "dbname": address.database,
        "user": address.user,
        "password": address.password.reveal(),
        "sslpassword": address.key_password.reveal(),
        **address.settings,
    }
    return {
        "fallback_application_name": "cn-clip",
        "connect_timeout": max(2, round(timeout)),
        **{name: value for name, value in given.items() if value},
    }


def _limited(wait: Callable[..., Any], limit: Limit) -> Callable[..., Any]:
    """psycopg's own wait, given up after a while: a server that hangs answers no timeout of its own."""

    def within(steps: Generator[Any, Any, Any], *args: Any, **options: Any) -> Any:
        until = None if limit.seconds is None else time.monotonic() + limit.seconds
        return wait(_until(steps, until), *args, **options)

    return within


def _until(steps: Generator[Any, Any, Any], deadline: float | None) -> Generator[Any, Any, Any]:
    """The steps of psycopg, which asks for the next one several times a second even if nothing comes."""
    try:
        wanted = next(steps)
        while True:
            ready = yield wanted
            if not ready and deadline is not None and time.monotonic() > deadline:
                steps.close()
                raise TimeoutError("no answer")
            wanted = steps.send(ready)
    except StopIteration as end:
        return end.value


@contextlib.contextmanager
def answering(address: Address, psycopg: Any) -> Iterator[None]:
    """Makes one sentence of whatever goes wrong inside."""
    try:
        yield
    except TimeoutError as error:
        raise away(address, str(error)) from error
    except psycopg.Error as error:
        if not _is_away(error, psycopg):
            raise refusal(error, address, psycopg) from error
        told = away(address, reason_of(error))
        if error.sqlstate == _TOOK_TOO_LONG:
            raise told from error
        raise LostError(told.sentence, at=address) from error


def _is_away(error: Any, psycopg: Any) -> bool:
    """Whether no server answered, not in time, or not yet."""
    if error.sqlstate is not None:
        return error.sqlstate in _AWAY_STATES or error.sqlstate.startswith("08")
    text = str(error)
    if re.search("password|certificate|SSL (error|is not)|does not support SSL", text, re.I):
        return False
    if _NOT_YET.search(text):
        return True
    # Of a connection that was open: it was lost.
    connection = getattr(error, "pgconn", None)
    return isinstance(error, psycopg.OperationalError) and connection is None and "FATAL" not in text


def away(address: Address, reason: str) -> AwayError:
    """No server answered within the timeout."""
    return AwayError(
        f"Postgres did not answer within {address.timeout:g} s ({reason}); check that it runs there, or give it more "
        "time with ?timeout=SECONDS after the address",
        at=address,
    )


def refusal(error: Any, address: Address, psycopg: Any) -> StoreError:
    """What a server that answers means."""
    reason, state = reason_of(error), error.sqlstate or ""
    text = str(error)
    if state in ("28P01", "28000") or "authentication failed" in text or "no password supplied" in text:
        if "no password supplied" in text:
            return StoreError("the server wants a password; give it as PGPASSWORD or in ~/.pgpass", at=address)
        return StoreError(f"the server does not accept the user or the password ({reason}); correct it", at=address)
    if "pg_hba.conf" in text:
        return StoreError(
            f"the server does not let this user in from here ({reason}); give another user or sslmode, or have it "
            "allowed in pg_hba.conf",
            at=address,
        )
    if state == "3D000" or ("database" in text and "does not exist" in text):
        return StoreError(f"the server has no such database ({reason}); make it there, or name another", at=address)
    if "role" in text and "does not exist" in text:
        return StoreError(f"the server has no such user ({reason}); make it there, or name another", at=address)
    if state == "42501":
        return StoreError(f"the user may not do that in this database ({reason}); have it granted", at=address)
    if re.search("SSL|certificate", text):
        return StoreError(f"TLS to the server failed ({reason}); check sslmode and sslrootcert", at=address)
    if not state and not isinstance(error, psycopg.OperationalError):
        return StoreError(f"the settings of libpq are faulty ({reason}); correct them", at=address)
    return StoreError(f"Postgres refused the request ({reason})", at=address)


def reason_of(error: BaseException) -> str:
    """One line of at most 200 letters, without passwords."""
    lines = [one.strip() for one in str(error).splitlines() if one.strip()]
    last = next((one for one in lines if "failed: " in one), lines[0] if lines else "no details")
    return hidden_in(last.rpartition("failed: ")[2] if "connection" in last else last)[:200]
