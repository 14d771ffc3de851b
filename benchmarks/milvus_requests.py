"""What an index in Milvus costs in requests and seconds, and a served search beside bare pymilvus and a served folder:

python benchmarks/milvus_requests.py --address milvus://localhost:19530/requests --pictures 1000

The collection is made for this and dropped at the end. A request is a call of pymilvus's client. The server of
`pip install milvus==2.3.5` will do: milvus-server --data FOLDER --proxy-port 19530.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cn_clip import cli, command, terminal  # noqa: E402
from cn_clip.retrieval.milvus_address import Address, parse_address  # noqa: E402
from cn_clip.retrieval.milvus_collection import Collection  # noqa: E402

MODEL = "Emoji-Tiny"
# One picture in so many is a copy of another one.
COPIES = 5
PORT = 18377


@dataclass(frozen=True)
class Options:
    """Measures building, changing and searching an index in Milvus."""

    address: str = "milvus://localhost:19530/requests"
    """A collection that is not there yet"""
    pictures: int = 1000
    """Pictures of the index, a fifth of them copies"""
    clients: int = 8
    """Clients of the service at a time"""
    searches: int = 400
    """Searches of all clients together"""
    json: bool = False
    """Prints the numbers as JSON"""


class Requests:
    """Counts the calls of the client while it is open."""

    def __init__(self) -> None:
        self.count = 0
        self._call = Collection.call

    def __enter__(self) -> "Requests":
        @functools.wraps(self._call)
        def counted(collection: Collection, method: str, **options: Any) -> Any:
            self.count += 1
            return self._call(collection, method, **options)

        Collection.call = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Collection.call = self._call  # type: ignore[method-assign]


def cn_clip(*args: object) -> Any:
    """What a command prints with --json."""
    with redirect_stdout(StringIO()) as out:
        cli.main([*map(str, args), "--json"])
    return json.loads(out.getvalue())


def draw(folder: Path, count: int) -> None:
    """Small pictures of noise, and a table of a field with 7 equal values."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:05d}.png"
        if number % COPIES == COPIES - 1:
            path.write_bytes((folder / f"{int(random.integers(number // COPIES + 1)) * COPIES:05d}.png").read_bytes())
        else:
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    rows = [f"{number:05d}.png,{'few' if number % (count // 7) == 1 else 'many'},{number}" for number in range(count)]
    (folder.parent / "table.csv").write_text("\n".join(["image,group,number", *rows]), encoding="utf-8")


def features(path: Path, count: int) -> None:
    """A file of unit vectors."""
    vectors = np.random.default_rng(1).normal(size=(count, 256)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with path.open("w", encoding="utf-8") as file:
        for number, vector in enumerate(vectors.tolist()):
            file.write(json.dumps({"image_id": number, "feature": vector}) + "\n")


def jobs(address: Address, folder: Path, count: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(what it is called, what to run), one after another."""
    pictures, table, one = folder / "pictures", ("--metadata", folder / "table.csv"), folder / "one"
    one.mkdir()
    Image.fromarray(np.full((32, 32, 3), 9, dtype=np.uint8)).save(one / "one.png")
    build = ("index", "build", pictures, "--output", address, *table, "--model", MODEL)
    yield f"build {count} pictures", lambda: cn_clip(*build)
    yield "build again, unchanged", lambda: cn_clip(*build)

    def touched() -> Any:
        for path in pictures.iterdir():
            path.touch()
        return cn_clip(*build)

    yield "build again, all files touched", touched
    yield "add 1", lambda: cn_clip("index", "add", address, one, "--id-prefix", "x/")
    yield "remove 1", lambda: cn_clip("index", "remove", address, "x/one.png")
    search = ("search", address, "--id", "00001.png")
    yield "search", lambda: cn_clip(*search)
    yield "search, where fits 7", lambda: cn_clip(*search, "--where", "group=few")
    yield "search, where fits none", lambda: cn_clip(*search, "--where", "group=none")
    rows = Address(address.host, address.port, f"{address.collection}_rows", address.timeout)
    of_file = ("index", "build", folder / "features.jsonl", "--output", rows)
    yield f"build {count} rows of a file", lambda: cn_clip(*of_file)
    yield "build them again, unchanged", lambda: cn_clip(*of_file)


@contextmanager
def serving(address: object, *more: object) -> Iterator[str]:
    """The address of a service of the index."""
    args = [
        sys.executable,
        "-m",
        "cn_clip",
        "serve",
        str(address),
        *map(str, more),
        "--port",
        str(PORT),
        "--num-threads",
        "1",
    ]
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url, deadline = f"http://127.0.0.1:{PORT}", time.monotonic() + 120
            while time.monotonic() < deadline:
                try:
                    if httpx.get(f"{url}/readyz").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def timed(act: Callable[[int], Any], clients: int, count: int) -> tuple[float, float]:
    """(p50, p95) in ms of `count` calls by `clients` threads."""
    took, numbers, lock = list[float](), iter(range(count)), threading.Lock()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            began = time.perf_counter()
            act(number)
            took.append((time.perf_counter() - began) * 1000)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    took.sort()
    return statistics.median(took), took[int(len(took) * 0.95)]


def service_rows(address: Address, folder: Path, options: Options) -> Iterator[tuple[str, float, float]]:
    """(what was asked, p50, p95) of the service, of bare pymilvus, and of the same items in a folder, in turns."""
    collection = Collection(address)
    query = np.random.default_rng(2).normal(size=(1, 256)).astype(np.float32)

    def bare(number: int) -> None:
        collection._client.search(
            collection_name=address.collection,
            data=query,
            limit=10,
            output_fields=["item"],
            consistency_level="Bounded",
        )

    with serving(address, folder) as url, httpx.Client(timeout=60) as client:

        def asked(where: str | None, index: str | None = None) -> Callable[[int], None]:
            def ask(number: int) -> None:
                more = {"where": where, "index": index}
                body = {"query": f"笑 {number}", "k": 10, **{name: one for name, one in more.items() if one}}
                answer = client.post(f"{url}/v1/search", json=body)
                assert answer.status_code == 200, answer.text

            return ask

        kinds = {
            "bare pymilvus": bare,
            "served search": asked(None),
            "served, where fits 7": asked("group=few"),
            "served, where fits none": asked("group=none"),
            "served folder": asked(None, folder.name),
        }
        for act in kinds.values():
            act(0)
        for turn in range(2):
            for name, act in kinds.items():
                yield f"{name} ({turn + 1})", *timed(act, options.clients, options.searches // 2)
        yield "bare pymilvus, 1 client", *timed(bare, 1, 50)
        yield "served search, 1 client", *timed(asked(None), 1, 50)


def run(options: Options) -> None:
    """Prints two tables."""
    say = command.Speaker(quiet=options.json)
    address = parse_address(options.address)
    costs, waits = list[tuple[str, int, float]](), list[tuple[str, float, float]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "pictures", options.pictures)
        features(folder / "features.jsonl", options.pictures)
        try:
            for name, job in jobs(address, folder, options.pictures):
                began = time.perf_counter()
                with Requests() as requests:
                    job()
                costs.append((name, requests.count, time.perf_counter() - began))
                say("{}: {} requests, {:.2f} s".format(*costs[-1]))
            cn_clip("index", "build", folder / "pictures", "--output", folder / "beside", "--model", MODEL)
            waits = list(service_rows(address, folder / "beside", options))
        finally:
            for name in (address.collection, f"{address.collection}_rows"):
                one = Collection(Address(address.host, address.port, name, address.timeout))
                if one.call("has_collection"):
                    one.call("drop_collection")
    for line in terminal.align([("", "p50 ms", "p95 ms"), *((n, f"{a:.1f}", f"{b:.1f}") for n, a, b in waits)]):
        say(line)
    say.result({"costs": costs, "waits_ms": waits})


def main() -> None:
    """The command line."""
    command.execute(run, Options)


if __name__ == "__main__":
    main()
