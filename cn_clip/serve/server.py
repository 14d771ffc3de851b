"""A server from its settings to its end: the model and the index opened, and uvicorn as the service needs it.

Connections are bounded, and the end waits for requests.
"""

import asyncio
import contextlib
import copy
import gc
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from cn_clip import progress, terminal
from cn_clip.clip.choice import Choice
from cn_clip.clip.opening import precision_of
from cn_clip.errors import ConfigError
from cn_clip.language import both
from cn_clip.serve import page
from cn_clip.serve.access import LEAST_KEY_CHARS, LOOPBACK, Access, Hosts, is_weak
from cn_clip.serve.app import create_app
from cn_clip.serve.batching import Metrics
from cn_clip.serve.immich import SecondServer
from cn_clip.serve.limits import API_KEY_VARIABLE, LOG_TIME, MAX_CONNECTIONS, Limits
from cn_clip.serve.opening import open_all, read_label_sets
from cn_clip.serve.runner import Runner
from cn_clip.serve.schemas import RefusalError
from cn_clip.serve.service import Service
from cn_clip.serve.token_table import read_token_table

SWITCH_SECONDS = 0.001
# Seconds for what follows the drain.
END_SECONDS = 2


class Server(uvicorn.Server):
    """Ends at SIGTERM or SIGINT with status 0: that is what it was told, and what was in hand is done.

    end: called by a thread of its own when the end takes `END_SECONDS` longer than the drain may, because another
    thread waits for what does not come: a disk, a store. hung_up: called at SIGHUP, unless that says that the terminal
    was closed in which the server was started: it ends with it.
    """

    def __init__(
        self,
        app: FastAPI,
        limits: Limits,
        *,
        drain_timeout: float = 30,
        access_log: bool = False,
        end: Callable[[], None] | None = None,
        hung_up: Callable[[], None] | None = None,
    ) -> None:
        drain_seconds = math.ceil(drain_timeout)
        logs = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
        for formatter in logs["formatters"].values():  # each line with its time
            formatter.update(fmt=f"%(asctime)s {formatter['fmt']}", datefmt=LOG_TIME)
        super().__init__(
            uvicorn.Config(
                app,
                http=_protocol(limits.timeout),
                ws="none",
                log_config=logs,
                access_log=access_log,
                server_header=False,
                timeout_graceful_shutdown=drain_seconds,
            )
        )
        self._hung_up, self._had_terminal = hung_up, _has_terminal()
        self._watch: threading.Timer | None = None
        if end is not None:
            self._watch = threading.Timer(drain_seconds + END_SECONDS, end)
            self._watch.daemon = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for the requests in hand, and closes the application."""
        if self._watch is not None:
            self._watch.start()
        await super().shutdown(sockets)
        if self.server_state.tasks:  # cancelled, and about to say so to their clients
            await asyncio.wait(self.server_state.tasks, timeout=END_SECONDS / 2)

    def ended(self) -> None:
        """All threads have ended: `end` is not called any more."""
        if self._watch is not None:
            self._watch.cancel()

    def _handle_hangup(self, number: int, frame: FrameType | None) -> None:
        if self._had_terminal and not _has_terminal():
            self.handle_exit(number, frame)
        elif self._hung_up is not None:
            self._hung_up()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own raises each signal once more at the end, which kills the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Any] = {
            one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)
        }
        if self._hung_up is not None and hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._handle_hangup)
        try:
            yield
        finally:
            for one, handler in handlers.items():
                signal.signal(one, handler)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except (OSError, AttributeError):  # none, or Windows
        return False
    return True


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


_busy = RefusalError(503, "too many connections at a time; ask again later", code="busy", retry_after=1).response()
_TOO_MANY = b"".join(
    [
        b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n",
        *(b"%s: %s\r\n" % header for header in _busy.raw_headers),
        b"\r\n",
        bytes(_busy.body),
    ]
)


# --- from the settings to its end


def launch(
    chosen: Choice,
    limits: Limits,
    *,
    model: str | None,
    name: str | None,
    index_addresses: Sequence[str],
    milvus_config: str | None,
    label_sets: Sequence[Path],
    token_table: Path | None,
    immich_forward: str | None,
    host: str,
    port: int,
    allowed_hosts: Sequence[str],
    api_key: str | None,
    cors_origins: Sequence[str],
    root_path: str,
    with_page: bool,
    with_originals: bool,
    access_log: bool,
    drain_timeout: float,
) -> None:
    """Serves until it is told to stop; raises CnClipError for what cannot be opened.

    chosen: how the model is computed. model: None for that of the index, or the default. name: of it in requests.
    api_key: without one, only `allowed_hosts` and names of this machine are answered. cors_origins, root_path: as of
    `Access`. with_page: mounts the web page too. with_originals: the files of the items are given. drain_timeout: as
    of `Server`.
    """
    if chosen.backend != "auto":
        chosen = replace(chosen, precision=precision_of(chosen))
    access = Access(Hosts(host, allowed_hosts), api_key=api_key, origins=cors_origins, root_path=root_path)
    metrics = Metrics()
    runners, collections = open_all(
        index_addresses,
        chosen=chosen,
        limits=limits,
        model=model,
        name=name,
        metrics=metrics,
        milvus_config=milvus_config,
    )
    service = Service(
        runners,
        limits,
        collections,
        label_sets=read_label_sets(label_sets),
        with_originals=with_originals,
        token_table=None if token_table is None else read_token_table(token_table),
        root_path=root_path,
    )
    second = None if immich_forward is None else SecondServer(immich_forward, limits)
    app = create_app(service, metrics, access=access, second=second)
    _warn(host, api_key)
    with listen(host, port) as listener:
        given_host, given_port = listener.getsockname()[:2]
        address = f"http://{f'[{given_host}]' if ':' in given_host else given_host}:{given_port}"
        _say(both(f"正在打开 {_names(runners)}；{address}", f"opening {_names(runners)}; {address}"))
        if with_page:
            page.mount(app)
            _say(both(f"网页：{address}{root_path}/", f"web page: {address}{root_path}/"))
        server = Server(
            app,
            limits,
            drain_timeout=drain_timeout,
            access_log=access_log,
            end=lambda: _end(runners),
            hung_up=collections.look,
        )
        # The event loop waits so long for a thread that goes through a large picture's base64; by default 5 ms.
        sys.setswitchinterval(SWITCH_SECONDS)
        with progress.resting():
            asyncio.run(_serve(server, runners, listener))
        server.ended()
        for runner in runners:
            if runner.failure is not None:
                raise runner.failure


def _names(runners: Sequence[Runner]) -> str:
    return ", ".join(runner.name for runner in runners)


def _end(runners: Sequence[Runner]) -> None:
    """Ends the process, whatever its threads wait for."""
    for runner in runners:
        runner.kill_decoders()
    _say(
        both(
            f"已停止，有线程没有结束：{_names(runners)}",
            f"stopped, with threads that did not end: {_names(runners)}",
        )
    )
    terminal.leave(0)


async def _serve(server: Server, runners: Sequence[Runner], listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, or until a model fails, and says when it is ready and when it has stopped."""

    async def announce() -> None:
        with progress.working(both("打开模型", "opening the model")):
            for runner in runners:
                await runner.opened.wait()
        if all(runner.is_ready for runner in runners):
            _say(both(f"可以使用：{_names(runners)}", f"ready: {_names(runners)}"))
            # What is there now stays. Looking through it all for garbage, again and again, holds up every answer.
            gc.collect()
            gc.freeze()
        failing = [asyncio.ensure_future(runner.failed.wait()) for runner in runners]
        await asyncio.wait(failing, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True

    announcing = asyncio.ensure_future(announce())
    try:
        await server.serve(sockets=[listener])
    finally:
        announcing.cancel()
    _say(both(f"已停止：{_names(runners)}", f"stopped: {_names(runners)}"))


def _say(line: str) -> None:
    print(f"{time.strftime(LOG_TIME)} {line}", flush=True)


def listen(host: str, port: int) -> socket.socket:
    """A socket that connections can be accepted from; raises ConfigError when the address cannot be had."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be listened at ({error.strerror or error})") from error
    # Connections inherit it. asyncio sets it only where a socket names its protocol, which those of `create_server` do
    # not; without it an answer's body waits 40 ms for the client to acknowledge its head.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _warn(host: str, api_key: str | None) -> None:
    """Warns of strangers who need no key, and of a key that can be guessed."""
    if api_key is None and host not in LOOPBACK:
        print(
            both(
                f"注意：其他机器可以访问 {host}，而没有设置 {API_KEY_VARIABLE}",
                f"warning: other machines can reach {host}, and {API_KEY_VARIABLE} is not set",
            ),
            file=sys.stderr,
        )
    if api_key is not None and is_weak(api_key):
        print(
            both(
                f"注意：密钥太容易猜，至少用 {LEAST_KEY_CHARS} 个随机字符，例如：",
                f"warning: the API key can be guessed; use at least {LEAST_KEY_CHARS} random characters, for example: ",
            )
            + 'python -c "import secrets; print(secrets.token_urlsafe())"',
            file=sys.stderr,
        )
