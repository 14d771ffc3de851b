"""Exact search of an index beside numpy's product and argpartition over the same vectors, in turns in one process.

python benchmarks/exact.py
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from cn_clip import command, ranks  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402
from cn_clip.processes import usable_cores  # noqa: E402
from cn_clip.retrieval.manifest import Manifest, ModelInfo, VectorType  # noqa: E402
from cn_clip.retrieval.store import Index, open_index  # noqa: E402
from cn_clip.retrieval.writer import NewItem, open_writer  # noqa: E402
from cn_clip.settings import Range  # noqa: E402

# N rows, Q queries, D dimensions, K results

GOAL = 1.3
K = 10
COMMIT = 10_000
# Seconds before each turn: OpenBLAS's threads wait busily for a while after a product, which the other would pay for.
PAUSE = 0.2
TYPES: tuple[VectorType, ...] = ("float32", "float16")

Rows = NDArray[np.float32]
Found = tuple[NDArray[np.int64], Rows]


@dataclass(frozen=True)
class Options:
    """Measures the CPU time and the wall time of both; exits with 1 where ours misses the goal or is not exact."""

    vectors: str = ""
    """Unit vectors to search, an .npy file; random ones by default."""
    queries: str = ""
    """Unit vectors to search for, an .npy file; random ones by default."""
    rows: Annotated[int, Range(least=K)] = 100_000
    """How many vectors to search."""
    dimensions: Annotated[int, Range(least=1)] = 512
    """Length of random vectors."""
    batch: Annotated[int, Range(least=2)] = 64
    """How many queries at once, beside one alone."""
    rounds: Annotated[int, Range(least=1)] = 7
    """Of so many turns the median counts."""
    json: bool = False
    """Print the numbers as one JSON object instead of a table."""


@dataclass(frozen=True)
class Result:
    """Medians. numpy: over the vectors as float32; numpy_f16: over float16 as it is kept, which numpy computes slowly.

    is_exact: the rows and the bits of the scores are those of a full sort of float64 scores, rounded to float32.
    """

    vector_type: VectorType
    num_queries: int
    ours_cpu_ms: float
    ours_wall_ms: float
    numpy_cpu_ms: float
    numpy_wall_ms: float
    ratio: float
    numpy_f16_cpu_ms: float | None
    is_exact: bool


def run(options: Options) -> int:
    """Returns 1 when ours misses the goal or is not exact."""
    say = command.Speaker(quiet=options.json)
    vectors_ND, queries_QD = inputs(options)
    facts = environment(vectors_ND)
    say("\n".join(f"{name}: {value}" for name, value in facts.items()))
    say(f"{'':22}{'ours CPU':>12}{'wall':>12}{'numpy CPU':>12}{'wall':>12}{'ratio':>8}{'numpy f16':>12}  exact")
    results = []
    for vector_type in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            index = built(Path(folder) / "index", vectors_ND, vector_type)
            kept_ND = vectors_ND.astype(vector_type)
            for num_queries in (1, options.batch):
                results.append(measured(index, kept_ND, queries_QD[:num_queries], options.rounds))
                say(line(results[-1]))
    is_met = all(one.ratio <= GOAL and one.is_exact for one in results)
    say(f"goal: at most {GOAL} times numpy's CPU time, and exact: {'met' if is_met else 'MISSED'}")
    say.result({**facts, "results": [asdict(one) for one in results], "goal": GOAL, "is_met": is_met})
    return int(not is_met)


def inputs(options: Options) -> tuple[Rows, Rows]:
    """Vectors and queries; one vector in a hundred comes twice, so that there are ties."""
    generator = np.random.default_rng(0)
    if bool(options.vectors) != bool(options.queries):
        raise ConfigError("--vectors, --queries: give both or neither")
    if options.vectors:
        vectors_ND = np.load(options.vectors, mmap_mode="r")[: options.rows].astype(np.float32)
        queries_QD = np.load(options.queries, mmap_mode="r")[: options.batch].astype(np.float32)
    else:
        shape = (options.rows + options.batch, options.dimensions)
        rows_MD = generator.standard_normal(shape, dtype=np.float32)
        rows_MD /= np.linalg.norm(rows_MD, axis=1, keepdims=True)
        vectors_ND, queries_QD = rows_MD[: options.rows], rows_MD[options.rows :]
    vectors_ND[-len(vectors_ND) // 100 :] = vectors_ND[: -(-len(vectors_ND) // 100)]
    return vectors_ND, queries_QD


def environment(vectors_ND: Rows) -> dict[str, Any]:
    """What the numbers depend on."""
    blas: Any = np.show_config(mode="dicts")
    return {
        "processor": ranks.processor()[0],
        "cores": usable_cores(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "numpy": np.__version__,
        "BLAS": " ".join(str(blas["Build Dependencies"]["blas"].get(name)) for name in ("name", "version")),
        "shape": list(vectors_ND.shape),
        "k": K,
    }


def built(folder: Path, vectors_ND: Rows, vector_type: VectorType) -> Index:
    """As `cn-clip index build` writes it, in commits."""
    create = Manifest(ModelInfo("", "", vectors_ND.shape[1]), vector_type=vector_type)
    with open_writer(folder, create) as writer:
        for start in range(0, len(vectors_ND), COMMIT):
            part_ND = vectors_ND[start : start + COMMIT]
            writer.commit([NewItem(number, vector_D, {}) for number, vector_D in enumerate(part_ND, start)])
        writer.finish()
    return open_index(folder)


def measured(index: Index, kept_ND: NDArray[np.floating], queries_QD: Rows, rounds: int) -> Result:
    """Both in turns. kept_ND: the vectors of the index in memory."""
    plain_ND = kept_ND.astype(np.float32)
    alive_N = index.snapshot.alive_N

    def ours() -> object:
        return index.engine.search(queries_QD, K, alive_N)

    def of_numpy() -> object:
        return by_numpy(plain_ND, queries_QD)

    for search in (ours, of_numpy):
        search()
    cpu: dict[object, list[float]] = {ours: [], of_numpy: []}
    wall: dict[object, list[float]] = {ours: [], of_numpy: []}
    for _ in range(rounds):
        for search in (ours, of_numpy):
            time.sleep(PAUSE)
            cpu_ms, wall_ms = timed(search)
            cpu[search].append(cpu_ms)
            wall[search].append(wall_ms)
    halves = None if kept_ND.dtype == np.float32 else timed(lambda: by_numpy(kept_ND, queries_QD.astype(np.float16)))[0]
    mine, other = statistics.median(cpu[ours]), statistics.median(cpu[of_numpy])
    is_exact = all(
        np.array_equal(positions, expected) and np.array_equal(scores.view(np.int32), expected_scores.view(np.int32))
        for (positions, scores), (expected, expected_scores) in zip(
            index.engine.search(queries_QD, K, alive_N), oracle(plain_ND, queries_QD), strict=True
        )
    )
    return Result(
        index.manifest.vector_type,
        len(queries_QD),
        mine,
        statistics.median(wall[ours]),
        other,
        statistics.median(wall[of_numpy]),
        mine / other,
        halves,
        is_exact,
    )


def by_numpy(rows_ND: NDArray[np.floating], queries_QD: NDArray[np.floating]) -> object:
    """What one writes without a library: a product, and the K best of each query in any order."""
    if len(queries_QD) == 1:
        return np.argpartition(rows_ND @ queries_QD[0], -K)[-K:]
    return np.argpartition(queries_QD @ rows_ND.T, -K, axis=1)[:, -K:]


def timed(search: Callable[[], object]) -> tuple[float, float]:
    """(CPU time of all threads, wall time) in milliseconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    search()
    return (time.process_time() - cpu) * 1000, (time.perf_counter() - wall) * 1000


def oracle(rows_ND: Rows, queries_QD: Rows) -> Iterator[Found]:
    """Every score in float64, rounded to float32, and a full sort by falling score and rising row."""
    step = 8192
    for query_D in queries_QD.astype(np.float64):
        parts = [(rows_ND[start : start + step] * query_D).sum(axis=1) for start in range(0, len(rows_ND), step)]
        scores_N = np.concatenate(parts).astype(np.float32)
        best_K = np.lexsort((np.arange(len(scores_N)), -scores_N))[:K]
        yield best_K, scores_N[best_K]


def line(result: Result) -> str:
    """A row of the table."""
    halves = "" if result.numpy_f16_cpu_ms is None else f"{result.numpy_f16_cpu_ms:.1f} ms"
    name = f"{result.vector_type}, {result.num_queries} quer{'y' if result.num_queries == 1 else 'ies'}"
    times = (result.ours_cpu_ms, result.ours_wall_ms, result.numpy_cpu_ms, result.numpy_wall_ms)
    return (
        f"{name:22}{''.join(f'{value:>9.1f} ms' for value in times)}{result.ratio:>7.2f}x{halves:>12}"
        f"  {'yes' if result.is_exact else 'NO'}"
    )


if __name__ == "__main__":
    command.execute(run, Options)
