"""A service whose index is in a store that is away: what requests, the queue and /readyz say, and that it goes on."""

import contextlib
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import milvus_server
import numpy as np
import pytest
from serving import WatchedBackend, served, wait_until

from cn_clip.clip.encoder import Encoder
from cn_clip.errors import AwayError
from cn_clip.retrieval.addresses import open_index, open_writer
from cn_clip.retrieval.manifest import Manifest, ModelInfo, PictureFacts
from cn_clip.retrieval.milvus_address import Address
from cn_clip.retrieval.remote import RemoteIndex
from cn_clip.retrieval.store import Hit
from cn_clip.retrieval.writer import NewItem
from cn_clip.serve import circuits

MODEL = ModelInfo("Tiny", "0123", 4)
SINCE = (
    r"the index 'photos' does not answer since \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d; the server's log tells why"
)


class FarIndex(RemoteIndex):
    """In a store that is away or not; counts what is asked of it. A search of a store that is away waits."""

    def __init__(self) -> None:
        self.is_away, self.asked, self.probes = False, 0, 0
        self.given_up = threading.Event()
        self._lock = threading.Lock()

    model = MODEL  # type: ignore[assignment]
    pictures = PictureFacts()  # type: ignore[assignment]
    address = "milvus://far:1/photos"  # type: ignore[assignment]

    def prepare(self) -> None:
        pass

    def search(self, *args: Any, **options: Any) -> list[list[Hit]]:
        with self._lock:
            self.asked += 1
        if self.is_away:
            self.given_up.wait()
            raise AwayError("Milvus did not answer within 20 s", at=self.address)
        return [[Hit("a", 1.0, {})]]

    def with_thumbnail(self, ids: Any) -> set[int | str]:
        return set()

    def ping(self) -> None:
        self.probes += 1
        if self.is_away:
            raise AwayError("Milvus did not answer within 20 s", at=self.address)


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many a second."""
    monkeypatch.setattr(circuits, "PROBE_SECONDS", 0.05)


@pytest.fixture
def far() -> Iterator[tuple[FarIndex, str]]:
    """The index, and the address of the service that searches it."""
    index = FarIndex()
    with served(Encoder(WatchedBackend()), index=index) as url:
        yield index, url
        index.given_up.set()


def search(url: str) -> httpx.Response:
    """What /v1/search says."""
    return httpx.post(f"{url}/v1/search", json={"query": "笑"}, timeout=60)


def test_while_a_store_is_away_nothing_waits_for_it_but_one_probe(
    far: tuple[FarIndex, str], caplog: pytest.LogCaptureFixture
) -> None:
    index, url = far
    assert [hit["id"] for hit in search(url).json()["data"]] == ["a"]
    index.is_away = True
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(search, url) for _ in range(24)]
        wait_until(lambda: index.asked > 1)
        index.given_up.set()
        for one in answers:
            found = one.result()
            assert (found.status_code, found.headers["Retry-After"]) == (503, "5")
            assert found.json()["error"]["code"] == "index_unavailable"
    asked = index.asked
    assert asked < 24  # those that had begun; the others were refused in the queue
    assert re.fullmatch(SINCE, search(url).json()["error"]["message"])
    ready = httpx.get(f"{url}/readyz")
    assert (ready.status_code, ready.headers["Retry-After"]) == (503, "5")
    assert re.fullmatch(SINCE, ready.json()["error"]["message"])
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert httpx.post(f"{url}/v1/embeddings", json={"model": "tiny", "input": "笑"}).status_code == 200
    wait_until(lambda: index.probes > 2)
    assert index.asked == asked
    assert [one.name for one in threading.enumerate()].count("probe") == 1
    assert sum("is asked for again every" in one.message for one in caplog.records) == 1
    index.is_away = False
    wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
    assert search(url).status_code == 200


def test_an_answer_that_is_an_error_closes_the_circuit() -> None:
    circuit, asked = circuits.Circuit(), threading.Event()

    def probe() -> None:
        asked.set()
        raise ValueError("of another kind")

    circuit.open("photos", AwayError("away"), probe)
    assert circuit.is_open
    wait_until(lambda: not circuit.is_open)
    assert asked.is_set()


def test_a_service_that_ends_probes_no_more(far: tuple[FarIndex, str]) -> None:
    circuit = circuits.Circuit()
    circuit.open("photos", AwayError("away"), far[0].ping)
    circuit.end()
    wait_until(lambda: "probe" not in [one.name for one in threading.enumerate()])


@pytest.mark.milvus
def test_a_server_that_goes_away_and_comes_back_is_searched_again() -> None:
    with milvus_server.collection() as address:
        with open_writer(address, Manifest(MODEL)) as opened:
            opened.commit([NewItem("a", np.eye(4, dtype=np.float32)[0])])
        relay = milvus_server.Relay(address.host, address.port)
        index = open_index(Address("127.0.0.1", relay.port, address.collection, timeout=1))
        with served(Encoder(WatchedBackend()), index=index) as url:
            assert [hit["id"] for hit in search(url).json()["data"]] == ["a"]
            for goes_away in (milvus_server.Relay.stall, milvus_server.Relay.close):
                goes_away(relay)
                assert search(url).status_code == 503
                for _ in range(3):
                    assert re.fullmatch(SINCE, search(url).json()["error"]["message"])
                assert re.fullmatch(SINCE, httpx.get(f"{url}/readyz").json()["error"]["message"])
                relay.close()
                relay = milvus_server.Relay(address.host, address.port, relay.port)
                wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
                assert [hit["id"] for hit in search(url).json()["data"]] == ["a"]
            with contextlib.closing(relay):
                assert search(url).status_code == 200
