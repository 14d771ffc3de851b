"""How many requests a second `cn-clip serve` answers, and how long each waits, beside encoding offline in batches:

python benchmarks/serve_load.py --model ViT-B-16 --backend openvino --precision bf16 --clients 1,8,32,128

Each client sends one input, waits for its vector, and sends the next. Clients and server share the machine, so the
clients speak HTTP by hand, which costs little; a client refused with 503 waits a tenth of a second, or as it is told.
"""

import asyncio
import base64
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

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
    items: int = 1
    """Texts, or pictures, in each request"""
    inputs: Kind | None = None
    """What is sent; default: pictures, and then texts"""
    obey: bool = False
    """Have a client that is refused wait as long as it is told to, a second, and not a tenth of that"""
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
class Offline:
    """Encoding in one call: inputs a second, and processor time of one in milliseconds."""

    per_second: float
    cpu_ms: float


@dataclass(frozen=True)
class Load:
    """What came of one number of clients. Times in milliseconds; offline: the share of what offline encoding does.

    per_second: inputs; p50, p95, p99: of requests. server_ms, loop_ms, client_ms: processor time an input of the
    service, of its thread that reads and answers requests alone, and of the clients. bound: the share that a server
    could reach that takes no time itself, for the clients take theirs on the same cores.
    """

    inputs: Kind
    clients: int
    per_second: float
    offline: float
    p50: float
    p95: float
    p99: float
    mean_batch: float
    refused: int
    server_ms: float
    loop_ms: float
    client_ms: float
    bound: float


def run(options: Options) -> None:
    say = command.Speaker(quiet=options.json)
    texts = [one.name for one in load()] if options.texts is None else read_texts(options.texts)
    kinds = KINDS if options.inputs is None else (options.inputs,)
    offline = {kind: offline_rate(kind, texts, options) for kind in kinds}
    for kind, found in offline.items():
        each = f"{found.per_second:.1f}/s, {found.cpu_ms:.2f} ms of processor time each"
        say(f"offline, {kind}: {each}, in batches of {options.max_batch}")
    loads = []
    with service(flags_of(options)) as (process, port):
        for kind in kinds:
            bodies = request_bodies(kind, texts, options.items)
            for number in options.numbers:
                loads.append(measured(bodies, kind, number, process, port, offline[kind], options))
    say(table(loads))
    say.result(
        {
            "machine": bench_report.machine_facts(),
            "options": asdict(options),
            "offline": {kind: asdict(found) for kind, found in offline.items()},
            "loads": [asdict(one) for one in loads],
        }
    )


def read_texts(path: Path) -> list[str]:
    """Lines of a file, or the field "text" of those of a .jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines] if path.suffix == ".jsonl" else lines


def offline_rate(kind: Kind, texts: Sequence[str], options: Options) -> Offline:
    """What `Encoder` does in one call, the best of three."""
    encoder = Encoder(
        options.model,
        backend=options.backend,
        precision=options.precision,
        num_threads=options.num_threads,
        download_root=options.download_root,
    )
    given: Sequence[Any] = texts if kind == "text" else [one.picture for one in load()]
    inputs = [value for value, _ in zip(cycle(given), range(OFFLINE_INPUTS), strict=False)]
    found = []
    for _ in range(4):
        begin, cpu = time.perf_counter(), time.process_time()
        if kind == "text":
            encoder.encode_texts(inputs, batch_size=options.max_batch)
        else:
            encoder.encode_images(inputs, batch_size=options.max_batch)
        seconds, cpu_each = time.perf_counter() - begin, (time.process_time() - cpu) / OFFLINE_INPUTS
        found.append(Offline(OFFLINE_INPUTS / seconds, cpu_each * 1e3))
    return max(found[1:], key=lambda one: one.per_second)


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
    bodies: Sequence[bytes],
    kind: Kind,
    num_clients: int,
    served: "subprocess.Popen[str]",
    port: int,
    offline: "Offline",
    options: Options,
) -> Load:
    """One number of clients, after the warm-up."""
    watched: list[tuple[float, ...]] = []

    async def watch() -> None:
        for wait in (options.warmup, options.seconds):
            await asyncio.sleep(wait)
            cpu = cpu_seconds(served.pid), cpu_seconds(served.pid, served.pid), time.process_time()
            watched.append((*await batches(kind, port), *cpu))

    async def load() -> tuple[list[float], int]:
        asked = crowd(bodies, num_clients, port, options.seconds, warmup=options.warmup, obey=options.obey)
        results, _ = await asyncio.gather(asked, watch())
        return results

    seconds, refused = asyncio.run(load())
    num_inputs, num_batches, *cpu = (late - early for early, late in zip(*watched, strict=True))
    cuts = statistics.quantiles(seconds, n=100)
    num_answered = len(seconds) * options.items
    rate = num_answered / options.seconds
    server_ms, loop_ms, client_ms = (1e3 * one / max(1, num_answered) for one in cpu)
    return Load(
        kind,
        num_clients,
        rate,
        rate / offline.per_second,
        *(cuts[cut] * 1e3 for cut in (49, 94, 98)),
        num_inputs / max(1, num_batches),
        refused,
        server_ms,
        loop_ms,
        client_ms,
        offline.cpu_ms / (offline.cpu_ms + client_ms),
    )


def cpu_seconds(pid: int, thread: int | None = None) -> float:
    """Processor time of a process, without its children, or of one of its threads; NaN where there is no /proc."""
    path = Path(f"/proc/{pid}/stat" if thread is None else f"/proc/{pid}/task/{thread}/stat")
    try:
        fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def crowd(
    bodies: Sequence[bytes], num_clients: int, port: int, duration: float, *, warmup: float = 0.0, obey: bool = False
) -> tuple[list[float], int]:
    """(seconds that each answer took that came in the duration, refusals in it); raises where an answer is missing.

    warmup: seconds before the duration. obey: a client that is refused waits as long as the refusal says, instead of
    `PAUSE_AFTER_REFUSAL`.
    """
    loop = asyncio.get_running_loop()
    since = time.perf_counter() + warmup
    clients = [Client(rotated(bodies, number), since, since + duration, obey=obey) for number in range(num_clients)]
    for one in clients:
        await loop.create_connection(functools.partial(Client.itself, one), "127.0.0.1", port)
    await asyncio.gather(*[one.done for one in clients])
    return [one for client in clients for one in client.seconds], sum(client.refused for client in clients)


class Client(asyncio.Protocol):
    """One client. Streams would do, and take three times the processor's time of what they measure.

    bodies: sent in turn, again and again. since, until: by time.perf_counter(); what is answered between counts.
    """

    def __init__(self, bodies: Sequence[bytes], since: float, until: float, *, obey: bool) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.seconds: list[float] = []
        self.refused = 0
        self._requests = cycle([request_head("POST /v1/embeddings", one) + one for one in bodies])
        self._since, self._until, self._obey, self._begin = since, until, obey, 0.0
        self._got, self._size = b"", 0

    def itself(self) -> "Client":
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._got += data
        if not self._size and (end := self._got.find(b"\r\n\r\n")) >= 0:
            self._size = end + 4 + int(header_of(self._got[:end], b"content-length") or 0)
        if self._size and len(self._got) >= self._size:
            answer, self._got, self._size = self._got, b"", 0
            self._answered(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or RuntimeError("the service closed a connection without an answer"))

    def _ask(self) -> None:
        self._begin = time.perf_counter()
        if self._begin >= self._until:
            self.done.set_result(None)
            self._transport.close()
        else:
            self._transport.write(next(self._requests))

    def _answered(self, answer: bytes) -> None:
        status, now = int(answer[9:12]), time.perf_counter()
        counts = self._since <= now < self._until
        if status == 200:
            if counts:
                self.seconds.append(now - self._begin)
            self._ask()
        elif status == 503:
            self.refused += counts
            told = header_of(answer[: answer.index(b"\r\n\r\n")], b"retry-after")
            pause = float(told) if self._obey and told else PAUSE_AFTER_REFUSAL
            asyncio.get_running_loop().call_later(pause, self._ask)
        elif not self.done.done():
            self.done.set_exception(RuntimeError(f"the service answered {status}"))


def header_of(head: bytes, name: bytes) -> bytes | None:
    """The value of a header; None without it."""
    lower = head.lower()
    start = lower.find(b"\r\n" + name + b":")
    return None if start < 0 else head[start + len(name) + 3 :].split(b"\r\n", 1)[0].strip()


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, what: str, body: bytes = b""
) -> tuple[int, bytes]:
    """(status, body) of the answer."""
    writer.write(request_head(what, body) + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().splitlines()
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
    return int(lines[0].split()[1]), await reader.readexactly(length)


def request_head(what: str, body: bytes) -> bytes:
    head = f"{what} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(body)}\r\n\r\n".encode()


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


def request_bodies(kind: Kind, texts: Sequence[str], num_items: int = 1) -> list[bytes]:
    given = texts if kind == "text" else [{"image": data_url(one.picture)} for one in load()]
    if num_items == 1:
        return [request_body(one) for one in given]
    groups = (list(islice(cycle(given), start, start + num_items)) for start in range(0, len(given), num_items))
    return [request_body(group) for group in groups]


def request_body(given: object) -> bytes:
    return json.dumps({"model": "served", "encoding_format": "base64", "input": given}).encode()


def data_url(picture: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(picture).decode()}"


def table(loads: Sequence[Load]) -> str:
    head = [
        "inputs",
        "clients",
        "per second",
        "of offline",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "batch",
        "503",
        "server ms",
        "loop ms",
        "client ms",
        "bound",
    ]
    rows = [
        [
            one.inputs,
            str(one.clients),
            f"{one.per_second:.1f}",
            f"{one.offline:.0%}",
            *(f"{value:.0f}" for value in (one.p50, one.p95, one.p99)),
            f"{one.mean_batch:.1f}",
            str(one.refused),
            f"{one.server_ms:.2f}",
            f"{one.loop_ms:.2f}",
            f"{one.client_ms:.2f}",
            f"{one.bound:.0%}",
        ]
        for one in loads
    ]
    return "\n".join(terminal.align([head, *rows], right=frozenset(range(1, len(head)))))


def main(args: Sequence[str] | None = None) -> None:
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
