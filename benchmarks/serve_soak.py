"""Whether a service keeps its memory under mixed load: texts, pictures, labels, searches and refused requests at once.

python benchmarks/serve_soak.py photos.index --minutes 10

The resident memory of the service is read every ten seconds; exits with 1 when the last third of the time needs
`TOLERANCE` more of it than the third before, or when a request gets another answer than it should.
"""

import asyncio
import itertools
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

from serve_load import PAUSE_AFTER_REFUSAL, data_url, exchange, service  # noqa: E402

from cn_clip import command, terminal  # noqa: E402
from cn_clip.clip.backends.names import BackendName, Precision  # noqa: E402
from cn_clip.deploy import bench_report  # noqa: E402
from cn_clip.emoji_pack import load  # noqa: E402
from cn_clip.errors import ConfigError, DataError  # noqa: E402

TOLERANCE = 0.02
SAMPLE_SECONDS = 10.0
NAME = "served"
WELL = frozenset({200})
# A PNG that claims 60000 x 60000 pixels.
BOMB = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA6mAAAOpgCAIAAAAPsOIVAAAAEUlEQVR4nGNgGAWjYB"
    "QMdwAAA+gAAbOm00YAAAAASUVORK5CYII="
)


@dataclass(frozen=True)
class Options:
    """Loads a service with requests of all kinds, and watches its memory."""

    index: Annotated[Path, tyro.conf.Positional]
    """Index folder that is searched"""
    minutes: float = 10.0
    """How long; at least 1"""
    clients: int = 4
    """Clients of each kind of request"""
    backend: BackendName = "torch"
    """What runs the model"""
    precision: Precision = "fp32"
    """Arithmetic"""
    json: bool = False
    """Print the result as one JSON object"""

    def __post_init__(self) -> None:
        if not 1 <= self.minutes < math.inf:
            raise ConfigError(f"--minutes: expected at least 1, for each third needs samples, got {self.minutes:g}")
        if self.clients < 1:
            raise ConfigError(f"--clients: expected at least 1, got {self.clients}")


@dataclass(frozen=True)
class Kind:
    """Requests of one kind: where they go, their bodies, and the statuses besides 503 that are right."""

    path: str
    bodies: Sequence[bytes]
    statuses: frozenset[int]


def run(options: Options) -> None:
    say = command.Speaker(quiet=options.json)
    flags = [str(options.index.resolve()), "--name", NAME]
    flags += ["--backend", options.backend, "--precision", options.precision]
    with service(flags) as (process, port):
        seconds, refused, memory_mb = asyncio.run(soak(options, process.pid, port))
    rows = [["requests", "answered", "503", "p50 ms", "p95 ms", "p99 ms"]]
    for kind in sorted({*seconds, *refused}):
        rows.append([kind, str(len(seconds[kind])), str(refused[kind]), *percentiles_ms(seconds[kind])])
    say("\n".join(terminal.align(rows, right=frozenset(range(1, 6)))))
    first, middle, last = (statistics.mean(part) for part in thirds(memory_mb))
    say(f"memory, mean of each third of {options.minutes:g} minutes: {first:.0f}, {middle:.0f}, {last:.0f} MB")
    say.result(
        {
            "machine": bench_report.machine_facts(),
            "options": {**asdict(options), "index": str(options.index)},
            "answered": {kind: len(taken) for kind, taken in seconds.items()},
            "refused": refused,
            "memory_mb": memory_mb,
        }
    )
    if last > middle * (1 + TOLERANCE):
        raise DataError(f"memory grew from {middle:.0f} to {last:.0f} MB over the last third")


def percentiles_ms(seconds: Sequence[float]) -> list[str]:
    """The 50th, 95th and 99th of the times, in milliseconds; dashes for too few of them."""
    if len(seconds) < 2:
        return ["-"] * 3
    cuts = statistics.quantiles(seconds, n=100)
    return [f"{cuts[at] * 1e3:.0f}" for at in (49, 94, 98)]


def kinds() -> dict[str, Kind]:
    """What is asked, by its name."""
    emoji = load()
    names, urls = [one.name for one in emoji], [data_url(one.picture) for one in emoji]
    label_lists = [names[start : start + 20] for start in range(0, 200, 7)]

    def bodies(parts: Sequence[dict[str, Any]]) -> list[bytes]:
        return [json.dumps({"model": NAME, **part}).encode() for part in parts]

    queries = [name if number % 2 else {"image": urls[number]} for number, name in enumerate(names)]
    refused = [{"input": {"image": BOMB}}, {"input": []}, {"input": "猫" * 400_000}, {"input": ["猫"] * 5000}]
    return {
        "texts": Kind("/v1/embeddings", bodies([{"input": name} for name in names]), WELL),
        "pictures": Kind("/v1/embeddings", bodies([{"input": {"image": url}} for url in urls]), WELL),
        "labels": Kind(
            "/v1/classify",
            bodies([{"image": u, "labels": few} for u, few in zip(urls, itertools.cycle(label_lists), strict=False)]),
            WELL,
        ),
        "searches": Kind("/v1/search", bodies([{"query": query, "k": 20} for query in queries]), WELL),
        "refused": Kind("/v1/embeddings", bodies(refused), frozenset({400, 413})),
    }


async def soak(options: Options, pid: int, port: int) -> tuple[dict[str, list[float]], dict[str, int], list[float]]:
    """Seconds of each answer and number of 503, by kind; the memory of the process, in MB, over the time."""
    until = time.perf_counter() + 60 * options.minutes
    seconds: dict[str, list[float]] = defaultdict(list)
    refused: dict[str, int] = defaultdict(int)

    async def client(name: str, kind: Kind, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in itertools.islice(itertools.cycle(kind.bodies), number * 37, None):
            begin = time.perf_counter()
            if begin >= until:
                break
            status, answer = await exchange(reader, writer, f"POST {kind.path}", body)
            if status in kind.statuses:
                seconds[name].append(time.perf_counter() - begin)
            elif status == 503:
                refused[name] += 1
                await asyncio.sleep(PAUSE_AFTER_REFUSAL)
            else:
                raise DataError(f"{name}: expected {sorted(kind.statuses)}, got {status} {answer[:200]!r}")
            if name == "refused":
                await asyncio.sleep(PAUSE_AFTER_REFUSAL)
        writer.close()
        await writer.wait_closed()

    async def watch() -> list[float]:
        memory_mb = []
        while time.perf_counter() < until:
            await asyncio.sleep(SAMPLE_SECONDS)
            memory_mb.append(resident_mb(pid))
        return memory_mb

    every = [client(name, kind, number) for name, kind in kinds().items() for number in range(options.clients)]
    memory_mb, *_ = await asyncio.gather(watch(), *every)
    return seconds, refused, memory_mb


def resident_mb(pid: int) -> float:
    """Resident memory of a process, from /proc."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def thirds(values: Sequence[float]) -> list[Sequence[float]]:
    cuts = [round(part * len(values) / 3) for part in range(4)]
    return [values[begin:end] for begin, end in itertools.pairwise(cuts)]


def main(args: Sequence[str] | None = None) -> None:
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
