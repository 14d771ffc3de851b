"""The engine quantized: the answers of the exact engine, bit for bit, proven by bounds that no score exceeds."""

# N rows, Q queries, D dimensions

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_index_damage import flip
from test_index_derived import repaired

from cn_clip.errors import DataError, MissingExtraError
from cn_clip.retrieval import codes, inspection, quantized
from cn_clip.retrieval.codes import Codes
from cn_clip.retrieval.engines import ExactEngine
from cn_clip.retrieval.manifest import EngineName, Manifest, ModelInfo, VectorType
from cn_clip.retrieval.quantized import QuantizedEngine
from cn_clip.retrieval.segments import DIGESTS
from cn_clip.retrieval.store import Index, open_index
from cn_clip.retrieval.writer import NewItem, open_writer

Vectors = NDArray[np.float32]

DIM = 80
KINDS = ("noise", "clustered", "spike", "twice", "near", "equal", "subnormal", "lengths", "zero", "narrow")


def rows_of(kind: str, count: int, random: np.random.Generator) -> Vectors:
    """Rows that are hard for codes in one way each."""
    noise = random.normal(size=(count, DIM))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    if kind == "clustered":
        noise = noise[random.integers(0, min(4, count), count)] + 0.05 * random.normal(size=(count, DIM))
    elif kind == "spike":
        noise[:, random.integers(DIM)] = 100.0
    elif kind == "twice":
        noise = noise[random.integers(0, max(1, count // 3), count)]
    elif kind == "near":
        noise = noise[:1] + 1e-7 * random.normal(size=(count, DIM))
    elif kind == "equal":
        noise = np.repeat(noise[:1], count, axis=0)
    elif kind == "subnormal":
        noise *= 1e-41
    elif kind == "lengths":
        noise *= 10.0 ** random.uniform(-6, 6, size=(count, 1))
    elif kind == "zero":
        noise[:] = 0.0
    elif kind == "narrow":
        noise[:, 6:] *= 0.02
    return noise.astype(np.float32)


def build(
    folder: Path, vectors_ND: Vectors, *, engine: EngineName = "quantized", vector_type: VectorType = "float32"
) -> Index:
    """An index of two segments."""
    model = ModelInfo("Tiny", "0123", vectors_ND.shape[1])
    with open_writer(folder, Manifest(model, engine=engine, vector_type=vector_type)) as opened:
        half = len(vectors_ND) // 2
        for start, stop in ((0, half), (half, len(vectors_ND))):
            opened.commit([NewItem(row, vectors_ND[row], {"row": row % 7}) for row in range(start, stop)])
        opened.finish()
    return open_index(folder)


def truth(vectors_ND: Vectors, query_D: Vectors, k: int, allowed_N: Any) -> tuple[list[int], bytes]:
    """By brute force in float64: positions, and the bits of the scores."""
    scores_N = (vectors_ND.astype(np.float64) * query_D).sum(axis=1).astype(np.float32)
    allowed = np.flatnonzero(allowed_N)
    order = allowed[np.lexsort((allowed, -scores_N[allowed]))][:k]
    return order.tolist(), scores_N[order].tobytes()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes from a few rows on, and the exact engine only where nothing else does."""
    monkeypatch.setattr(codes, "SMALLEST", 8)
    monkeypatch.setattr(codes, "BLOCK", 16)
    monkeypatch.setattr(codes, "_CHUNK", 64)
    monkeypatch.setattr(quantized, "BLOCK", 16)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    queries=st.lists(st.sampled_from([*KINDS, "row"]), min_size=1, max_size=3),
    plan=st.sampled_from([(DIM, 0), (40, 16), (56, 0), (3, 2), (79, 0)]),
    vector_type=st.sampled_from(["float32", "float16"]),
    k=st.integers(1, 12),
    most_left=st.sampled_from([0, 10**6]),
    products=st.sampled_from([1 << 9, 1 << 23]),
    seed=st.integers(0, 99),
)
def test_answers_are_those_of_brute_force(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    kinds: list[str],
    queries: list[str],
    plan: tuple[int, int],
    vector_type: VectorType,
    k: int,
    most_left: int,
    products: int,
    seed: int,
) -> None:
    random, real = np.random.default_rng(seed), codes._planned
    monkeypatch.setattr(codes, "_planned", lambda sample_SD, num_rows: (real(sample_SD, num_rows)[0], *plan))
    monkeypatch.setattr(quantized, "_MOST_LEFT", most_left)
    monkeypatch.setattr(quantized, "_PRODUCTS", products)
    vectors_ND = np.concatenate([rows_of(kind, 70, random) for kind in kinds])
    random.shuffle(vectors_ND)
    if vector_type == "float16":
        vectors_ND = np.clip(vectors_ND, -6e4, 6e4)
    index = build(tmp_path_factory.mktemp("q") / "i", vectors_ND, vector_type=vector_type)
    vectors_ND = index.snapshot.rows.gather(np.arange(len(vectors_ND)))
    queries_QD = np.concatenate([vectors_ND[3:4] if kind == "row" else rows_of(kind, 1, random) for kind in queries])
    engine = index.engine
    assert isinstance(engine, QuantizedEngine)
    for allowed_N in (np.ones(len(vectors_ND), dtype=np.bool_), random.random(len(vectors_ND)) < 0.7):
        found = engine.search(queries_QD, k, allowed_N)
        for query_D, (positions, scores) in zip(queries_QD, found, strict=True):
            assert (positions.tolist(), scores.tobytes()) == truth(vectors_ND, query_D, k, allowed_N)
    require_bounds(index, vectors_ND, queries_QD)


def require_bounds(index: Index, vectors_ND: Vectors, queries_QD: Vectors) -> None:
    """No score exceeds its bound: by the head, and by both planes."""
    for segment, start in zip(index.snapshot.rows.segments, index.snapshot.rows.starts, strict=False):
        file = segment.derived(codes.NAME)
        assert file is not None
        opened = Codes(file, segment)
        opened.check()
        asked = opened.asked(queries_QD)
        blocks_N = np.arange(len(segment)) // 16
        for number, query_D in enumerate(queries_QD):
            exact_N = vectors_ND[start : start + len(segment)].astype(np.float64) @ query_D.astype(np.float64)
            head_N = opened.head_NC.astype(np.int64) @ asked.head.exact(number)
            bound_N = asked.head.factor_QB[number, blocks_N] * head_N + asked.head.slack_QB[number, blocks_N]
            assert (exact_N <= bound_N).all()
            if opened.tail_NC is not None:
                lengths = opened.layout.lengths
                without_N = opened.head_NC[:, lengths].astype(np.int64) @ asked.head.exact(number)[lengths]
                tail_N = opened.tail_NC.astype(np.int64) @ asked.tail.exact(number)
                bound_N += asked.tail.factor_QB[number, blocks_N] * tail_N + asked.tail.slack_QB[number, blocks_N]
                bound_N -= asked.head.factor_QB[number, blocks_N] * without_N
                assert (exact_N <= bound_N).all()


@pytest.fixture(scope="module")
def vectors_ND() -> Vectors:  # noqa: N802
    """Rows of all kinds but those that prove nothing."""
    random = np.random.default_rng(1)
    return np.concatenate([rows_of(kind, 400, random) for kind in ("noise", "clustered", "narrow")])


def answers(folder: Path, vectors_ND: Vectors) -> Any:
    """What is found for some of the rows, with and without a condition."""
    index = open_index(folder)
    return [index.search(vectors_ND[::211], 5, where=where) for where in (None, "row=3", "row!=3")]


def test_all_queries_of_common_vectors_are_proven(tmp_path: Path, vectors_ND: Vectors) -> None:
    index = build(tmp_path / "i", vectors_ND)
    engine = index.engine
    assert isinstance(engine, QuantizedEngine)
    index.search(vectors_ND[::3], 5)
    assert engine.counts.queries == engine.counts.proven == 400
    assert engine.counts.rows == 400 * 1200
    assert engine.counts.after_codes <= engine.counts.after_head < engine.counts.rows / 4


def test_many_queries_at_once_are_answered_as_one_by_one(tmp_path: Path, vectors_ND: Vectors) -> None:
    index = build(tmp_path / "i", vectors_ND)
    assert index.search(vectors_ND[:150], 5) == [index.search(one, 5)[0] for one in vectors_ND[:150, None]]


def test_an_engine_is_changed_both_ways_and_codes_come_with_it(tmp_path: Path, vectors_ND: Vectors) -> None:
    folder = tmp_path / "i"
    exact = build(folder, vectors_ND, engine="exact")
    assert all(codes.NAME not in one.files for one in exact.manifest.segments)
    expected = answers(folder, vectors_ND)
    for engine, expected_type in (("quantized", QuantizedEngine), ("exact", ExactEngine)):
        with open_writer(folder) as opened:
            opened.describe(engine=engine, source="")
            opened.finish()
        index = open_index(folder)
        assert isinstance(index.engine, expected_type)
        assert answers(folder, vectors_ND) == expected
    with open_writer(folder) as opened:
        opened.describe(engine="quantized", source="")
        opened.commit([NewItem("new", vectors_ND[0], {"row": 3})], remove=[5])
        opened.finish()
    assert [hit.id for hit in open_index(folder).search(vectors_ND[:1], 2)[0]] == [0, "new"]
    assert inspection.inspect(folder)[1] == []


@pytest.mark.parametrize("how", ["gone", "torn", "changed", "header", "digests"])
def test_damaged_codes_change_no_answer_and_are_made_again(
    tmp_path: Path, vectors_ND: Vectors, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "i"
    build(folder, vectors_ND)
    expected = answers(folder, vectors_ND)
    path = sorted(folder.glob(f"segment-*/{codes.NAME}"))[0]
    data, digests = path.read_bytes(), path.with_name(codes.NAME + DIGESTS)
    if how == "gone":
        path.unlink()
    elif how == "torn":
        path.write_bytes(data[:-1])
    else:
        flip(digests if how == "digests" else path, {"changed": len(data) // 2, "header": 5, "digests": 1}[how])
    assert answers(folder, vectors_ND) == expected
    assert "doing without it, which is slower" in caplog.text
    repaired(folder)
    assert path.read_bytes() == data
    assert inspection.inspect(folder)[1] == []
    assert answers(folder, vectors_ND) == expected


def test_codes_of_other_vectors_are_found_and_made_again(
    tmp_path: Path, vectors_ND: Vectors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, real = tmp_path / "i", codes.Layout
    with monkeypatch.context() as patch:
        patch.setattr(codes, "Layout", lambda vectors, *rest: real("0" * len(vectors), *rest))
        build(folder, vectors_ND)
    expected = answers(folder, vectors_ND)
    assert caplog.text.count("its codes are not of the vectors of this segment; doing without it") == 2
    found = inspection.inspect(folder)[1]
    assert [(Path(one.path).name, one.reason) for one in found] == [
        (codes.NAME, "is not of the vectors of its segment")
    ] * 2
    with open_writer(folder) as opened:
        opened.finish()
    assert inspection.inspect(folder)[1] == []
    caplog.clear()
    assert answers(folder, vectors_ND) == expected
    assert caplog.text == ""


def test_codes_that_lie_are_noticed_and_the_exact_engine_answers(
    tmp_path: Path, vectors_ND: Vectors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = codes._coded

    def lying(*args: Any) -> Any:
        codes_NC, facts = real(*args)
        return codes_NC // 2, facts

    with monkeypatch.context() as patch:
        patch.setattr(codes, "_coded", lying)
        index = build(tmp_path / "i", vectors_ND)
    positions, scores = index.engine.search(vectors_ND[:1], 5, index.snapshot.alive_N)[0]
    every = np.ones(len(vectors_ND), dtype=np.bool_)
    assert (positions.tolist(), scores.tobytes()) == truth(vectors_ND, vectors_ND[0], 5, every)
    assert "the codes are not of their vectors" in caplog.text


KILLED = """
import sys, time
from pathlib import Path
from cn_clip.retrieval import codes
from cn_clip.retrieval.writer import open_writer
codes.SMALLEST = 8
real = codes._Encoder.encode
def encode(self, rows_ND):
    print("here", flush=True)
    time.sleep(60)
    return real(self, rows_ND)
codes._Encoder.encode = encode
with open_writer(Path(sys.argv[1])) as opened:
    opened.describe(engine="quantized", source="")
    opened.finish()
"""


def test_a_kill_while_codes_are_written_loses_nothing(tmp_path: Path, vectors_ND: Vectors) -> None:
    folder = tmp_path / "i"
    build(folder, vectors_ND, engine="exact")
    expected = answers(folder, vectors_ND)
    with subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert answers(folder, vectors_ND) == expected
    with open_writer(folder) as opened:
        opened.finish()
    assert len(list(folder.glob(f"segment-*/{codes.NAME}"))) == 2
    assert inspection.inspect(folder)[1] == []
    assert answers(folder, vectors_ND) == expected


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, vectors_ND: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "i", vectors_ND)
    monkeypatch.setitem(sys.modules, "numkong", None)
    for act in (lambda: open_index(tmp_path / "i"), lambda: build(tmp_path / "j", vectors_ND)):
        with pytest.raises(MissingExtraError, match=r"the engine quantized needs the package `numkong`.*\[search\]"):
            act()
    assert not (tmp_path / "j" / "manifest.json").exists()


def test_products_that_overflow_are_refused_as_by_the_exact_engine(tmp_path: Path) -> None:
    rows_ND = rows_of("noise", 64, np.random.default_rng(0))
    rows_ND[7] *= np.float32(1e30)
    index = build(tmp_path / "i", rows_ND)
    assert [hit.id for hit in index.search(rows_ND[7:8] * np.float32(1e-30), 1)[0]] == [7]
    with pytest.raises(DataError, match="too long for float32 products"):
        index.search(rows_ND[7:8], 1)
