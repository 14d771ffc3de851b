"""The HTTP service: `cn-clip serve photos.index --model ViT-B-16`."""

import asyncio
import gc
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cn_clip import command, extras, settings, terminal, zoo
from cn_clip.clip import choice
from cn_clip.clip.choice import DEFAULT_MODEL
from cn_clip.errors import ConfigError, MissingExtraError
from cn_clip.serve.limits import LOG_TIME, Limits
from cn_clip.settings import Range

if TYPE_CHECKING:
    from fastapi import FastAPI

    from cn_clip.clip.encoder import Encoder
    from cn_clip.retrieval.addresses import Searchable
    from cn_clip.serve.engine import Engine
    from cn_clip.serve.server import Server

API_KEY_VARIABLE = "CN_CLIP_API_KEY"
PURPOSE = "the HTTP service"
SWITCH_SECONDS = 0.001


@dataclass(frozen=True)
class Options(choice.ModelSettings, Limits):
    """Answers over HTTP: /v1/embeddings as OpenAI's clients ask, /v1/classify, /v1/search; /metrics, /readyz."""

    index: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="INDEX")] = None
    """Index that /v1/search searches: a folder, or milvus://HOST:PORT/COLLECTION"""
    model: choice.ModelOfIndex = None
    name: str | None = None
    """What the model is called in requests; default: its name, or that of its file"""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine's"""
    allowed_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Name by which people reach the service, such as that of a reverse proxy. Without a key, others than localhost
    and --host are refused"""
    port: Annotated[int, Range(least=0, most=65535)] = 8000
    """Port to listen at; 0: any that is free"""
    api_key: str | None = None
    """Key that requests must bear; better set in the environment as CN_CLIP_API_KEY, where `ps` does not show it"""
    label_sets: tuple[Path, ...] = ()
    """Files of labels, one a line; /v1/classify calls each by its file name without the suffix"""
    no_page: bool = False
    """Serve no web page; with a key there is none anyway, for browsers do not send it"""
    decode: choice.Decoding = "exact"
    access_log: bool = False
    """Print a line for each request"""
    drain_timeout: float = 30.0
    """Seconds that requests in hand have to finish after SIGTERM"""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice.check(self.chosen)
        settings.check(self)
        if not self.drain_timeout > 0:
            raise ConfigError(f"{settings.flag('drain_timeout')}: expected a positive number, got {self.drain_timeout}")

    @property
    def chosen(self) -> choice.Choice:
        """The model asked for."""
        return replace(super().chosen, decode=self.decode)

    @property
    def limits(self) -> Limits:
        """The limits among the options."""
        return Limits(**{field.name: getattr(self, field.name) for field in fields(Limits)})


def run(options: Options) -> None:
    """Serves until it is told to stop; raises CnClipError for what cannot be opened."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        extras.require(module, extra="serve", purpose=PURPOSE)
    from cn_clip.clip.opening import precision_of
    from cn_clip.serve.app import create_app
    from cn_clip.serve.engine import Engine
    from cn_clip.serve.hosts import Hosts
    from cn_clip.serve.metrics import Metrics

    options = replace(options, precision=precision_of(options.chosen))
    hosts = Hosts(options.host, options.allowed_host)
    api_key, label_sets = key_of(options), read_label_sets(options.label_sets)
    index = _opened_index(options)
    model = options.model or (index.model.name if index is not None else DEFAULT_MODEL)
    metrics = Metrics()
    engine = Engine(
        options.name or served_name(model), lambda: _open_encoder(options, model, index), options.limits, metrics
    )
    app = create_app(
        engine, metrics, limits=options.limits, api_key=api_key, hosts=hosts, index=index, label_sets=label_sets
    )
    _warn_of_strangers(options.host, api_key)
    _warn_of_weak(api_key)
    with listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        _say(f"正在打开 / opening {model}; {address}")
        if not options.no_page:
            _say(add_page(app, options, api_key, address))
        serve(app, engine, options, listener)


def add_page(app: "FastAPI", options: Options, api_key: str | None, address: str) -> str:
    """Mounts the web page if it can be used; the line that tells of it."""
    if api_key is not None:
        return "设了密钥，所以没有网页：浏览器不会带上密钥 / no web page: browsers do not send the key"
    try:
        extras.require("gradio", extra="page", purpose="the web page")
    except MissingExtraError as error:
        return f"没有网页 / no web page: {error}"
    from cn_clip.serve import page

    facts = {"后端 / backend": options.backend, "精度 / precision": options.precision}
    page.mount(app, app.state.service, facts)
    return f"网页 / web page: {address}/"


def serve(app: "FastAPI", engine: "Engine", options: Options, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is in hand; raises what kept the model from opening."""
    from cn_clip.serve.server import Server

    server = Server(
        app,
        options.limits,
        drain_timeout=options.drain_timeout,
        access_log=options.access_log,
        end=lambda: _end(engine),
    )
    # The event loop waits so long for a thread that goes through a large picture's base64; by default 5 ms, each time.
    sys.setswitchinterval(SWITCH_SECONDS)
    asyncio.run(_serve(server, engine, listener))
    server.ended()
    if engine.failure is not None:
        raise engine.failure


def _end(engine: "Engine") -> None:
    """Ends the process, whatever its threads wait for."""
    engine.kill_decoders()
    _say(f"已停止，有线程没有结束 / stopped, with threads that did not end: {engine.name}")
    terminal.leave(0)


async def _serve(server: "Server", engine: "Engine", listener: socket.socket) -> None:
    async def announce() -> None:
        await engine.opened.wait()
        if engine.is_ready:
            _say(f"可以使用 / ready: {engine.name}")
            # What is there now stays. Looking through it all for garbage, again and again, holds up every answer.
            gc.collect()
            gc.freeze()
        await engine.failed.wait()
        server.should_exit = True

    announcing = asyncio.ensure_future(announce())
    try:
        await server.serve(sockets=[listener])
    finally:
        announcing.cancel()
    _say(f"已停止 / stopped: {engine.name}")


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


def key_of(options: Options) -> str | None:
    """The API key of the flag, else of the environment; raises ConfigError for an empty one."""
    key = options.api_key if options.api_key is not None else os.environ.get(API_KEY_VARIABLE)
    if key is not None and not key.strip():
        raise ConfigError(f"--api-key: expected a key, got an empty one; unset {API_KEY_VARIABLE} to serve without")
    return None if key is None else key.strip()


def served_name(model: str) -> str:
    """A name for a model: that of a file or folder without where it lies."""
    return model if zoo.named(model) else Path(model.removeprefix("hf:")).stem


def read_label_sets(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Labels by the name of their file; raises DataError for a faulty file, ConfigError for two of one name."""
    from cn_clip.evaluation.templates import read_labels

    found = {path.stem: read_labels(path) for path in paths}
    if len(found) < len(paths):
        raise ConfigError(f"--label-sets: expected files of different names, got {', '.join(map(str, paths))}")
    return found


def _opened_index(options: Options) -> "Searchable | None":
    if options.index is None:
        return None
    from cn_clip.retrieval.addresses import address_of, open_index

    return open_index(address_of(options.index))


def _open_encoder(options: Options, model: str, index: "Searchable | None") -> "Encoder":
    from cn_clip.index.models import open_encoder
    from cn_clip.retrieval.store import same_model

    encoder, facts = open_encoder(replace(options.chosen, model=model), command.Speaker(quiet=False))
    if index is not None:
        same_model(index.model, facts, index.address)
    return encoder


def _warn_of_strangers(host: str, api_key: str | None) -> None:
    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"注意：其他机器可以访问 {host}，而没有设置 {API_KEY_VARIABLE} / "
            f"other machines can reach {host}, and no {API_KEY_VARIABLE} is set",
            file=sys.stderr,
        )


def _warn_of_weak(api_key: str | None) -> None:
    from cn_clip.serve.guesses import LEAST_KEY_CHARS, is_weak

    if api_key is not None and is_weak(api_key):
        print(
            f"注意：密钥太容易猜，至少用 {LEAST_KEY_CHARS} 个随机字符 / the API key can be guessed; use at least "
            f"{LEAST_KEY_CHARS} random characters, such as those of: "
            'python -c "import secrets; print(secrets.token_urlsafe())"',
            file=sys.stderr,
        )


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
