"""How many requests a second `cn-clip serve` answers, and how long each waits, beside encoding offline in batches:

python benchmarks/serve_load.py --model ViT-B-16 --backend openvino --precision bf16 --clients 1,8,32,128

Each client sends one input, waits for its vector, and sends the next. Clients and server share the machine, so the
clients speak HTTP by hand, which costs little; a client refused with 503 waits a tenth of a second.
"""

import asyncio
import base64
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cn_clip import command, terminal  # noqa: E402
from cn_clip.clip.backends.names import KINDS, BackendName, Kind, Precision  # noqa: E402
from cn_clip.clip.encoder import Encoder  # noqa: E402
from cn_clip.deploy import bench_report  # noqa: E402
from cn_clip.emoji_pack import load  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402

OFFLINE_INPUTS = 512
PAUSE_AFTER_REFUSAL = 0.1


@dataclass(frozen=True)
class Options:
    """Measures a service on this machine under more and more clients."""

    model: str = "ViT-B-16"
    """Model that is served"""
    backend: BackendName = "torch"
    """What runs it"""
    precision: Precision = "fp32"
    """Arithmetic"""
    clients: str = "1,8,32,128"
    """Numbers of clients at a time, joined by commas"""
    seconds: float = 20.0
    """Time measured for each number of clients"""
    warmup: float = 3.0
    """Seconds before that"""
    max_batch: int = 32
    """Batch of the service, and of the encoding offline"""
    max_wait_ms: float = 5.0
    """Longest time a batch waits"""
    texts: Path | None = None
    """File of texts to send: one a line, or the captions of a dataset (.jsonl); default: the short names of emoji"""
    num_threads: int | None = None
    """Threads that compute, in both"""
    download_root: str | None = None
    """Folder of downloaded and exported models"""
    json: bool = False
    """Print the result as one JSON object"""

    @property
    def numbers(self) -> list[int]:
        return [int(number) for number in self.clients.split(",")]

    def __post_init__(self) -> None:
        if not all(part.strip().isdigit() and int(part) > 0 for part in self.clients.split(",")):
            raise ConfigError(f"--clients: expected positive numbers joined by commas, got {self.clients!r}")


@dataclass(frozen=True)
class Load:
    """What came of one number of clients. Times in milliseconds; offline: the share of what offline encoding does."""

    inputs: Kind
    clients: int
    per_second: float
    offline: float
    p50: float
    p95: float
    p99: float
    mean_batch: float
    refused: int


def run(options: Options) -> None:
    say = command.Speaker(quiet=options.json)
    texts = [one.name for one in load()] if options.texts is None else read_texts(options.texts)
    offline = {kind: offline_rate(kind, texts, options) for kind in KINDS}
    for kind, rate in offline.items():
        say(f"offline, {kind}: {rate:.1f}/s in batches of {options.max_batch}")
    loads = []
    with service(flags_of(options)) as (_, port):
        for kind in KINDS:
            for number in options.numbers:
                loads.append(measured(request_bodies(kind, texts), kind, number, port, offline[kind], options))
    say(table(loads))
    say.result(
        {
            "machine": bench_report.machine_facts(),
            "options": asdict(options),
            "offline_per_second": offline,
            "loads": [asdict(one) for one in loads],
        }
    )


def read_texts(path: Path) -> list[str]:
    """Lines of a file, or the field "text" of those of a .jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines


def offline_rate(kind: Kind, texts: Sequence[str], options: Options) -> float:
    """Inputs a second of `Encoder` in one call, the second time."""
    encoder = Encoder(
        options.model,
        backend=options.backend,
        precision=options.precision,
        num_threads=options.num_threads,
        download_root=options.download_root,
    )
    given: Sequence[Any] = texts if kind == "text" else [one.picture for one in load()]
    inputs = [value for value, _ in zip(cycle(given), range(OFFLINE_INPUTS), strict=False)]
    for _ in range(2):
        begin = time.perf_counter()
        if kind == "text":
            encoder.encode_texts(inputs, batch_size=options.max_batch)
        else:
            encoder.encode_images(inputs, batch_size=options.max_batch)
        seconds = time.perf_counter() - begin
    return OFFLINE_INPUTS / seconds


def flags_of(options: Options) -> list[str]:
    """The service's flags."""
    flags = ["--model", options.model, "--backend", options.backend, "--precision", options.precision]
    flags += ["--max-batch", str(options.max_batch), "--max-wait-ms", str(options.max_wait_ms), "--name", "served"]
    for flag, value in (("--num-threads", options.num_threads), ("--download-root", options.download_root)):
        flags += [flag, str(value)] if value is not None else []
    return flags


@contextmanager
def service(flags: Sequence[str]) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A service whose model is open, and its port."""
    start = [sys.executable, "-m", "cn_clip", "serve", "--port", "0", *flags]
    with subprocess.Popen(start, stdout=subprocess.PIPE, text=True, cwd=ROOT, encoding="utf-8") as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout)
            address = next(line for line in lines if "http://" in line)
            if not any("ready" in line for line in lines):
                raise ConfigError(f"the service did not start: {' '.join(start)}")
            yield process, int(address.strip().rsplit(":", 1)[1])
        finally:
            process.terminate()


def measured(
    bodies: Sequence[bytes], kind: Kind, num_clients: int, port: int, offline: float, options: Options
) -> Load:
    """One number of clients, after the warm-up."""
    asyncio.run(crowd(bodies, num_clients, port, options.warmup))
    before = asyncio.run(batches(kind, port))
    seconds, refused = asyncio.run(crowd(bodies, num_clients, port, options.seconds))
    after = asyncio.run(batches(kind, port))
    cuts = statistics.quantiles(seconds, n=100)
    rate = len(seconds) / options.seconds
    size = (after[0] - before[0]) / max(1, after[1] - before[1])
    return Load(kind, num_clients, rate, rate / offline, cuts[49] * 1e3, cuts[94] * 1e3, cuts[98] * 1e3, size, refused)


async def crowd(bodies: Sequence[bytes], num_clients: int, port: int, duration: float) -> tuple[list[float], int]:
    """(seconds that each answer took, number of refusals). Raises where a request is left without an answer."""
    until = time.perf_counter() + duration
    results = await asyncio.gather(*[client(rotated(bodies, number), port, until) for number in range(num_clients)])
    return [one for seconds, _ in results for one in seconds], sum(refused for _, refused in results)


async def client(bodies: Sequence[bytes], port: int, until: float) -> tuple[list[float], int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seconds, refused = [], 0
    for body in cycle(bodies):
        begin = time.perf_counter()
        if begin >= until:
            break
        status, _ = await exchange(reader, writer, "POST /v1/embeddings", body)
        if status == 200:
            seconds.append(time.perf_counter() - begin)
        elif status == 503:
            refused += 1
            await asyncio.sleep(PAUSE_AFTER_REFUSAL)
        else:
            raise RuntimeError(f"the service answered {status}")
    writer.close()
    await writer.wait_closed()
    return seconds, refused


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: str, body: bytes = b""
) -> tuple[int, bytes]:
    """(status, body) of the answer."""
    head = (
        f"{what} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().splitlines()
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


async def batches(kind: Kind, port: int) -> tuple[float, float]:
    """(inputs, batches) that the service has computed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    _, text = await exchange(reader, writer, "GET /metrics")
    writer.close()
    await writer.wait_closed()
    inputs = {"text": "texts", "image": "pictures"}[kind]
    values = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
    total, count = (float(values[f'cn_clip_batch_size_{part}{{inputs="{inputs}"}}']) for part in ("sum", "count"))
    return total, count


def rotated(bodies: Sequence[bytes], start: int) -> Sequence[bytes]:
    """The same bodies from another one on."""
    start %= len(bodies)
    return [*bodies[start:], *bodies[:start]]


def request_bodies(kind: Kind, texts: Sequence[str]) -> list[bytes]:
    given = texts if kind == "text" else [{"image": data_url(one.picture)} for one in load()]
    return [request_body(one) for one in given]


def request_body(given: object) -> bytes:
    return json.dumps({"model": "served", "encoding_format": "base64", "input": given}).encode()


def data_url(picture: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"


def table(loads: Sequence[Load]) -> str:
    head = ["inputs", "clients", "per second", "of offline", "p50 ms", "p95 ms", "p99 ms", "batch", "503"]
    rows = [
        [
            one.inputs,
            str(one.clients),
            f"{one.per_second:.1f}",
            f"{one.offline:.0%}",
            *(f"{value:.0f}" for value in (one.p50, one.p95, one.p99)),
            f"{one.mean_batch:.1f}",
            str(one.refused),
        ]
        for one in loads
    ]
    return "\n".join(terminal.align([head, *rows], right=frozenset(range(1, len(head)))))


def main(args: Sequence[str] | None = None) -> None:
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
