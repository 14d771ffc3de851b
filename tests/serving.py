"""A server in a thread, and a backend whose batches a test can see and hold up; for the tests of `serve`."""

import asyncio
import base64
import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import httpx
import numpy as np
from fastapi import FastAPI
from harmful_pictures import Harmful

from cn_clip.clip.backends.base import Parts, Pixels, Rows, TokenIds
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.tokenizer import ChineseTexts
from cn_clip.retrieval.addresses import Searchable
from cn_clip.serve.access import Access, Hosts
from cn_clip.serve.app import create_app
from cn_clip.serve.batching import Metrics
from cn_clip.serve.collections import Collections, Opened
from cn_clip.serve.immich import SecondServer
from cn_clip.serve.limits import Limits
from cn_clip.serve.runner import Runner
from cn_clip.serve.server import Server, listen
from cn_clip.serve.service import Service
from cn_clip.serve.token_table import TokenTable


class WatchedBackend:
    """Four dimensions: the first says how many tokens, or 1 for a picture. Stands still while `going` is not set."""

    resolution = 8
    embed_dim = 4

    def __init__(self) -> None:
        self.going = threading.Event()
        self.going.set()
        self.begun = threading.Semaphore(0)
        self.text_batches: list[int] = []
        self.picture_batches: list[int] = []

    def encode_tokens(self, token_ids_BL: TokenIds) -> Rows:
        self.text_batches.append(len(token_ids_BL))
        return self._rows((token_ids_BL != 0).sum(axis=1))

    def encode_pixels(self, pixels_B3RR: Pixels) -> Rows:
        self.picture_batches.append(len(pixels_B3RR))
        return self._rows(np.ones(len(pixels_B3RR)))

    def _rows(self, first_B: np.ndarray) -> Rows:
        self.begun.release()
        assert self.going.wait(60)
        rows = np.zeros((len(first_B), self.embed_dim), dtype=np.float32)
        rows[:, 0] = first_B
        return rows


def harmed(backend: WatchedBackend) -> Encoder:
    """An encoder whose pictures go through `Harmful`."""
    return Encoder(Parts(backend, Harmful(8), ChineseTexts(52)))


@contextlib.contextmanager
def served(
    encoder: Encoder,
    limits: Limits | None = None,
    *,
    hosts: Hosts | None = None,
    api_key: str | None = None,
    index: Searchable | None = None,
    label_sets: Mapping[str, Sequence[str]] | None = None,
    with_page: bool = False,
    with_originals: bool = False,
    token_table: TokenTable | None = None,
    second: str | None = None,
    origins: Sequence[str] = (),
    root_path: str = "",
) -> Iterator[str]:
    """The address of a server that is ready, on a free port; gone at the end."""
    limits, metrics = limits or Limits(), Metrics()
    runner = Runner("tiny", lambda: encoder, limits, metrics)
    collections = Collections([] if index is None else [Opened("photos", index, runner)])
    service = Service(
        [runner],
        limits,
        collections,
        label_sets or {},
        with_originals=with_originals,
        token_table=token_table,
        root_path=root_path,
    )
    access = Access(hosts or Hosts(), api_key=api_key, origins=origins, root_path=root_path)
    forward = None if second is None else SecondServer(second, limits)
    app = create_app(service, metrics, access=access, second=forward)
    with answering(app, limits, with_page=with_page) as address:
        yield address


@contextlib.contextmanager
def served_all(runners: Sequence[Runner], collections: Collections) -> Iterator[str]:
    """As `served`, of several models and indexes."""
    service = Service(runners, runners[0].limits, collections)
    with answering(create_app(service, Metrics()), service.limits) as address:
        yield address


@contextlib.contextmanager
def answering(app: FastAPI, limits: Limits, *, with_page: bool = False) -> Iterator[str]:
    """As `served`, of an application."""
    if with_page:
        from cn_clip.serve import page

        page.mount(app)
    with listen("127.0.0.1", 0) as listener:
        server = Server(app, limits)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            address = "http://{}:{}".format(*listener.getsockname())
            wait_until(lambda: httpx.get(f"{address}/readyz").status_code == 200)
            yield address
        finally:
            server.should_exit = True
            thread.join()


def wait_until(happened: Callable[[], bool]) -> None:
    """Returns once `happened()` is true; fails after a minute."""
    for _ in range(1200):
        with contextlib.suppress(httpx.TransportError):
            if happened():
                return
        threading.Event().wait(0.05)
    raise AssertionError("did not happen within a minute")


def queue_depth(address: str, inputs: str = "texts") -> float:
    """What /metrics says of a queue."""
    text = httpx.get(f"{address}/metrics").text
    (line,) = [one for one in text.splitlines() if one.startswith(f'cn_clip_queue_depth{{inputs="{inputs}"}}')]
    return float(line.split()[-1])


def data_url(picture: bytes, kind: str = "png") -> str:
    """The picture as a request carries it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
