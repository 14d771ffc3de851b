"""Uvicorn as the service needs it: bounded connections, and an end that waits for requests but not for streams."""

import asyncio
import contextlib
import copy
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cn_clip.serve.limits import LOG_TIME, MAX_CONNECTIONS, Limits
from cn_clip.serve.refusals import RefusalError

if TYPE_CHECKING:
    from fastapi import FastAPI

# Seconds for what follows the drain.
END_SECONDS = 2


class Server(uvicorn.Server):
    """Ends at SIGTERM or SIGINT with status 0: that is what it was told, and what was in hand is done.

    `app.state.stopping` is set before the connections are waited for. end: called by a thread of its own when the end
    takes `END_SECONDS` longer than the drain may, because another thread waits for what does not come: a disk, a store.
    """

    def __init__(
        self,
        app: "FastAPI",
        limits: Limits,
        *,
        drain_timeout: float = 30,
        access_log: bool = False,
        end: Callable[[], None] | None = None,
    ) -> None:
        drain_seconds = math.ceil(drain_timeout)
        super().__init__(
            uvicorn.Config(
                app,
                http=_protocol(limits.timeout),
                ws="none",
                log_config=_logs(),
                access_log=access_log,
                server_header=False,
                timeout_graceful_shutdown=drain_seconds,
            )
        )
        self._stopping: asyncio.Event = app.state.stopping
        self._watch: threading.Timer | None = None
        if end is not None:
            self._watch = threading.Timer(drain_seconds + END_SECONDS, end)
            self._watch.daemon = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends event streams, waits for the other requests, and closes the application."""
        self._stopping.set()
        if self._watch is not None:
            self._watch.start()
        await super().shutdown(sockets)
        if self.server_state.tasks:  # cancelled, and about to say so to their clients
            await asyncio.wait(self.server_state.tasks, timeout=END_SECONDS / 2)

    def ended(self) -> None:
        """All threads have ended: `end` is not called any more."""
        if self._watch is not None:
            self._watch.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own raises each signal once more at the end, which kills the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in handlers.items():
                signal.signal(one, handler)


def _logs() -> dict[str, Any]:
    """Uvicorn's logs, each line with its time."""
    logs = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    for formatter in logs["formatters"].values():
        formatter.update(fmt=f"%(asctime)s {formatter['fmt']}", datefmt=LOG_TIME)
    return logs


def _protocol(head_timeout: float) -> type[asyncio.Protocol]:
    """HTTP by h11, which unlike httptools bounds the size of a head.

    At most `MAX_CONNECTIONS` are open; one more is answered 503. One whose head is not whole `head_timeout` seconds
    after the first byte, or after a new connection was made, is closed; uvicorn closes those idle between requests.
    """

    class Protocol(H11Protocol):
        head_deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.write(_TOO_MANY)
                transport.close()
            else:
                self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_watch()
            super().connection_lost(exc)

        def _watch_head(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._end_watch()
            elif self.head_deadline is None:
                self.head_deadline = self.loop.call_later(head_timeout, self.timeout_keep_alive_handler)

        def _end_watch(self) -> None:
            if self.head_deadline is not None:
                self.head_deadline.cancel()
                self.head_deadline = None

    return Protocol


def _too_many() -> bytes:
    message = "too many connections at a time; ask again later"
    response = RefusalError(503, message, code="busy", retry_after=1).response()
    head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n" + head + b"\r\n" + bytes(response.body)


_TOO_MANY = _too_many()
