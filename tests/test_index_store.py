"""Indexes: what is found, what survives kills, damage and other processes; alike for all engines and Milvus."""

# N items, D dimensions

import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
from numpy.typing import NDArray

from cn_clip.errors import ConfigError, DataError
from cn_clip.retrieval import addresses, codes, engines, flat, graph, manifest, query, scanning, store, writer
from cn_clip.retrieval.addresses import IndexAddress, Searchable, Writer
from cn_clip.retrieval.manifest import EngineName, Manifest, ModelInfo
from cn_clip.retrieval.segments import RowBlock, Segment, write_segment
from cn_clip.retrieval.store import Index, ItemId, open_index
from cn_clip.retrieval.writer import NewItem, open_writer

ENGINES: tuple[EngineName, ...] = ("exact", "quantized", "usearch")
DIM = 16
MODEL = ModelInfo("Tiny", "0123", DIM)

Vectors = NDArray[np.float32]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> EngineName:
    """All engines; graph and codes are used from a few rows on, so that tests stay small."""
    monkeypatch.setattr(codes, "SMALLEST", 8)
    monkeypatch.setattr(graph, "SMALLEST_GRAPH", 8)
    monkeypatch.setattr(writer, "SMALLEST_GRAPH", 8)
    chosen: EngineName = request.param
    return chosen


@dataclass(frozen=True)
class Home:
    """Where a test may build an index, for one of the engines or on a server."""

    place: IndexAddress
    engine: EngineName = "exact"

    def writer(self, model: ModelInfo | None = None) -> AbstractContextManager[Writer]:
        """Creates the index when a model is given."""
        return addresses.open_writer(self.place, Manifest(model, engine=self.engine) if model else None)

    def open(self) -> Searchable:
        """As it is now."""
        return addresses.open_index(self.place)

    def build(self, vectors: Vectors, *, size: int = 10, model: ModelInfo = MODEL) -> Searchable:
        """As `build` below."""
        with self.writer(model) as opened:
            for start in range(0, len(vectors), size):
                opened.commit(items(vectors[start : start + size], first=start))
            opened.finish()
        return self.open()


@pytest.fixture(params=[*ENGINES, *stores.REMOTE])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """Every test for each engine in a folder, and each store on a server."""
    monkeypatch.setattr(codes, "SMALLEST", 8)
    monkeypatch.setattr(graph, "SMALLEST_GRAPH", 8)
    monkeypatch.setattr(writer, "SMALLEST_GRAPH", 8)
    if request.param in stores.NAMES:
        with stores.kept_by(request.param) as address:
            yield Home(address)
    else:
        yield Home(tmp_path / "i", request.param)


def unit(count: int, *, seed: int = 0, dim: int = DIM) -> Vectors:
    """Random unit rows."""
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    unit_rows: Vectors = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit_rows


def items(vectors: Vectors, *, first: int = 0, **common: Any) -> list[NewItem]:
    """Items number first, first + 1, ... ids alternate between int and str."""
    return [
        NewItem(number if number % 2 else f"图{number}", vector, {"number": number, **common}, b"jpg%d" % number)
        for number, vector in enumerate(vectors, start=first)
    ]


def build(folder: Path, vectors: Vectors, *, engine: EngineName = "exact", size: int = 10, **settings: Any) -> Index:
    """An index in segments of `size` items."""
    with open_writer(folder, Manifest(MODEL, engine=engine, **settings)) as opened:
        for start in range(0, len(vectors), size):
            opened.commit(items(vectors[start : start + size], first=start))
        opened.finish()
    return open_index(folder)


def found(index: Searchable, queries: Vectors, k: int, **settings: Any) -> list[list[ItemId]]:
    """The ids found."""
    return [[hit.id for hit in hits] for hits in index.search(queries, k, **settings)]


# --- what is found


def test_found_are_the_best_with_their_metadata_and_thumbnails(home: Home) -> None:
    vectors = np.eye(DIM, dtype=np.float32)
    index = home.build(vectors)
    query = np.zeros((1, DIM), dtype=np.float32)
    query[0, [3, 6]] = 0.5, 1.0
    best, second, third = index.search(query, 3)[0]
    assert (best.id, best.score, best.metadata) == ("图6", 1.0, {"number": 6})
    assert (second.id, second.score) == (3, 0.5)
    assert (third.id, third.score) == ("图0", 0.0)  # of equal scores the one added first
    assert (index.thumbnail("图6"), index.thumbnail(3), index.thumbnail("absent")) == (b"jpg6", b"jpg3", None)
    assert (len(index), index.model, 3 in index, "3" in index) == (DIM, MODEL, True, False)


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_exact_engine_finds_what_flat_top_k_finds(tmp_path: Path, vector_type: str) -> None:
    vectors, queries = unit(300), unit(7, seed=1)
    vectors[200:] = vectors[:100]  # ties
    index = build(tmp_path / "i", vectors, size=70, vector_type=vector_type)
    expected = flat.top_k(queries, vectors.astype(vector_type).astype(np.float32), 25)
    results = index.search(queries, 25)
    assert [[hit.metadata["number"] for hit in hits] for hits in results] == expected.indices.tolist()
    assert [[hit.score for hit in hits] for hits in results] == expected.scores.tolist()


def test_exact_engine_in_small_blocks_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path / "i", unit(90), size=40)
    expected = index.search(unit(3, seed=1), 9, where="number>=7")
    monkeypatch.setattr(scanning, "_SPAN", 7)
    assert index.search(unit(3, seed=1), 9, where="number>=7") == expected


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_recall_at_10_is_at_least_95_percent(home: Home, kind: str) -> None:
    # Milvus looks through new rows one by one up to about so many, and makes its graph of them later.
    num_rows = 12_000 if isinstance(home.place, Path) else 8_000
    vectors, queries = unit(num_rows, dim=64), unit(100, seed=1, dim=64)
    if kind == "clustered":
        centres = unit(20, seed=2, dim=64)
        rows = [centres[np.arange(len(some)) % 20] + 0.3 * some for some in (vectors, queries)]
        vectors, queries = (some / np.linalg.norm(some, axis=1, keepdims=True) for some in rows)
    index = home.build(vectors, size=len(vectors), model=ModelInfo("Tiny", "0123", 64))
    if isinstance(index, Index) and home.engine == "usearch":
        assert isinstance(index.engine, graph.GraphEngine)
    exact = flat.top_k(queries, vectors, 10).indices
    hits = [{hit.metadata["number"] for hit in some} for some in index.search(queries, 10)]
    recall = np.mean([len(some & set(best)) / 10 for some, best in zip(hits, exact.tolist(), strict=True)])
    assert recall >= 0.95


def test_graph_answers_itself_and_not_by_the_exact_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path / "i", unit(1500), engine="usearch", size=1500)
    monkeypatch.setattr(engines.ExactEngine, "search", None)
    assert found(index, unit(1500)[:2], 1) == [["图0"], [1]]
    assert found(index, unit(1500)[:2], 1, where="number<1400") == [["图0"], [1]]


def test_filter_narrows_and_k_may_exceed_what_is_left(home: Home) -> None:
    index = home.build(unit(100))
    hits = index.search(unit(2, seed=1), 50, where="number>=95")
    assert [sorted(hit.metadata["number"] for hit in some) for some in hits] == [[95, 96, 97, 98, 99]] * 2
    assert index.search(unit(2, seed=1), 5, where="number>=100") == [[], []]
    assert [len(some) for some in index.search(unit(1, seed=1), 500)] == [100]


def test_least_score_cuts_the_results(home: Home) -> None:
    index = home.build(np.eye(DIM, dtype=np.float32))
    assert found(index, np.eye(DIM, dtype=np.float32)[5:6], 4, min_score=1.0) == [[5]]
    assert found(index, np.eye(DIM, dtype=np.float32)[5:6], 4, min_score=1.1) == [[]]


def test_empty_index_finds_nothing(home: Home) -> None:
    index = home.build(unit(0))
    assert (len(index), index.search(unit(2), 5)) == (0, [[], []])


@pytest.mark.parametrize(
    ("queries", "sentence"),
    [
        (unit(1)[0], "expected float32 queries of the shape (Q, 16), got float32 (16,)"),
        (unit(1, dim=8), "got float32 (1, 8)"),
        (unit(1).astype(np.float64), "got float64 (1, 16)"),
        (np.full((1, DIM), np.nan, dtype=np.float32), "some hold NaN or infinity"),
    ],
)
def test_queries_of_another_shape_are_refused(home: Home, queries: Vectors, sentence: str) -> None:
    with pytest.raises(DataError) as caught:
        home.build(unit(3)).search(queries, 1)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("k", [0, -1, 2.5, math.nan, math.inf, True, "3"])
def test_k_that_counts_nothing_is_refused(home: Home, k: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        home.build(unit(3)).search(unit(1), k)
    assert str(caught.value) == f"k: expected an integer, at least 1, got {k!r}"


def test_any_k_from_1_on_is_answered(home: Home) -> None:
    index = home.build(unit(20))
    for k in (1, np.int64(3), 5000, 2**62):
        assert len(index.search(unit(1), k)[0]) == min(k, 20)


def test_a_least_score_of_nan_is_refused_and_infinity_bounds(home: Home) -> None:
    index = home.build(unit(20))
    with pytest.raises(ConfigError, match=r"^min_score: expected a number, got nan$"):
        index.search(unit(1), 1, min_score=math.nan)
    assert [len(found(index, unit(1), 20, min_score=least)[0]) for least in (-math.inf, math.inf)] == [20, 0]


# --- changes


def test_removed_and_replaced_items_are_not_found_any_more(home: Home) -> None:
    vectors = unit(60)
    home.build(vectors)
    with home.writer() as opened:
        opened.commit([NewItem(7, vectors[0], {"number": 700})], remove=["图0", "absent"])
        opened.finish()
    index = home.open()
    assert len(index) == 59
    assert found(index, vectors[:1], 1) == [[7]]
    assert index.metadata(7) == {"number": 700}
    assert index.ids == [*(n if n % 2 else f"图{n}" for n in range(1, 60) if n != 7), 7]
    assert index.vector(7).tolist() == vectors[0].tolist()


def test_items_after_the_graph_are_found_before_it_is_brought_up(tmp_path: Path) -> None:
    vectors = unit(1600)
    build(tmp_path / "i", vectors[:1500], engine="usearch", size=1500)
    with open_writer(tmp_path / "i") as opened:
        opened.commit(items(vectors[1500:], first=1500), remove=["图0"])  # and killed before finish
    index = open_index(tmp_path / "i")
    assert isinstance(index.engine, graph.GraphEngine)
    assert found(index, vectors[[1555, 1]], 1) == [[1555], [1]]
    assert "图0" not in found(index, vectors[:1], 10)[0]


def test_many_small_commits_become_few_segments_with_the_same_items(tmp_path: Path, engine: EngineName) -> None:
    vectors = unit(40)
    index = build(tmp_path / "i", vectors, engine=engine, size=1)
    assert len(index.manifest.segments) <= 8
    assert [values["number"] for _, _, values in index.snapshot.items()] == list(range(40))
    whole = build(tmp_path / "whole", vectors, engine=engine, size=40)
    assert index.search(unit(5, seed=3), 10) == whole.search(unit(5, seed=3), 10)
    assert index.thumbnail("图20") == b"jpg20"
    entries = {path.name for path in (tmp_path / "i").iterdir()} - {"manifest.json", ".lock"}
    assert entries == index.manifest.names()


def test_segments_are_merged_by_size() -> None:
    assert writer._num_to_merge([1000] * 7) == 0
    assert writer._num_to_merge([1000] * 8) == 8
    assert writer._num_to_merge([900_000, *[1000] * 7]) == 0
    assert writer._num_to_merge([900_000, *[1000] * 8]) == 8
    assert writer._num_to_merge([*[8000] * 7, 1000]) == 8
    assert writer._num_to_merge([900_000, *[8000] * 6, 1000]) == 0
    assert writer._num_to_merge([100, *[1] * 8]) == 8
    assert writer._num_to_merge([9, *[1] * 8]) == 8
    assert writer._num_to_merge([8, *[1] * 7]) == 0
    assert writer._num_to_merge([8, 8, *[1] * 6]) == 8


def test_rows_are_written_anew_when_a_quarter_is_removed(tmp_path: Path, engine: EngineName) -> None:
    vectors = unit(40)
    build(tmp_path / "i", vectors, engine=engine)
    with open_writer(tmp_path / "i") as opened:
        opened.commit(remove=range(1, 20, 2))
        assert opened.manifest.num_rows == 40
        opened.commit(remove=["图0"])
        assert opened.manifest.num_rows == 29
        assert opened.manifest.removed is None
        opened.finish()
    index = open_index(tmp_path / "i")
    assert len(index) == 29
    assert found(index, vectors[[21, 2]], 1) == [[21], ["图2"]]


def test_a_reader_goes_on_with_its_generation(tmp_path: Path, engine: EngineName) -> None:
    vectors = unit(40)
    before = build(tmp_path / "i", vectors, engine=engine)
    with open_writer(tmp_path / "i") as opened:
        opened.commit(remove=list(before.ids[:39]))
    assert len(before) == 40
    assert before.thumbnail(5) == b"jpg5"
    assert found(before, vectors[:1], 1) == [["图0"]]
    assert found(open_index(tmp_path / "i"), vectors[:1], 1) == [[39]]


def test_a_reader_that_has_not_searched_yet_keeps_its_graph(tmp_path: Path) -> None:
    vectors = unit(1500)
    before = build(tmp_path / "i", vectors, engine="usearch", size=1500)
    with open_writer(tmp_path / "i") as opened:
        opened.commit(items(unit(300, seed=5), first=1500))
        opened.finish()
    entry = before.manifest.graph
    assert entry is not None
    assert not (tmp_path / "i" / entry.name).exists()
    assert isinstance(before.engine, graph.GraphEngine)
    assert found(before, vectors[:1], 1) == [["图0"]]


def test_of_many_equal_scores_the_first_added_are_found(home: Home) -> None:
    vectors = unit(1500)
    vectors[100:600] = vectors[50]
    index = home.build(vectors, size=1500)
    assert [hit.metadata["number"] for hit in index.search(vectors[50:51], 10)[0]] == [50, *range(100, 109)]


def test_a_condition_on_a_field_that_no_item_has_names_those_there_are(home: Home) -> None:
    vectors = unit(50)
    home.build(vectors)
    with home.writer() as opened:
        opened.commit([NewItem("last", vectors[0], {"rare": 1})])
        opened.finish()
    index = home.open()
    for where in ("nummer>3", "nummer!=3", "number=3 nummer!=3", "rare=1 nummer!=3"):
        for queries in (unit(1), unit(0)):
            with pytest.raises(ConfigError, match=r"did you mean 'number'\? there are: id, number, path, rare$"):
                index.search(queries, 1, where=where)
    assert found(index, vectors[:1], 5, where="rare=1") == [["last"]]
    assert found(index, vectors[:1], 1, where="rare!=1") == [["图0"]]


def test_a_condition_on_an_empty_index_finds_nothing(home: Home) -> None:
    assert home.build(unit(0)).search(unit(2), 5, where="number>3") == [[], []]


def test_items_are_parsed_once_for_all_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path / "i", unit(50))
    assert found(index, unit(1), 1, where="number=6") == [["图6"]]
    monkeypatch.setattr(Segment, "items", None)
    assert found(index, unit(1), 1, where="number=8") == [["图8"]]
    assert index.ids == [item.id for item in items(unit(50))]
    assert index.fields == ["number"]


def test_a_search_without_a_condition_waits_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, go_on, columns_of = build(tmp_path / "i", unit(50)), threading.Event(), query.columns_of

    def slow(segment: Segment) -> Any:
        assert go_on.wait(60)
        return columns_of(segment)

    monkeypatch.setattr(query, "columns_of", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(found, index, unit(1), 1, where="number=6")
        assert found(index, unit(1), 1) == [["图0"]]
        assert not waiting.done()
        go_on.set()
        assert waiting.result() == [["图6"]]


def test_conditions_hold_for_all_kinds_of_values(home: Home) -> None:
    metadata: list[dict[str, Any]] = [
        {"year": "2021"},
        {"year": 2019},
        {"tags": ["海", "山"]},
        {"year": True, "a b": "x"},
    ]
    with home.writer(MODEL) as opened:
        opened.commit([NewItem(n, unit(1)[0], values) for n, values in enumerate(metadata)])
        opened.finish()
    index = home.open()
    for where, expected in (
        ("year>=2020", [0]),
        ("year=2021,2019", [0, 1]),
        ("year=true", [3]),
        ("year!=2021", [1, 2, 3]),
        ("tags=山", [2]),
    ):
        assert found(index, unit(1), 4, where=where) == [expected]


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (NewItem("a", unit(1, dim=3)[0]), "id 'a': expected a vector of 16 numbers, got the shape (3,)"),
        (NewItem("a", np.full(DIM, np.inf)), "id 'a': its vector holds NaN, infinity"),
        (NewItem("a", np.full(DIM, 1e39)), "id 'a': its vector holds NaN, infinity or what becomes infinity"),
        (NewItem("a", unit(1)[0], {"x": float("nan")}), "id 'a': its metadata is nothing that JSON holds"),
        (NewItem("a", unit(1)[0], {"x": {1}}), "id 'a': its metadata is nothing that JSON holds"),
        (NewItem(True, unit(1)[0]), "an id is an int or a str, got True"),
        (NewItem("图0", unit(1)[0]), "id '图0': comes twice in one commit"),
    ],
)
def test_faulty_items_are_refused_and_nothing_changes(tmp_path: Path, item: NewItem, sentence: str) -> None:
    build(tmp_path / "i", unit(5))
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "i").rglob("*"))
    with open_writer(tmp_path / "i") as opened, pytest.raises(DataError) as caught:
        opened.commit([*items(unit(1)), item])
    assert sentence in str(caught.value)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "i").rglob("*")) == before


def test_second_writer_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "i", unit(5))
    code = "import sys, pathlib; from cn_clip.retrieval import writer\n"
    code += "with writer.open_writer(pathlib.Path(sys.argv[1])): pass"
    with open_writer(tmp_path / "i"):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / "i"], capture_output=True, text=True)
    assert "another process is changing this index (pid" in done.stderr


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is no index and holds 'photo.jpg'"), open_writer(tmp_path, Manifest(MODEL)):
        pass
    with pytest.raises(DataError, match="is no index; build one with"):
        open_index(tmp_path)
    with pytest.raises(DataError, match="is no index; build one with"), open_writer(tmp_path / "absent"):
        pass
    assert not (tmp_path / "absent").exists()


def test_hidden_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".notes.tmp").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"holds '.notes.tmp'"), open_writer(tmp_path / "mine", Manifest(MODEL)):
        pass
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [".notes.tmp"]
    build(tmp_path / "i", unit(5))
    (tmp_path / "i" / ".notes.tmp").write_bytes(b"mine")
    (tmp_path / "i" / ".manifest.json.abcdefgh.tmp").mkdir()
    with open_writer(tmp_path / "i") as opened:
        opened.commit(items(unit(1), first=9))
    hidden = {path.name for path in (tmp_path / "i").iterdir() if path.name.startswith(".")}
    assert hidden == {".notes.tmp"}


# --- what is known of the vectors


def without_norms(folder: Path) -> Path:
    """Makes the manifest as versions before wrote it, without its digest, which was optional."""
    values = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    del values["digest"]
    for segment in values["segments"]:
        del segment["largest_norm"]
    (folder / "manifest.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize("vector_type", ["float32", "float16"])
def test_the_length_of_the_longest_vector_is_kept_with_each_segment(tmp_path: Path, vector_type: str) -> None:
    vectors = unit(30) * np.arange(30, dtype=np.float32)[:, None]
    written = build(tmp_path / "i", vectors, size=12, vector_type=vector_type).manifest.segments
    lengths = np.linalg.norm(vectors.astype(vector_type).astype(np.float64), axis=1)
    expected = [lengths[start : start + 12].max() for start in (0, 12, 24)]
    np.testing.assert_allclose([one.largest_norm for one in written], expected, rtol=1e-12)


def test_an_index_from_before_norms_were_kept_answers_alike_and_is_upgraded_by_the_next_run(tmp_path: Path) -> None:
    index = build(tmp_path / "i", unit(300), size=70)
    old = open_index(without_norms(tmp_path / "i"))
    assert [one.largest_norm for one in old.manifest.segments] == [None] * 5
    assert old.search(unit(3, seed=1), 9) == index.search(unit(3, seed=1), 9)
    with open_writer(tmp_path / "i") as opened:
        opened.finish()
    upgraded = open_index(tmp_path / "i").manifest
    expected = [one.largest_norm for one in index.manifest.segments]
    assert [one.largest_norm for one in upgraded.segments] == pytest.approx(expected, rel=1e-12)


def test_a_segment_from_before_norms_were_kept_that_is_damaged_is_not_upgraded(tmp_path: Path) -> None:
    build(tmp_path / "i", unit(1500), size=1500)  # more than a block
    vectors = next(without_norms(tmp_path / "i").glob("segment-*/vectors.npy"))
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"\xff")
    with open_writer(tmp_path / "i") as opened:
        opened.finish()
    assert open_index(tmp_path / "i").manifest.segments[0].largest_norm is None


def test_a_largest_norm_that_is_no_length_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "i", unit(5))
    text = without_norms(tmp_path / "i").joinpath("manifest.json").read_text(encoding="utf-8")
    for value in ("NaN", "Infinity", "-1.0", '"1"', "true"):
        (tmp_path / "i" / "manifest.json").write_text(
            text.replace('"num_rows":', f'"largest_norm": {value}, "num_rows":')
        )
        with pytest.raises(DataError, match="largest norm"):
            open_index(tmp_path / "i")


def test_vectors_take_their_room_on_the_disk_as_they_are_written(tmp_path: Path) -> None:
    sizes = []

    def blocks() -> Iterator[RowBlock]:
        for number in range(1000):
            sizes.append((tmp_path / "s" / "vectors.npy").stat().st_size)
            yield RowBlock(np.array([number]), unit(1), b"{}\n", np.array([3]), b"", np.array([0]))

    write_segment(tmp_path / "s", blocks(), 1000, DIM, "float32")
    assert max(sizes) < np.load(tmp_path / "s" / "vectors.npy").nbytes


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from cn_clip.retrieval import writer
from cn_clip.retrieval.manifest import Manifest, ModelInfo
rows = np.eye(16, dtype=np.float32)
with writer.open_writer(Path(sys.argv[1]), Manifest(ModelInfo("Tiny", "0123", 16))) as opened:
    opened.commit([writer.NewItem(number, rows[number]) for number in range(16)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        opened.commit([writer.NewItem(number, rows[number % 16]) for number in range(16, 16 + int(sys.argv[2]))])
    except writer.DataError as error:
        print(error)
"""


@pytest.mark.parametrize("count", [130, 400])
def test_a_disk_that_is_full_is_told_in_a_sentence(tmp_path: Path, count: int) -> None:
    pytest.importorskip("resource")
    args = [sys.executable, "-c", LIMITED, tmp_path / "i", str(count)]
    done = subprocess.run(args, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{tmp_path / 'i'}: cannot be written (File too large); all that was reported")
    assert open_index(tmp_path / "i").ids == list(range(16))


# --- damage


@pytest.mark.parametrize("file", ["vectors.npy", "items.jsonl", "thumbnails.bin", "rows.npy"])
@pytest.mark.parametrize("how", ["gone", "torn"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, file: str, how: str) -> None:
    build(tmp_path / "i", unit(25))
    path = sorted((tmp_path / "i").glob("segment-*"))[1] / file
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError) as caught:
        open_index(tmp_path / "i")
    assert str(path) in str(caught.value)
    assert "cn-clip index check" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 2}',
        "\xff",
        json.dumps({"format": 1, **Manifest(MODEL).__dict__, "model": None}, default=str),
        json.dumps({"format": 1, **Manifest(MODEL).__dict__, "model": MODEL.__dict__, "num_items": -1}, default=str),
        json.dumps(
            {
                "format": 1,
                **Manifest(MODEL).__dict__,
                "model": MODEL.__dict__,
                "segments": [{"name": "../etc", "num_rows": 1, "files": {"vectors.npy": {"bytes": 1, "digest": ""}}}],
            },
            default=str,
        ),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    build(tmp_path / "i", unit(5))
    (tmp_path / "i" / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError) as caught:
        open_index(tmp_path / "i")
    assert str(caught.value).startswith(str(tmp_path / "i" / "manifest.json"))


@pytest.mark.parametrize("how", ["gone", "torn", "other"])
def test_without_its_graph_an_index_searches_exactly_and_the_next_writer_mends_it(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    vectors = unit(1500)
    entry = build(tmp_path / "i", vectors, engine="usearch", size=1500).manifest.graph
    assert entry is not None
    path = tmp_path / "i" / entry.name
    size = path.stat().st_size
    path.unlink()
    if how != "gone":
        path.write_bytes(b"\0" * (size if how == "other" else 100))
    index = open_index(tmp_path / "i")
    assert found(index, vectors[:2], 1) == [["图0"], [1]]
    assert str(path) in caplog.text
    with open_writer(tmp_path / "i") as opened:
        opened.finish()
    assert isinstance(open_index(tmp_path / "i").engine, graph.GraphEngine)


def test_a_generation_merged_away_while_it_is_opened_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "i", unit(25))
    old = manifest.read(tmp_path / "i")
    with open_writer(tmp_path / "i") as opened:
        opened.commit(remove=[1, 3, 5, 7, 9, 11, 13, 15])
    assert not {path.name for path in (tmp_path / "i").iterdir()} & old.names()
    answers = iter([old, *itertools.repeat(manifest.read(tmp_path / "i"), 3)])
    monkeypatch.setattr(store.manifest, "read", lambda folder: next(answers))
    assert len(open_index(tmp_path / "i")) == 17


# --- kills


WRITE = """
import sys
from pathlib import Path
import numpy as np
from cn_clip.retrieval import writer
from cn_clip.retrieval.manifest import Manifest, ModelInfo
rows = np.eye(16, dtype=np.float32)
with writer.open_writer(Path(sys.argv[1]), Manifest(ModelInfo("Tiny", "0123", 16))) as opened:
    for number in range(len(opened), 10**6):
        opened.commit([writer.NewItem(number, rows[number % 16], {"number": number})], remove=[number - 20])
        print(number, flush=True)
"""


@pytest.mark.parametrize("reports", [1, 9, 30])
def test_what_was_reported_before_a_kill_is_there_once(tmp_path: Path, reports: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITE, tmp_path / "i"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(reports)]
        process.send_signal(signal.SIGKILL)
        seen += [int(line) for line in process.stdout.read().splitlines() if line]
    index = open_index(tmp_path / "i")
    last = index.ids[-1]
    assert isinstance(last, int)
    assert last in (seen[-1], seen[-1] + 1)  # one more may have been written than was reported
    assert index.ids == list(range(max(0, last - 19), last + 1))
    with open_writer(tmp_path / "i") as opened:
        opened.commit(items(unit(1), first=10**6))
    entries = {path.name for path in (tmp_path / "i").iterdir()} - {"manifest.json", ".lock"}
    assert entries == open_index(tmp_path / "i").manifest.names()


@pytest.mark.parametrize("place", range(7))
def test_a_commit_that_fails_at_any_step_changes_nothing(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build(tmp_path / "i", unit(20))
    steps: Sequence[tuple[Any, str]] = [
        (writer, "write_segment"),
        (writer.os, "replace"),
        (writer, "facts_of_segment"),
        (writer, "Segment"),
        (writer, "atomic_write"),
        (manifest, "atomic_write"),
        (writer.np, "save"),
    ]

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with open_writer(tmp_path / "i") as opened:
        with monkeypatch.context() as patch:
            patch.setattr(*steps[place], fail)
            with pytest.raises(
                DataError, match=r"cannot be written \(No space left on device\); all that was reported"
            ):
                opened.commit(items(unit(3), first=100), remove=["图0"])
        assert open_index(tmp_path / "i").ids == index.ids
        opened.commit(items(unit(3), first=100), remove=["图0"])
    assert open_index(tmp_path / "i").ids == [*index.ids[1:], "图100", 101, "图102"]


def test_a_merge_that_fails_after_a_commit_says_what_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(tmp_path / "i", unit(20))

    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.IndexWriter, "_merge", fail)
    said = (
        f"{tmp_path / 'i'}: cannot be written (No space left on device); the 3 added and 1 removed items count; "
        "merging its segments failed: free some space"
    )
    with open_writer(tmp_path / "i") as opened, pytest.raises(DataError, match=re.escape(said)):
        opened.commit(items(unit(3), first=100), remove=["图0"])
    assert open_index(tmp_path / "i").ids == [*index.ids[1:], "图100", 101, "图102"]


def test_a_copy_of_an_index_is_an_index(tmp_path: Path, engine: EngineName) -> None:
    index = build(tmp_path / "i", unit(30), engine=engine)
    shutil.move(tmp_path / "i", tmp_path / "moved")
    assert open_index(tmp_path / "moved").search(unit(2, seed=1), 5) == index.search(unit(2, seed=1), 5)
