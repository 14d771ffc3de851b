"""Approximate search beside exact: an index of ours with the engine usearch, and HNSW of faiss, on one core.

pip install faiss-cpu
python benchmarks/ann.py
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
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from cn_clip import command  # noqa: E402
from cn_clip.errors import ConfigError, MissingExtraError  # noqa: E402
from cn_clip.retrieval import flat  # noqa: E402
from cn_clip.retrieval.graph import GRAPH_OPTIONS, GraphEngine  # noqa: E402
from cn_clip.retrieval.manifest import Manifest, ModelInfo  # noqa: E402
from cn_clip.retrieval.segments import VECTORS  # noqa: E402
from cn_clip.retrieval.store import Index, open_index  # noqa: E402
from cn_clip.retrieval.writer import NewItem, open_writer  # noqa: E402

# N rows, Q queries, D dimensions

GOAL_RECALL = 0.99
GOAL_P95_MS = 2.0
K = 10
COMMIT = 10_000
WARM_UP = 100

Rows = NDArray[np.float32]
Search = Callable[[Rows], list[int]]


@dataclass(frozen=True)
class Options:
    """Measures recall at 10, the time of a query, of building, and the size; exits with 1 when ours misses the goal."""

    vectors: int = 200_000
    """How many vectors to search."""
    dimensions: int = 512
    """Their length."""
    centres: int = 1000
    """Around so many centres they lie, as the features of like pictures do."""
    queries: int = 1000
    """How many queries, one after the other."""
    json: bool = False
    """Print the numbers as one JSON object instead of a table."""


@dataclass(frozen=True)
class Result:
    """What was measured of one engine. bytes_per_vector: on disk, graph and vectors."""

    engine: str
    recall: float
    p50_ms: float
    p95_ms: float
    build_seconds: float
    bytes_per_vector: float


def run(options: Options) -> int:
    """Returns 1 when ours misses a goal."""
    faiss = _faiss()
    say = command.Speaker(quiet=options.json)
    vectors_ND, queries_QD = inputs(options)
    results = [exact(vectors_ND, queries_QD)]
    truth = flat.top_k(queries_QD, vectors_ND, K).indices
    with tempfile.TemporaryDirectory() as folder:
        results.append(ours(Path(folder) / "index", vectors_ND, queries_QD, truth))
    results.append(of_faiss(faiss, vectors_ND, queries_QD, truth))
    is_met = results[1].recall >= GOAL_RECALL and results[1].p95_ms <= GOAL_P95_MS
    say(table(results, options, faiss.__version__, is_met=is_met))
    say.result({"results": [asdict(one) for one in results], "is_met": is_met, "graph": GRAPH_OPTIONS})
    return int(not is_met)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("the comparison needs faiss; install it with: pip install faiss-cpu") from error
    faiss.omp_set_num_threads(1)
    return faiss


def inputs(options: Options) -> tuple[Rows, Rows]:
    """Unit vectors and queries around the same centres, a cosine of some 0.8 from them."""
    if options.centres < 1 or options.vectors < COMMIT:
        raise ConfigError(f"--centres, --vectors: expected at least 1 and {COMMIT}")
    generator = np.random.default_rng(0)
    centres = _units(generator.standard_normal((options.centres, options.dimensions), dtype=np.float32))
    spread = np.float32(0.7 / np.sqrt(options.dimensions))

    def around(count: int) -> Rows:
        noise = generator.standard_normal((count, options.dimensions), dtype=np.float32)
        return _units(centres[generator.integers(0, len(centres), count)] + spread * noise)

    return around(options.vectors), around(options.queries)


def _units(rows: Rows) -> Rows:
    unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def exact(vectors_ND: Rows, queries_QD: Rows) -> Result:
    """Every row read, as the engine `exact` does."""
    _, times = timed(lambda query_1D: flat.top_k(query_1D, vectors_ND, K).indices[0].tolist(), queries_QD[:50], 2)
    return Result("exact, float32", 1.0, *_percentiles(times), 0.0, 4.0 * vectors_ND.shape[1])


def ours(folder: Path, vectors_ND: Rows, queries_QD: Rows, truth: Any) -> Result:
    """Through the public interface: what `cn-clip index build --engine usearch` writes and `cn-clip search` calls."""
    create = Manifest(ModelInfo("", "", vectors_ND.shape[1]), engine="usearch", vector_type="float16")
    started = time.perf_counter()
    with open_writer(folder, create) as writer:
        for start in range(0, len(vectors_ND), COMMIT):
            part = vectors_ND[start : start + COMMIT]
            writer.commit([NewItem(number, vector, {}) for number, vector in enumerate(part, start)])
        writer.finish()
    seconds = time.perf_counter() - started
    index = open_index(folder)
    if not isinstance(index.engine, GraphEngine):
        raise ConfigError("--vectors: so few are searched without a graph")
    found, times = timed(lambda query_1D: [int(hit.id) for hit in index.search(query_1D, K)[0]], queries_QD, WARM_UP)
    size = _bytes_on_disk(index) / len(vectors_ND)
    return Result("cn_clip, usearch f16", _recall(found, truth), *_percentiles(times), seconds, size)


def _bytes_on_disk(index: Index) -> int:
    files = index.manifest.files()
    return sum(facts.bytes for name, facts in files if name.endswith((".usearch", VECTORS)))


def of_faiss(faiss: Any, vectors_ND: Rows, queries_QD: Rows, truth: Any) -> Result:
    """The same algorithm with the same settings, in memory and over float32."""
    started = time.perf_counter()
    index = faiss.IndexHNSWFlat(vectors_ND.shape[1], GRAPH_OPTIONS["connectivity"], faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = GRAPH_OPTIONS["expansion_add"]
    index.hnsw.efSearch = GRAPH_OPTIONS["expansion_search"]
    index.add(vectors_ND)
    seconds = time.perf_counter() - started
    found, times = timed(lambda query_1D: index.search(query_1D, K)[1][0].tolist(), queries_QD, WARM_UP)
    size = faiss.serialize_index(index).nbytes / len(vectors_ND)
    return Result("faiss, HNSWFlat", _recall(found, truth), *_percentiles(times), seconds, size)


def timed(search: Search, queries_QD: Rows, warm_up: int) -> tuple[list[list[int]], list[float]]:
    """What is found for each query, and the seconds it took."""
    for query_1D in queries_QD[:warm_up, None]:
        search(query_1D)
    found, times = [], []
    for query_1D in queries_QD[:, None]:
        started = time.perf_counter()
        found.append(search(query_1D))
        times.append(time.perf_counter() - started)
    return found, times


def _percentiles(times: list[float]) -> tuple[float, float]:
    p50, p95 = np.percentile(times, [50, 95]) * 1000
    return float(p50), float(p95)


def _recall(found: list[list[int]], truth: Any) -> float:
    return float(np.mean([len(set(one) & set(best)) / K for one, best in zip(found, truth.tolist(), strict=True)]))


def table(results: list[Result], options: Options, faiss_version: str, *, is_met: bool) -> str:
    import usearch

    settings = ", ".join(f"{name} {value}" for name, value in GRAPH_OPTIONS.items())
    return "\n".join(
        [
            f"{options.vectors:,} unit vectors of {options.dimensions} around {options.centres:,} centres, "
            f"{options.queries:,} queries one by one, top {K}; one core, {platform.machine()}",
            f"usearch {usearch.__version__}, faiss {faiss_version}; {settings}",
            f"{'':22}{'recall@10':>10}{'p50':>11}{'p95':>11}{'build':>10}{'bytes/vector':>14}",
            *(
                f"{one.engine:22}{one.recall:>10.4f}{one.p50_ms:>8.2f} ms{one.p95_ms:>8.2f} ms"
                f"{one.build_seconds:>8.0f} s{one.bytes_per_vector:>14,.0f}"
                for one in results
            ),
            f"goal of ours: recall@10 at least {GOAL_RECALL}, p95 at most {GOAL_P95_MS:g} ms: "
            f"{'met' if is_met else 'MISSED'}",
        ]
    )


if __name__ == "__main__":
    command.execute(run, Options)
