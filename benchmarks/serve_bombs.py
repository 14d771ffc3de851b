"""How long texts wait at a service while strangers send it pictures that are made to take long, and how it ends then:

python benchmarks/serve_bombs.py --model Emoji-Tiny

Some clients send texts, others one kind of picture after another. At last it gets SIGTERM while it decodes.
"""

import asyncio
import contextlib
import io
import multiprocessing
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
for folder in ("", "benchmarks", "tests"):
    sys.path.insert(0, str(ROOT / folder))

import picture_bombs as bombs  # noqa: E402
from serve_load import crowd, data_url, exchange, request_bodies, request_body, service  # noqa: E402
from serve_soak import resident_mb  # noqa: E402

from cn_clip import command, terminal  # noqa: E402
from cn_clip.clip.backends.names import BackendName, Precision  # noqa: E402
from cn_clip.deploy import bench_report  # noqa: E402
from cn_clip.emoji_pack import load  # noqa: E402

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

ALONE = "nothing else"


@dataclass(frozen=True)
class Options:
    """Measures texts beside pictures that take long."""

    model: str = "Emoji-Tiny"
    """Model that is served"""
    backend: BackendName = "torch"
    """What runs it"""
    precision: Precision = "fp32"
    """Arithmetic"""
    clients: int = 4
    """Clients that send texts"""
    attackers: int = 2
    """Clients that send pictures, each the next one when it has its answer"""
    seconds: float = 15.0
    """Time measured for each kind of picture"""
    drain_timeout: float = 10.0
    """What the service promises to end within"""
    json: bool = False
    """Print the result as one JSON object"""


@dataclass(frozen=True)
class Wait:
    """Milliseconds of texts beside one kind of picture, how those were answered, and the memory of the service."""

    beside: str
    p50: float
    p95: float
    texts_per_second: float
    answers: dict[int, int]
    memory_mb: float


def pictures() -> dict[str, Callable[[], bytes]]:
    """What is sent, by what it is; the last is honest, but large."""
    return {
        "GIF, a comment of 7 MB": lambda: bombs.gif_comment(7_400_000),
        "JPEG, 3,000 empty scans": lambda: bombs.jpeg_scans(3000),
        "PNG, 600,000 chunks": lambda: bombs.png_chunks(600_000),
        "PNG, a directory of 20 GB": bombs.png_exif_directory,
        "PBM of comments": lambda: bombs.pbm_comments(500_000),
        "PNG of 36 megapixels": _large_png,
    }


def _large_png() -> bytes:
    stream, sums = io.BytesIO(), np.add.outer(np.arange(6000), np.arange(6000))
    pixels = np.stack([sums // 47 % 256, sums // 31 % 256, sums // 97 % 256], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def run(options: Options) -> None:
    say = command.Speaker(quiet=options.json)
    texts = request_bodies("text", [one.name for one in load()])
    flags = ["--model", options.model, "--backend", options.backend, "--precision", options.precision]
    flags += ["--name", "served", "--drain-timeout", str(options.drain_timeout)]
    waits = []
    with service(flags) as (process, port):
        asyncio.run(crowd(texts, options.clients, port, 3.0))
        for name, made in {ALONE: lambda: b"", **pictures()}.items():
            body = None if name == ALONE else _body(made())
            waits.append(beside(name, body, texts, process.pid, port, options))
            say("\n".join(_table(waits).splitlines()[-1:]))
        seconds = ended(process, _body(pictures()["PBM of comments"]()), port)
    say(_table(waits))
    say(f"SIGTERM while pictures are decoded: ended after {seconds:.1f} s of {options.drain_timeout:g} at most")
    say.result(
        {
            "machine": bench_report.machine_facts(),
            "options": asdict(options),
            "waits": [asdict(one) for one in waits],
            "sigterm_seconds": seconds,
        }
    )


def _body(picture: bytes) -> bytes:
    return request_body({"image": data_url(picture)})


@contextlib.contextmanager
def attacking(body: bytes | None, port: int, number: int) -> Iterator["Queue[int]"]:
    """Clients in a process of their own, so that theirs is not the time measured; the queue takes each status."""
    context = multiprocessing.get_context("spawn")
    answers: Queue[int] = context.Queue()
    process = context.Process(target=_attack, args=(body, port, number, answers), daemon=True)
    if body is not None:
        process.start()
        answers.get()  # it sends
    try:
        yield answers
    finally:
        if body is not None:
            process.terminate()
            process.join()


def _attack(body: bytes, port: int, number: int, answers: "Queue[int]") -> None:
    async def client() -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                status, _ = await exchange(reader, writer, "POST /v1/embeddings", body)
                writer.close()
            except (OSError, EOFError):  # refused before all was sent, or nobody listens any more
                status = 0
            answers.put(status)
            await asyncio.sleep(0.02)

    async def clients() -> None:
        await asyncio.gather(*[client() for _ in range(number)])

    answers.put(0)
    asyncio.run(clients())


def beside(name: str, body: bytes | None, texts: Sequence[bytes], pid: int, port: int, options: Options) -> Wait:
    """Texts for some seconds, beside clients that send `body` again and again."""
    with attacking(body, port, options.attackers) as statuses:
        time.sleep(0.5 if body else 0)
        seconds, _ = asyncio.run(crowd(texts, options.clients, port, options.seconds))
        memory_mb = resident_mb(pid)
        answers = Counter(statuses.get() for _ in range(statuses.qsize()))
    cuts = statistics.quantiles(seconds, n=100)
    rate = len(seconds) / options.seconds
    return Wait(name, cuts[49] * 1e3, cuts[94] * 1e3, rate, dict(sorted(answers.items())), memory_mb)


def ended(process: "subprocess.Popen[str]", body: bytes, port: int) -> float:
    """Seconds from SIGTERM to the end of the service, which decodes at that moment."""
    with attacking(body, port, 4):
        time.sleep(1)
        begin = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.wait()
        return time.perf_counter() - begin


def _table(waits: Sequence[Wait]) -> str:
    head = ["texts beside", "p50 ms", "p95 ms", "of alone", "texts/s", "memory MB", "answers to pictures"]
    rows = [
        [
            one.beside,
            f"{one.p50:.1f}",
            f"{one.p95:.1f}",
            f"{one.p95 / waits[0].p95:.2f}x",
            f"{one.texts_per_second:.0f}",
            f"{one.memory_mb:.0f}",
            ", ".join(f"{count} x {status or 'cut off'}" for status, count in one.answers.items()),
        ]
        for one in waits
    ]
    return "\n".join(terminal.align([head, *rows], right=frozenset(range(1, 6))))


def main(args: Sequence[str] | None = None) -> None:
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
