"""A large collection: an index from feature shards, and what its size costs to open, change, filter and search.

python benchmarks/large.py                             # 10 million rows of 512 numbers, 10 GB and as much again
python benchmarks/large.py --growth --package ../old   # 10^3 to 10^6 rows, beside another version of the package
"""

import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and "--worker" not in sys.argv:
    sys.path.insert(0, str(ROOT))

# N rows, B rows of a block, D dimensions

K = 10
BLOCK = 65_536
CENTRES = 4096
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """Builds an index from feature shards and measures it; --growth measures smaller ones of several sizes instead."""

    rows: int = 10_000_000
    """How many vectors."""
    dimensions: int = 512
    """Their length."""
    shard_size: int = 250_000
    """Rows of a shard."""
    queries: int = 20
    """Queries one after the other, and as many at once."""
    engines: tuple[str, ...] = ("exact",)
    """Engines to build and measure, one after the other"""
    folder: str | None = None
    """Where to write; default: a temporary folder, removed in the end"""
    growth: bool = False
    """Measure indexes of 10^3 to 10^6 rows with the metadata of photos: build, open, add, remove, id, where; and the
    exponent of the growth from the second largest to the largest"""
    largest: int = 1_000_000
    """The largest of these."""
    package: str | None = None
    """The folder of another version of the package to measure beside, with --growth"""
    json: bool = False
    """Print the result as one JSON object"""


# --- vectors


def blocks(num_rows: int, num_dims: int, seed: int = 0) -> Iterator[Rows]:
    """Unit rows around centres, as pictures of like things have: block by block, always the same."""
    draw = np.random.default_rng(seed)
    centres_CD = draw.standard_normal((CENTRES, num_dims), dtype=np.float32)
    noise_BD = draw.standard_normal((BLOCK, num_dims), dtype=np.float32)
    for start in range(0, num_rows, BLOCK):
        count = min(BLOCK, num_rows - start)
        rows_BD = centres_CD[draw.integers(CENTRES, size=count)] * np.float32(0.8)
        rows_BD += np.roll(noise_BD, int(draw.integers(num_dims)), axis=1)[:count]
        rows_BD /= np.linalg.norm(rows_BD, axis=1, keepdims=True)
        yield rows_BD


def write_shards(folder: Path, options: Options) -> None:
    """Feature shards as `features --engine ray` writes them, but in float16, to take half of the room."""
    import pyarrow
    from pyarrow import parquet

    from cn_clip.features import tables
    from cn_clip.features.store import MANIFEST, Manifest

    digest = {"digest": f"synthetic {options.rows} x {options.dimensions}"}
    manifest = Manifest("image_id", digest, digest, options.rows, options.shard_size)
    folder.mkdir(parents=True)
    source, rest = blocks(options.rows, options.dimensions), np.empty((0, options.dimensions), dtype=np.float16)
    for shard in manifest.shards():
        parts = [rest]
        while sum(map(len, parts)) < shard.stop - shard.start:
            parts.append(next(source).astype(np.float16))
        rows_ND = np.concatenate(parts)
        rows_ND, rest = rows_ND[: shard.stop - shard.start], rows_ND[shard.stop - shard.start :]
        lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows_ND.reshape(-1)), options.dimensions)
        ids = pyarrow.array([f"{one // 1000:05d}/{one}.jpg" for one in range(shard.start, shard.stop)])
        facts = {"field": "image_id", "id_kind": "str", "key": manifest.key, "shard": list(shard), "skipped": []}
        schema = pyarrow.schema(
            [("image_id", ids.type), (tables.FEATURE_COLUMN, lists.type)], {tables.METADATA_KEY: json.dumps(facts)}
        )
        table = pyarrow.table([ids, lists], schema=schema)
        parquet.write_table(table, folder / shard.name, row_group_size=BLOCK, compression="none", use_dictionary=False)
    (folder / MANIFEST).write_bytes(manifest.to_json())


# --- the large index


@dataclass
class Memory:
    """Most memory of a process, MiB: its own, and with the pages of files that it maps."""

    own: float = 0.0
    resident: float = 0.0

    def look(self, process: int) -> None:
        """Takes what the system says now."""
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
        found = {
            key: float(rest.split()[0]) / 1024
            for key, _, rest in (line.partition(":") for line in lines)
            if rest.endswith("kB")
        }
        self.own = max(self.own, found.get("RssAnon", 0.0))
        self.resident = max(self.resident, found.get("VmHWM", 0.0))


def build(shards: Path, index: Path, engine: str, vector_type: str = "float16") -> dict[str, float]:
    """Seconds, CPU seconds and memory of `cn-clip index build`."""
    words = [sys.executable, "-m", "cn_clip", "index", "build", str(shards), "--output", str(index), "--engine", engine]
    before, started, memory = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic(), Memory()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*words, "--vector-type", vector_type], env=env, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            try:
                memory.look(process.pid)
            except (OSError, ValueError):  # it has just ended
                break
            time.sleep(0.2)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"index build ended with {process.returncode}")
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "own_mib": memory.own,
        "resident_mib": memory.resident,
    }


def measured(index: Path, num_queries: int) -> dict[str, Any]:
    """What a process that searches an index sees: run as a worker, so that its memory is that of this work."""
    from cn_clip.retrieval.store import open_index

    def seconds(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def own() -> float:
        memory = Memory()
        memory.look(os.getpid())
        return memory.own

    base = own()
    opening = seconds(lambda: open_index(index))
    opened = open_index(index)
    result: dict[str, Any] = {"rows": len(opened), "open_s": opening, "engine": type(opened.engine).__name__}
    result["segments"] = [len(one) for one in opened.snapshot.rows.segments]
    result["first_id_s"] = seconds(lambda: opened.metadata("00000/7.jpg"))
    result["own_mib_opened"] = own() - base
    draw = np.random.default_rng(1)
    positions = draw.integers(len(opened), size=num_queries)
    queries_QD = opened.snapshot.rows.gather(positions) + 0.02 * draw.standard_normal(
        (num_queries, opened.model.embed_dim), dtype=np.float32
    )
    queries_QD /= np.linalg.norm(queries_QD, axis=1, keepdims=True)
    result["first_query_s"] = seconds(lambda: opened.search(queries_QD[:1], K))
    before = time.process_time()
    times = [seconds(lambda one=one: opened.search(one, K)) for one in queries_QD[:, None]]  # type: ignore[misc]
    result["p50_s"], result["p95_s"] = np.percentile(times, [50, 95]).tolist()
    result["cpu_s"], before = (time.process_time() - before) / num_queries, time.process_time()
    result["at_once_s"] = seconds(lambda: opened.search(queries_QD, K)) / num_queries
    result["at_once_cpu_s"] = (time.process_time() - before) / num_queries
    result["own_mib_searched"] = own() - base
    return result


# --- growth


def growth(num_rows: int, num_dims: int = 64) -> dict[str, float]:
    """CPU seconds of the steps on an index of so many photos; by what every version of the package has."""
    from cn_clip.retrieval.manifest import Manifest, ModelInfo
    from cn_clip.retrieval.store import open_index
    from cn_clip.retrieval.writer import NewItem, open_writer

    def metadata(number: int) -> dict[str, Any]:
        return {
            "source": "/photos",
            "size": 100_000 + number % 9973,
            "mtime_ns": 1_600_000_000_000_000_000 + number * 1_000_000_007,
            "digest": f"{number * 2654435761 % 2**64:016x}",
            "folder": f"{number // 1000:05d}",
            "file": f"IMG_{number}.jpg",
            "width": 4032 if number % 3 else 3024,
            "camera": f"Camera {number % 50}",
            "date": f"20{number % 24:02d}-{number % 12 + 1:02d}-{number % 28 + 1:02d}T12:{number % 60:02d}:00",
        }

    taken: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        found = work()
        taken[name] = time.process_time() - started
        return found

    folder = Path(tempfile.mkdtemp(prefix="large-"))
    rows_ND = next(blocks(min(num_rows, BLOCK), num_dims))
    try:

        def fill() -> None:
            with open_writer(folder / "i", Manifest(ModelInfo("", "", num_dims))) as opened:
                for start in range(0, num_rows, 10_000):
                    opened.commit(
                        [
                            NewItem(f"{one // 1000:05d}/{one}.jpg", rows_ND[one % len(rows_ND)], metadata(one))
                            for one in range(start, min(start + 10_000, num_rows))
                        ]
                    )
                opened.finish()

        def change(**what: Any) -> None:
            with open_writer(folder / "i") as opened:
                opened.commit(**what)
                opened.finish()

        timed("build", fill)
        timed("add one", lambda: change(items=[NewItem("new", rows_ND[0], metadata(1))]))
        timed("remove one", lambda: change(remove=["new"]))
        index = timed("open", lambda: open_index(folder / "i"))
        timed("first id", lambda: index.metadata("00000/7.jpg"))
        query_1D = rows_ND[:1]
        timed("search", lambda: index.search(query_1D, K))
        timed("where, 50 values", lambda: index.search(query_1D, K, where='camera="Camera 7"'))
        timed("where, a date", lambda: index.search(query_1D, K, where="date=2021-05"))
        timed("where, part of a path", lambda: index.search(query_1D, K, where="path~00000/"))
    finally:
        shutil.rmtree(folder)
    return taken


def exponent(seconds: Sequence[float]) -> float:
    """The power of the number of rows by which the time of the last step of ten grew: 0 constant, 1 linear."""
    return math.log10(max(seconds[-1], 1e-6) / max(seconds[0], 1e-6))


def worker(package: Path, *words: str) -> dict[str, Any]:
    """What this file measures in a process of its own, with the package of a folder."""
    env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--worker", *words],
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(options: Options) -> None:
    """Measures and prints."""
    result: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "numpy": np.__version__}
    if options.growth:
        packages = {"this": ROOT, **({"other": Path(options.package)} if options.package else {})}
        sizes = [size for size in (10**3, 10**4, 10**5, 10**6, 10**7) if size <= options.largest]
        found = {
            name: {size: worker(package, "growth", str(size)) for size in sizes} for name, package in packages.items()
        }
        result["growth"] = found
        if not options.json:
            for name, of_size in found.items():
                print(f"\n{name:14}CPU seconds:" + "".join(f"{size:>14,}" for size in sizes) + "      exponent")
                for step in of_size[sizes[0]]:
                    line = "".join(f"{of_size[size][step]:>14.4f}" for size in sizes)
                    print(f"{step:26}{line}{exponent([of_size[size][step] for size in sizes[-2:]]):>14.2f}")
    else:
        base = Path(options.folder or tempfile.mkdtemp(prefix="large-"))
        try:
            if not (base / "shards").exists():
                started = time.monotonic()
                write_shards(base / "shards", options)
                result["shards_s"] = time.monotonic() - started
            for engine in options.engines:
                index = base / f"{engine}.index"
                built = build(base / "shards", index, engine)
                size = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
                searched = worker(ROOT, "measured", str(index), str(options.queries))
                result[engine] = {"build": built, "bytes_a_row": size / options.rows, **searched}
                if not options.json:
                    print(f"{engine}: {json.dumps(result[engine], indent=1)}", flush=True)
        finally:
            if options.folder is None:
                shutil.rmtree(base)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.path[:] = [one for one in sys.path if one != str(Path(__file__).resolve().parent)]
        answer = growth(int(sys.argv[3])) if sys.argv[2] == "growth" else measured(Path(sys.argv[3]), int(sys.argv[4]))
        print(json.dumps(answer))
    else:
        from cn_clip import command

        command.execute(run, Options)
