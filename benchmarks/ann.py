"""Approximate search side by side: an index of ours with the engine usearch, and the libraries of graphs and lists.

pip install faiss-cpu hnswlib voyager scann
python benchmarks/ann.py
python benchmarks/picture_vectors.py --data FLICKR8K_CN --output FOLDER
python benchmarks/ann.py --vectors FOLDER/pictures.npy --queries FOLDER/texts.npy

All have one core and the same settings of the graph. Each searches as wide as it must to find 99 % of the ten best, so
the times are those of equal answers; ours searches as it always does. Times are processor time.
"""

import importlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

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

# N rows, Q queries, D dimensions, K results, C candidates

GOAL_RECALL = 0.99
GOAL_P95_MS = 2.0
K = 10
COMMIT = 10_000
WARM_UP = 100
WIDTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536)
# Of a library that keeps less than float16: so many are compared again with the vectors themselves.
AGAIN = 3 * K

CONNECTIVITY, EXPANSION_ADD = GRAPH_OPTIONS["connectivity"], GRAPH_OPTIONS["expansion_add"]

Rows = NDArray[np.float32]
Search = Callable[[Rows], list[int]]


@dataclass(frozen=True)
class Options:
    """Measures recall at 10, the time of a query, of building, and the size; exits with 1 when ours misses the goal."""

    vectors: Path | None = None
    """A .npy of unit vectors to search; left out, vectors around centres are made up."""
    queries: Path | None = None
    """A .npy of queries."""
    limit: int = 200_000
    """How many of the vectors, or how many to make up."""
    num_queries: int = 1000
    """How many queries, one after the other."""
    dimensions: int = 512
    """Length of the vectors that are made up."""
    centres: int = 1000
    """Around so many centres they lie, as the features of like pictures do."""
    rounds: int = 3
    """How often each query is asked of each library, in turns; its median counts."""
    only: tuple[str, ...] = ()
    """Measure the rows whose names contain one of these."""
    cache: Path | None = None
    """Keep what is built in this folder, and take it from there the next time."""
    json: bool = False
    """Print the numbers as one JSON object instead of a table."""

    def __post_init__(self) -> None:
        if (self.vectors is None) != (self.queries is None):
            raise ConfigError("--vectors and --queries: give both, or none")
        if self.centres < 1 or self.limit < COMMIT:
            raise ConfigError(f"--centres, --limit: expected at least 1 and {COMMIT}")


class Opened(NamedTuple):
    """What a library has built: the keys it finds for a query (1, D) at a width, and bytes on disk.

    widths: what may be tried.
    """

    search: Callable[[Rows, int], Sequence[int]]
    num_bytes: int
    widths: Sequence[int] = WIDTHS


class Library(NamedTuple):
    """One row of the table: writes what it builds of vectors into a folder, and opens it. shared: the row it is of."""

    name: str
    module: str
    build: Callable[[Path, Rows], None]
    load: Callable[[Path, Rows], Opened]
    shared: str = ""

    @property
    def folder(self) -> str:
        return self.shared or self.name


@dataclass(frozen=True)
class Result:
    """What was measured of one library. bytes_per_vector: on disk, with the vectors where answers need them."""

    engine: str
    width: int
    recall: float
    p50_ms: float
    p95_ms: float
    build_seconds: float
    bytes_per_vector: float


def run(options: Options) -> int:
    """Returns 1 when ours misses a goal."""
    say = command.Speaker(quiet=options.json)
    vectors_ND, queries_QD = inputs(options)
    truth = flat.top_k(queries_QD, vectors_ND, K).indices
    with tempfile.TemporaryDirectory() as temporary:
        root = options.cache or Path(temporary)
        opened, seconds = {}, {}
        for library in libraries(options, say):
            seconds[library.name] = built(root, library, vectors_ND)
            opened[library.name] = library.load(root / library.folder, vectors_ND)
        found = measured(opened, queries_QD, truth, options.rounds)
    rows = [Result(name, *found[name], seconds[name], one.num_bytes / len(vectors_ND)) for name, one in opened.items()]
    ours = next((one for one in rows if one.engine == OURS), None)
    is_met = ours is not None and ours.recall >= GOAL_RECALL and ours.p95_ms <= GOAL_P95_MS
    say(table(rows, len(vectors_ND), vectors_ND.shape[1], options, is_met=is_met))
    say.result({"results": [asdict(one) for one in rows], "is_met": is_met, "graph": GRAPH_OPTIONS})
    return int(not is_met)


def inputs(options: Options) -> tuple[Rows, Rows]:
    """The vectors and queries of files, or unit vectors and queries around the same centres, a cosine of 0.8 away."""
    if options.vectors is not None and options.queries is not None:
        vectors_ND = np.load(options.vectors, mmap_mode="r")[: options.limit]
        queries_QD = np.load(options.queries, mmap_mode="r")[: options.num_queries]
        return np.array(vectors_ND, np.float32), np.array(queries_QD, np.float32)  # voyager wants to write
    generator = np.random.default_rng(0)
    centres = _units(generator.standard_normal((options.centres, options.dimensions), dtype=np.float32))
    spread = np.float32(0.7 / np.sqrt(options.dimensions))

    def around(count: int) -> Rows:
        noise = generator.standard_normal((count, options.dimensions), dtype=np.float32)
        return _units(centres[generator.integers(0, len(centres), count)] + spread * noise)

    return around(options.limit), around(options.num_queries)


def _units(rows: Rows) -> Rows:
    unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def built(root: Path, library: Library, vectors_ND: Rows) -> float:
    """Seconds that building took, now or when the folder was made."""
    folder, note = root / library.folder, root / f"{library.folder}.json"
    facts = {"rows": len(vectors_ND), "graph": [CONNECTIVITY, EXPANSION_ADD], "first": float(vectors_ND[0, 0])}
    if note.is_file() and (known := json.loads(note.read_text(encoding="utf-8"))).items() >= facts.items():
        return float(known["seconds"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.process_time()
    library.build(folder, vectors_ND)
    seconds = time.process_time() - started
    note.write_text(json.dumps({**facts, "seconds": seconds}), encoding="utf-8")
    return seconds


def measured(
    opened: dict[str, Opened], queries_QD: Rows, truth: Any, rounds: int
) -> dict[str, tuple[int, float, float, float]]:
    """(width, recall, p50, p95) of each library at the smallest width that finds enough, or at the largest."""
    chosen: dict[str, tuple[int, float]] = {}
    for name, one in opened.items():
        recall, width = 0.0, 0
        for width in one.widths:
            recall = _recall([one.search(query_1D, width) for query_1D in queries_QD[:, None]], truth)
            if recall >= GOAL_RECALL:
                break
        chosen[name] = (width, recall)
    times: dict[str, list[list[float]]] = {name: [] for name in opened}
    for _ in range(rounds):
        for name, one in opened.items():
            times[name].append(timed(one, chosen[name][0], queries_QD))
    return {name: (*chosen[name], *_percentiles(times[name])) for name in opened}


def timed(one: Opened, width: int, queries_QD: Rows) -> list[float]:
    """Seconds of processor time of each query."""
    for query_1D in queries_QD[:WARM_UP, None]:
        one.search(query_1D, width)
    times = []
    for query_1D in queries_QD[:, None]:
        started = time.process_time()
        one.search(query_1D, width)
        times.append(time.process_time() - started)
    return times


def _percentiles(times_RQ: list[list[float]]) -> tuple[float, float]:
    p50, p95 = np.percentile(np.median(times_RQ, axis=0), [50, 95]) * 1000
    return float(p50), float(p95)


def _recall(found: Sequence[Sequence[int]], truth: Any) -> float:
    return float(np.mean([len(set(one) & set(best)) / K for one, best in zip(found, truth.tolist(), strict=True)]))


def compared_again(keys_C: Any, query_1D: Rows, vectors_ND: Rows) -> list[int]:
    """The best of the candidates by the vectors themselves."""
    keys_C = keys_C[keys_C >= 0]
    order = np.argsort(-(vectors_ND[keys_C] @ query_1D[0]), kind="stable")[:K]
    best: list[int] = keys_C[order].tolist()
    return best


# ---- ours, through the public interface: what `cn-clip index build --engine usearch` writes and `cn-clip search` calls

OURS, WITH_ITEMS = "cn_clip", "cn_clip, items"


def build_ours(folder: Path, vectors_ND: Rows) -> None:
    create = Manifest(ModelInfo("", "", vectors_ND.shape[1]), engine="usearch", vector_type="float16")
    with open_writer(folder / "index", create) as writer:
        for start in range(0, len(vectors_ND), COMMIT):
            part = vectors_ND[start : start + COMMIT]
            writer.commit([NewItem(number, vector, {}) for number, vector in enumerate(part, start)])
        writer.finish()


def open_ours(folder: Path, vectors_ND: Rows) -> Opened:
    """Keys and scores, which is what the libraries give."""
    index, num_bytes, width = opened_index(folder)

    def search(query_1D: Rows, _: int) -> Sequence[int]:
        found: list[int] = index.engine.search(query_1D, K, index.snapshot.alive_N)[0][0].tolist()
        return found

    return Opened(search, num_bytes, [width])


def open_with_items(folder: Path, vectors_ND: Rows) -> Opened:
    """With the ids and metadata of what is found."""
    index, num_bytes, width = opened_index(folder)
    return Opened(lambda query_1D, _: [int(hit.id) for hit in index.search(query_1D, K)[0]], num_bytes, [width])


def opened_index(folder: Path) -> tuple[Index, int, int]:
    """The index, its bytes for searching, and the width that it chose."""
    index = open_index(folder / "index")
    if not isinstance(index.engine, GraphEngine) or index.engine.graph is None:
        raise ConfigError("--limit: so few are searched without a graph")
    files = index.manifest.files()
    num_bytes = sum(facts.bytes for name, facts in files if name.endswith((".usearch", VECTORS)))
    return index, num_bytes, index.engine.graph.kind.width or 0


# ---- usearch


def of_usearch(dtype: str) -> Library:
    def empty(vectors_ND: Rows) -> Any:
        from usearch.index import Index

        graph = {"connectivity": CONNECTIVITY, "expansion_add": EXPANSION_ADD}
        return Index(ndim=vectors_ND.shape[1], metric="ip", dtype=dtype, **graph)

    def build(folder: Path, vectors_ND: Rows) -> None:
        index = empty(vectors_ND)
        index.add(np.arange(len(vectors_ND), dtype=np.uint64), vectors_ND, threads=1)
        index.save(str(folder / "graph"))

    def open_(folder: Path, vectors_ND: Rows) -> Opened:
        index = empty(vectors_ND)
        index.view(str(folder / "graph"))
        is_short = dtype == "i8"

        def search(query_1D: Rows, width: int) -> Sequence[int]:
            index.expansion_search = width
            keys = np.asarray(index.search(query_1D[0], AGAIN if is_short else K, threads=1).keys).astype(np.int64)
            best: list[int] = keys.tolist()
            return compared_again(keys, query_1D, vectors_ND) if is_short else best

        return Opened(search, _size(folder) + is_short * 2 * vectors_ND[0].size * len(vectors_ND))

    return Library(f"usearch {dtype}", "usearch", build, open_)


# ---- faiss


def of_faiss(name: str, factory: str, *, is_short: bool = False, is_list: bool = False) -> Library:
    def build(folder: Path, vectors_ND: Rows) -> None:
        import faiss

        index = faiss.index_factory(vectors_ND.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not is_list:
            index.hnsw.efConstruction = EXPANSION_ADD
        index.train(vectors_ND)
        index.add(vectors_ND)
        faiss.write_index(index, str(folder / "graph"))

    def open_(folder: Path, vectors_ND: Rows) -> Opened:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.read_index(str(folder / "graph"))
        parameters = faiss.SearchParametersIVF() if is_list else faiss.SearchParametersHNSW()

        def search(query_1D: Rows, width: int) -> Sequence[int]:
            if is_list:
                parameters.nprobe = width
            else:
                parameters.efSearch = width
            keys = index.search(query_1D, AGAIN if is_short else K, params=parameters)[1][0]
            best: list[int] = keys.tolist()
            return compared_again(keys, query_1D, vectors_ND) if is_short else best

        return Opened(search, _size(folder) + is_short * 2 * vectors_ND[0].size * len(vectors_ND))

    return Library(f"faiss {name}", "faiss", build, open_)


# ---- hnswlib, voyager, scann


def build_hnswlib(folder: Path, vectors_ND: Rows) -> None:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=vectors_ND.shape[1])
    index.init_index(max_elements=len(vectors_ND), ef_construction=EXPANSION_ADD, M=CONNECTIVITY)
    index.add_items(vectors_ND, num_threads=1)
    index.save_index(str(folder / "graph"))


def open_hnswlib(folder: Path, vectors_ND: Rows) -> Opened:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=vectors_ND.shape[1])
    index.load_index(str(folder / "graph"))

    def search(query_1D: Rows, width: int) -> Sequence[int]:
        index.set_ef(max(width, K))
        found: list[int] = index.knn_query(query_1D, K, num_threads=1)[0][0].tolist()
        return found

    return Opened(search, _size(folder))


def of_voyager(kind: str) -> Library:
    is_short = kind != "Float32"

    def build(folder: Path, vectors_ND: Rows) -> None:
        import voyager

        index = voyager.Index(
            voyager.Space.InnerProduct,
            vectors_ND.shape[1],
            M=CONNECTIVITY,
            ef_construction=EXPANSION_ADD,
            max_elements=len(vectors_ND),
            storage_data_type=getattr(voyager.StorageDataType, kind),
        )
        index.add_items(vectors_ND, num_threads=1)
        index.save(str(folder / "graph"))

    def open_(folder: Path, vectors_ND: Rows) -> Opened:
        import voyager

        index = voyager.Index.load(str(folder / "graph"))

        def search(query_1D: Rows, width: int) -> Sequence[int]:
            count = AGAIN if is_short else K
            keys = index.query(query_1D[0], count, query_ef=max(width, count))[0].astype(np.int64)
            best: list[int] = keys.tolist()
            return compared_again(keys, query_1D, vectors_ND) if is_short else best

        return Opened(search, _size(folder) + is_short * 2 * vectors_ND[0].size * len(vectors_ND))

    return Library(f"voyager {kind}", "voyager", build, open_)


def build_scann(folder: Path, vectors_ND: Rows) -> None:
    import scann

    leaves = int(2 * np.sqrt(len(vectors_ND)))
    builder = scann.scann_ops_pybind.builder(vectors_ND, 2 * K, "dot_product")
    builder = builder.tree(num_leaves=leaves, num_leaves_to_search=leaves // 10, training_sample_size=len(vectors_ND))
    builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(200)
    builder.set_n_training_threads(1).build().serialize(str(folder))


def open_scann(folder: Path, vectors_ND: Rows) -> Opened:
    import scann

    searcher = scann.scann_ops_pybind.load_searcher(str(folder))

    def search(query_1D: Rows, width: int) -> Sequence[int]:
        keys = searcher.search(query_1D[0], K, pre_reorder_num_neighbors=width, leaves_to_search=max(1, width // 4))[0]
        found: list[int] = keys.tolist()
        return found

    return Opened(search, _size(folder))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


LIBRARIES = (
    Library(OURS, "usearch", build_ours, open_ours),
    Library(WITH_ITEMS, "usearch", build_ours, open_with_items, OURS),
    *(of_usearch(dtype) for dtype in ("f16", "bf16", "i8")),
    of_faiss("HNSW flat", f"HNSW{CONNECTIVITY},Flat"),
    of_faiss("HNSW fp16", f"HNSW{CONNECTIVITY},SQfp16"),
    of_faiss("HNSW SQ8", f"HNSW{CONNECTIVITY},SQ8", is_short=True),
    of_faiss("IVF fp16", "IVF1024,SQfp16", is_list=True),
    Library("hnswlib", "hnswlib", build_hnswlib, open_hnswlib),
    of_voyager("Float32"),
    Library("scann", "scann", build_scann, open_scann),
)
PACKAGES = {"faiss": "faiss-cpu"}


def libraries(options: Options, say: command.Speaker) -> list[Library]:
    """Those that are asked for and installed; says which are not."""
    chosen = [one for one in LIBRARIES if not options.only or any(part in one.name for part in options.only)]
    missing = set()
    for module in dict.fromkeys(one.module for one in chosen):
        try:
            importlib.import_module(module)
        except ImportError:
            missing.add(module)
            say(f"{module} is not installed; its rows are left out: pip install {PACKAGES.get(module, module)}")
    if "usearch" in missing:
        raise MissingExtraError("the comparison needs usearch; install it with: pip install usearch")
    return [one for one in chosen if one.module not in missing]


def table(rows: list[Result], num_rows: int, dimensions: int, options: Options, *, is_met: bool) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in GRAPH_OPTIONS.items())
    names = sorted({PACKAGES.get(one.module, one.module) for one in LIBRARIES})
    versions = ", ".join(f"{name} {version(name)}" for name in names if _is_installed(name))
    kind = f"around {options.centres:,} centres" if options.vectors is None else f"of {options.vectors.name}"
    asked = "" if options.queries is None else f" of {options.queries.name}"
    return "\n".join(
        [
            f"{num_rows:,} unit vectors of {dimensions} {kind}, {options.num_queries:,} queries{asked} one by one, "
            f"top {K}; one core, {platform.machine()}",
            f"{versions}; {settings}",
            f"{'':18}{'width':>7}{'recall@10':>11}{'p50':>11}{'p95':>11}{'build':>9}{'bytes/vector':>14}",
            *(
                f"{one.engine:18}{one.width:>7}{one.recall:>11.4f}{one.p50_ms:>8.2f} ms{one.p95_ms:>8.2f} ms"
                f"{one.build_seconds:>7.0f} s{one.bytes_per_vector:>14,.0f}"
                for one in rows
            ),
            f"goal of ours: recall@10 at least {GOAL_RECALL}, p95 at most {GOAL_P95_MS:g} ms: "
            f"{'met' if is_met else 'MISSED'}",
        ]
    )


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    command.execute(run, Options)
