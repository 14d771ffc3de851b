"""The engine quantized beside exact search: CPU time of a query in turns, answers compared bit for bit, shares proven.

python benchmarks/picture_vectors.py …   # makes pictures.npy and texts.npy
python benchmarks/quantized.py --vectors pictures.npy --queries texts.npy
"""

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Before the libraries count the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from cn_clip import command  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402
from cn_clip.retrieval.codes import NAME  # noqa: E402
from cn_clip.retrieval.engines import ExactEngine, Found  # noqa: E402
from cn_clip.retrieval.manifest import Manifest, ModelInfo  # noqa: E402
from cn_clip.retrieval.quantized import QuantizedEngine  # noqa: E402
from cn_clip.retrieval.segments import VECTORS  # noqa: E402
from cn_clip.retrieval.store import open_index  # noqa: E402
from cn_clip.retrieval.writer import NewItem, open_writer  # noqa: E402

# N rows, Q queries, D dimensions

Rows = NDArray[np.float32]

K = 10
BATCH = 64
# Of numpy, and of the exact engine, so many queries are timed: they vary little, and the exact engine takes long.
SLOW = 20


@dataclass(frozen=True)
class Options:
    """Compares the engines on vectors of files, or else on clustered vectors and on noise."""

    vectors: Path | None = None
    """An npy file of rows."""
    queries: Path | None = None
    """An npy file of queries."""
    count: int = 200_000
    """How many rows, at most."""
    dimensions: int = 512
    """Length of made-up vectors."""
    num_queries: int = 1000
    """How many queries, at most."""
    json: bool = False
    """Print the numbers as one JSON object instead of a table."""


@dataclass(frozen=True)
class Result:
    """Milliseconds are CPU time of a query, medians of queries one by one; batch: the mean of 64 at a time.

    left: rows that the head and the whole codes leave of a query, on average.
    """

    kind: str
    rows: int
    queries: int
    numpy_ms: float
    exact_ms: float
    exact_batch_ms: float
    quantized_ms: float
    quantized_wall_ms: float
    quantized_batch_ms: float
    identical: int
    proven: float
    left_by_heads: float
    left_by_codes: float
    head: list[int]
    bytes_per_vector: float
    codes_per_vector: float
    build_seconds: float


def run(options: Options) -> int:
    """Returns 1 when an answer differs."""
    say = command.Speaker(quiet=options.json)
    if (options.vectors is None) != (options.queries is None):
        raise ConfigError("--vectors, --queries: give both, or neither")
    results = []
    for kind, vectors_ND, queries_QD in inputs(options):
        with tempfile.TemporaryDirectory() as folder:
            results.append(measured(kind, Path(folder) / "index", vectors_ND, queries_QD))
        say(line(results[-1]))
    say.result({"results": [asdict(one) for one in results], "machine": platform.machine()})
    return int(any(one.identical < one.queries for one in results))


def inputs(options: Options) -> list[tuple[str, Rows, Rows]]:
    """(kind, rows, queries), unit vectors."""
    if options.vectors is not None and options.queries is not None:
        rows, queries = (np.load(path, mmap_mode="r") for path in (options.vectors, options.queries))
        taken = np.linspace(0, len(queries) - 1, min(options.num_queries, len(queries))).astype(int)
        return [("file", _units(rows[: options.count]), _units(queries[taken]))]
    generator = np.random.default_rng(0)

    def noise(count: int) -> Rows:
        return generator.standard_normal((count, options.dimensions), dtype=np.float32)

    centres = _units(noise(1000))
    spread = np.float32(0.7 / np.sqrt(options.dimensions))

    def around(count: int) -> Rows:
        return _units(centres[generator.integers(0, len(centres), count)] + spread * noise(count))

    return [
        ("clustered", around(options.count), around(options.num_queries)),
        ("noise", _units(noise(options.count)), _units(noise(options.num_queries))),
    ]


def _units(rows: Any) -> Rows:
    rows = np.asarray(rows, dtype=np.float32)
    unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def measured(kind: str, folder: Path, vectors_ND: Rows, queries_QD: Rows) -> Result:
    """One kind of vectors: an index on disk, and all engines over it in turns."""
    started = time.process_time()
    with open_writer(folder, Manifest(ModelInfo("", "", vectors_ND.shape[1]), engine="quantized")) as writer:
        writer.commit([NewItem(number, vector, {}) for number, vector in enumerate(vectors_ND)])
        writer.finish()
    built = time.process_time() - started
    index = open_index(folder)
    engine, exact, alive_N = index.engine, ExactEngine(index.snapshot.rows), index.snapshot.alive_N
    if not isinstance(engine, QuantizedEngine):
        raise ConfigError("--count: so few are searched exactly")
    exact.search(queries_QD[:1], K, alive_N)  # checks every block, as the first searches do
    engine.search(queries_QD[:BATCH], K, alive_N)
    engine.counts.__init__()  # type: ignore[misc]
    times: dict[str, list[float]] = {"numpy": [], "exact": [], "quantized": [], "wall": []}
    found: list[Found] = []
    every = max(1, len(queries_QD) // SLOW)
    for number, query_1D in enumerate(queries_QD[:, None]):
        wall = time.perf_counter()
        found.append(_timed(times["quantized"], lambda query_1D=query_1D: engine.search(query_1D, K, alive_N)[0]))
        times["wall"].append(time.perf_counter() - wall)
        if number % every == 0:
            _timed(times["numpy"], lambda query_1D=query_1D: _by_numpy(vectors_ND, query_1D[0]))
            _timed(times["exact"], lambda query_1D=query_1D: exact.search(query_1D, K, alive_N))
    counts = engine.counts
    batches = [queries_QD[start : start + BATCH] for start in range(0, len(queries_QD), BATCH)]
    truth, batch_times, exact_times = list[Found](), list[float](), list[float]()
    for batch_QD in batches:
        truth.extend(_timed(exact_times, lambda batch_QD=batch_QD: exact.search(batch_QD, K, alive_N)))
    left = counts.after_head / max(1, counts.proven), counts.after_codes / max(1, counts.proven)
    proven = counts.proven / counts.queries
    for batch_QD in batches[: SLOW // 4]:
        _timed(batch_times, lambda batch_QD=batch_QD: engine.search(batch_QD, K, alive_N))
    files = dict(index.manifest.files())
    sizes = {name: sum(one.bytes for path, one in files.items() if path.endswith(name)) for name in (VECTORS, NAME)}
    medians = {name: 1000 * float(np.median(one)) for name, one in times.items()}
    return Result(
        kind,
        len(vectors_ND),
        len(queries_QD),
        medians["numpy"],
        medians["exact"],
        1000 * sum(exact_times) / len(queries_QD),
        medians["quantized"],
        medians["wall"],
        1000 * float(np.median(batch_times)) / len(batches[0]),
        sum(_is_same(one, other) for one, other in zip(found, truth, strict=True)),
        proven,
        *left,
        [codes.layout.head for codes, _ in engine._codes()[0]],
        sum(sizes.values()) / len(vectors_ND),
        sizes[NAME] / len(vectors_ND),
        built,
    )


def _by_numpy(vectors_ND: Rows, query_D: Rows) -> Any:
    scores_N = vectors_ND @ query_D
    return np.argpartition(scores_N, len(scores_N) - K)[-K:]


def _timed(times: list[float], act: Callable[[], Any]) -> Any:
    started = time.process_time()
    result = act()
    times.append(time.process_time() - started)
    return result


def _is_same(one: Found, other: Found) -> bool:
    return one[0].tolist() == other[0].tolist() and one[1].tobytes() == other[1].tobytes()


def line(one: Result) -> str:
    return (
        f"{one.kind}, {one.rows:,} rows: CPU ms a query: numpy {one.numpy_ms:.1f}, exact {one.exact_ms:.1f} "
        f"(64 at once {one.exact_batch_ms:.2f}), quantized {one.quantized_ms:.2f} (64 at once "
        f"{one.quantized_batch_ms:.2f}; wall {one.quantized_wall_ms:.2f}); {one.numpy_ms / one.quantized_ms:.1f} times "
        f"as fast as numpy, {one.exact_ms / one.quantized_ms:.1f} as exact; {one.identical} of {one.queries} answers "
        f"identical; {one.proven:.1%} proven; heads of {one.head} leave {one.left_by_heads:,.0f} rows, codes "
        f"{one.left_by_codes:,.0f}; {one.codes_per_vector:.0f} bytes of codes a vector, {one.bytes_per_vector:,.0f} in "
        f"all; built in {one.build_seconds:.0f} s of CPU time"
    )


if __name__ == "__main__":
    command.execute(run, Options)
