"""Search with a graph: what it finds for queries unlike the rows, under filters, and of rows that codes do not hold."""

# N rows, Q queries, D dimensions, K results

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cn_clip.retrieval import flat, graph
from cn_clip.retrieval.engines import ExactEngine, Mask
from cn_clip.retrieval.graph import Graph, GraphEngine
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import Index, open_index
from cn_clip.retrieval.writer import NewItem, open_writer

DIM = 64

Vectors = NDArray[np.float32]


def units(rows: NDArray[np.floating]) -> Vectors:
    unit_rows: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit_rows


def pictures_and_texts(num_pictures: int, num_texts: int) -> tuple[Vectors, Vectors]:
    """Pictures around the subjects of texts, in a cone of their own; texts in another: no text lies near a picture.

    The mean cosine is 0.5 between two pictures, 0.5 between two texts, and 0 between a text and a picture.
    """
    generator = np.random.default_rng(0)
    cones = units(generator.normal(size=(2, DIM)))
    cones[1] -= cones[0] * (cones[0] @ cones[1])
    subjects = units(generator.normal(size=(200, DIM)))
    rows = []
    for cone, count, spread in zip(units(cones), (num_pictures, num_texts), (0.8, 1.2), strict=True):
        chosen = subjects[np.arange(count) % len(subjects)]
        own = units(chosen + spread * units(generator.normal(size=(count, DIM))))
        rows.append(units(cone + own))
    return rows[0], rows[1]


def build(folder: Path, vectors: Vectors, *, first: int = 0) -> Index:
    create = Manifest(ModelInfo("Tiny", "0123", vectors.shape[1]), engine="usearch", vector_type="float16")
    with open_writer(folder, create) as opened:
        opened.commit([NewItem(number, vector, {}) for number, vector in enumerate(vectors, first)])
        opened.finish()
    return open_index(folder)


def engine_of(index: Index) -> GraphEngine:
    assert isinstance(index.engine, GraphEngine)
    return index.engine


def own_graph(index: Index) -> Graph:
    found = engine_of(index).graph
    assert found is not None
    return found


def recall(index: Index, vectors: Vectors, queries: Vectors) -> float:
    kept = vectors.astype(np.float16).astype(np.float32)
    best = flat.top_k(queries, kept, 10).indices.tolist()
    found = [{hit.id for hit in hits} for hits in index.search(queries, 10)]
    return float(np.mean([len(some & set(exact)) / 10 for some, exact in zip(found, best, strict=True)]))


def test_texts_find_the_pictures_though_they_lie_apart_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, texts = pictures_and_texts(12_000, 200)
    across, within = float((texts @ pictures.T).mean()), float((pictures[:500] @ pictures[:500].T).mean())
    assert across < 0.05
    assert within > 0.45
    index = build(tmp_path / "i", pictures)
    expected = recall(index, pictures, texts)
    monkeypatch.setattr(ExactEngine, "search", None)
    assert recall(index, pictures, texts) == expected >= 0.99


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """3,000 items, of which 200 are removed and 300 came after the graph."""
    pictures, _ = pictures_and_texts(3000, 1)
    folder = tmp_path_factory.mktemp("graph") / "i"
    build(folder, pictures[:2700])
    with open_writer(folder) as writer:
        items = [NewItem(number, vector, {}) for number, vector in enumerate(pictures[2700:], 2700)]
        writer.commit(items, remove=range(100, 300))
    return open_index(folder)


@settings(deadline=None, max_examples=40)
@given(share=st.sampled_from([0.0, 0.003, 0.1, 0.45, 0.6, 0.95, 1.0]), k=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_under_any_filter_the_graph_finds_what_is_exact(opened: Index, share: float, k: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    alive_N = opened.snapshot.alive_N
    allowed_N: Mask = alive_N & (generator.random(len(alive_N)) < share)
    queries = units(generator.normal(size=(3, DIM)))
    found = engine_of(opened).search(queries, k, allowed_N)
    exact = ExactEngine(opened.snapshot.rows).search(queries, k, allowed_N)
    score_of = dict[tuple[int, int], float]()
    everything = ExactEngine(opened.snapshot.rows).search(queries, len(alive_N), alive_N)
    for number, (positions, scores) in enumerate(everything):
        score_of |= {(number, row): score for row, score in zip(positions.tolist(), scores.tolist(), strict=True)}
    shared = 0
    for number, ((positions, scores), (best, _)) in enumerate(zip(found, exact, strict=True)):
        rows = positions.tolist()
        assert len(rows) == len(set(rows)) == len(best) == min(k, int(allowed_N.sum()))
        assert allowed_N[positions].all()
        assert scores.tolist() == [score_of[number, row] for row in rows]
        assert rows == [row for _, row in sorted(zip((-scores).tolist(), rows, strict=True))]
        shared += len(set(rows) & set(best.tolist()))
    assert shared >= 0.9 * sum(len(best) for best, _ in exact)
    if 0 < allowed_N.sum() < graph.SMALLEST_GRAPH:
        assert all(
            (one == other).all() for a, b in zip(found, exact, strict=True) for one, other in zip(a, b, strict=True)
        )


def test_the_width_is_that_which_the_vectors_want_and_is_kept(tmp_path: Path) -> None:
    centres = units(np.random.default_rng(0).normal(size=(30, DIM)))
    easy = units(centres[np.arange(1500) % 30] + 0.1 * np.random.default_rng(1).normal(size=(1500, DIM)))
    hard = units(np.random.default_rng(2).normal(size=(3000, DIM)))
    widths = list[int]()
    for name, vectors in (("easy", easy), ("hard", hard)):
        found = own_graph(build(tmp_path / name, vectors))
        assert found.kind.width is not None
        widths.append(found.kind.width)
        assert found._index.expansion_search == widths[-1]
    assert widths[0] == 80 < widths[1]
    with open_writer(tmp_path / "easy") as writer:  # not yet twice as many
        writer.commit([NewItem(number, vector, {}) for number, vector in enumerate(hard[:100], 1500)])
        writer.finish()
    assert own_graph(open_index(tmp_path / "easy")).kind.width == 80
    with open_writer(tmp_path / "easy") as writer:
        writer.commit([NewItem(number, vector, {}) for number, vector in enumerate(hard, 1600)])
        writer.finish()
    assert (own_graph(open_index(tmp_path / "easy")).kind.width or 0) > 80


def test_a_small_graph_is_the_same_on_any_number_of_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    centres = units(np.random.default_rng(0).normal(size=(30, DIM)))
    vectors = units(centres[np.arange(1500) % 30] + 0.1 * np.random.default_rng(1).normal(size=(1500, DIM)))
    graphs = set[bytes]()
    for cores in (1, 2, 4, 4):
        monkeypatch.setattr(graph, "usable_cores", lambda cores=cores: cores)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        build(folder, vectors)
        graphs.add(next(folder.glob("graph-*")).read_bytes())
    assert len(graphs) == 1


def test_a_mask_is_looked_through_once(opened: Index) -> None:
    engine, alive_N = engine_of(opened), opened.snapshot.alive_N
    known = engine._admitted(alive_N)
    assert known is engine._admitted(alive_N)
    assert (known.num_within, int(known.within_N.sum())) == (2500, 2500)
    assert known.later_N is not None
    assert np.flatnonzero(known.later_N).tolist() == list(range(2700, 3000))
    within_N = alive_N.copy()
    within_N[2700:] = False
    assert engine._admitted(within_N).later_N is None
    assert engine._admitted(within_N).within_N is within_N


def test_a_graph_keeps_codes_and_they_are_half_of_float16(tmp_path: Path) -> None:
    pictures, _ = pictures_and_texts(1500, 1)
    index = build(tmp_path / "i", pictures)
    assert index.manifest.graph is not None
    assert index.manifest.graph.scale == pytest.approx(127 / np.abs(pictures.astype(np.float16)).max())
    stored = own_graph(index)._index.get(7)
    assert stored.dtype == np.int8
    assert np.abs(stored / index.manifest.graph.scale - pictures[7]).max() <= 0.51 / index.manifest.graph.scale


@pytest.mark.parametrize("kind", ["one large number", "zeros"])
def test_vectors_that_codes_do_not_tell_apart_are_kept_in_float16(tmp_path: Path, kind: str) -> None:
    if kind == "zeros":
        vectors = np.zeros((1500, DIM), dtype=np.float32)
    else:  # a step of the codes is as large as what differs
        vectors = 0.002 * np.random.default_rng(0).normal(size=(1500, DIM)).astype(np.float32)
        vectors[:, 5] += 1
    index = build(tmp_path / "i", vectors)
    assert index.manifest.graph is not None
    assert index.manifest.graph.scale is None
    assert own_graph(index)._index.get(7).dtype == np.float16
    if kind != "zeros":
        assert recall(index, units(vectors) if kind == "zeros" else vectors, vectors[:50]) >= 0.95


def test_rows_that_the_codes_cannot_say_have_the_graph_made_again(tmp_path: Path) -> None:
    pictures, _ = pictures_and_texts(1600, 1)
    build(tmp_path / "i", pictures[:1500])
    with open_writer(tmp_path / "i") as writer:
        writer.commit([NewItem(number, vector, {}) for number, vector in enumerate(3 * pictures[1500:], 1500)])
        writer.finish()
    index = open_index(tmp_path / "i")
    assert index.manifest.graph is not None
    assert index.manifest.graph.scale == pytest.approx(127 / np.abs(3 * pictures[1500:]).max(), rel=1e-2)
    assert {hit.id for hit in index.search(pictures[1500:1501], 10)[0]} <= set(range(1500, 1600))


def test_a_graph_of_float16_from_before_there_were_codes_answers_and_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, texts = pictures_and_texts(2000, 50)
    monkeypatch.setattr(graph, "code_scale", lambda *_: None)
    build(tmp_path / "i", pictures[:1800])
    path = tmp_path / "i" / "manifest.json"
    monkeypatch.undo()
    assert '"scale": null' in path.read_text()
    with open_writer(tmp_path / "i") as writer:
        writer.commit([NewItem(number, vector, {}) for number, vector in enumerate(pictures[1800:], 1800)])
        writer.finish()
    index = open_index(tmp_path / "i")
    assert (own_graph(index).kind.scale, len(own_graph(index))) == (None, 2000)
    assert recall(index, pictures, texts) >= 0.99


def test_a_graph_whose_type_is_not_that_of_the_manifest_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures, _ = pictures_and_texts(1500, 1)
    entry = build(tmp_path / "i", pictures).manifest.graph
    assert entry is not None
    path = tmp_path / "i" / entry.name
    with pytest.raises(Exception, match="is not a graph of 1500 rows of 64 dimensions"):
        graph.open_graph(path, entry.file, DIM, 1500, graph.Kind())
    assert len(graph.open_graph(path, entry.file, DIM, 1500, graph.Kind(entry.scale))) == 1500


def test_one_query_is_asked_on_one_thread(opened: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    found = own_graph(opened)
    real = found._index

    class Watched:
        def search(self, queries: Vectors, count: int, *, threads: int) -> object:
            asked.append(threads)
            return real.search(queries, count, threads=threads)

    monkeypatch.setattr(graph, "usable_cores", lambda: 2)
    monkeypatch.setattr(found, "_index", Watched())
    for count in (1, 2, 7):
        found.search(units(np.ones((count, DIM))), 5)
    assert asked == [1, 2, 2]
