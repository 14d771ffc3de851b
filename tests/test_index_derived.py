"""Files derived from segments: answers with them are those without them, and they are made again when they are lost."""

# N items, D dimensions

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_index_damage import answers, flip, refusal_of
from test_index_store import MODEL, build, items, unit
from test_search_filters import CONDITIONS, METADATA

from cn_clip.errors import ConfigError, DataError
from cn_clip.index import repairing
from cn_clip.retrieval import columns, derived, ids, inspection, manifest
from cn_clip.retrieval.conditions import fields_of, parse_condition
from cn_clip.retrieval.derived import KINDS
from cn_clip.retrieval.manifest import Manifest
from cn_clip.retrieval.segments import DIGESTS
from cn_clip.retrieval.store import ItemId, open_index
from cn_clip.retrieval.writer import IndexWriter, NewItem, open_writer

NAMES = [kind.name for kind in KINDS if kind.is_wanted(Manifest(MODEL), 10**6)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segment has all files."""
    for kind in (columns, ids):
        monkeypatch.setattr(kind, "SMALLEST", 1)
    monkeypatch.setattr(columns, "STRIPE_ROWS", 4)


def of_before(folder: Path) -> None:
    """Makes an index one from before there were derived files."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["digest"]
    for one in content["segments"]:
        for name in [*NAMES, *(name + DIGESTS for name in NAMES)]:
            del one["files"][name]
            (folder / one["name"] / name).unlink()
    (folder / "manifest.json").write_text(json.dumps(content))


def derived_of(folder: Path) -> set[str]:
    """The derived files that the manifest names, by their paths."""
    return {path for path, _ in manifest.read(folder).files() if Path(path).name.removesuffix(DIGESTS) in NAMES}


def repaired(folder: Path) -> None:
    """As `index check --repair`."""
    facts, found = inspection.inspect(folder)
    assert repairing.repair(repairing.AddOptions(), folder, facts, found, lambda _: None, keep_aside=True)  # type: ignore[arg-type]


def test_every_segment_has_the_derived_files_and_merged_ones_too(tmp_path: Path) -> None:
    index = build(tmp_path / "i", unit(60), size=5)
    assert len(index.manifest.segments) < 12
    for one in index.manifest.segments:
        assert {*NAMES, *(name + DIGESTS for name in NAMES)} <= one.files.keys()
    assert inspection.inspect(tmp_path / "i")[1] == []


def test_an_index_of_before_answers_alike_and_the_next_writer_makes_them(tmp_path: Path) -> None:
    build(tmp_path / "i", unit(40))
    expected, names = answers(tmp_path / "i"), derived_of(tmp_path / "i")
    of_before(tmp_path / "i")
    assert derived_of(tmp_path / "i") == set()
    assert answers(tmp_path / "i") == expected
    with open_writer(tmp_path / "i") as opened:
        assert (3 in opened, "3" in opened, len(opened)) == (True, False, 40)
        opened.finish()
    assert derived_of(tmp_path / "i") == names
    assert answers(tmp_path / "i") == expected
    assert inspection.inspect(tmp_path / "i")[1] == []


@pytest.mark.parametrize("name", [*NAMES, *(name + DIGESTS for name in NAMES)])
@pytest.mark.parametrize("how", ["gone", "torn", "changed"])
def test_a_lost_derived_file_changes_no_answer_and_is_made_again(
    tmp_path: Path, name: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path / "i", unit(40), size=40)
    expected = answers(tmp_path / "i")
    (path,) = (tmp_path / "i").glob(f"segment-*/{name}")
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "torn":
        path.write_bytes(data[:-1])
    else:
        flip(path, len(data) // 2)
    assert answers(tmp_path / "i") == expected
    assert open_index(tmp_path / "i").vector(3).tolist() == unit(40)[3].tolist()
    assert "doing without it" in caplog.text
    assert [one.path for one in inspection.inspect(tmp_path / "i")[1]] == [f"{path.parent.name}/{name}"]
    repaired(tmp_path / "i")
    assert path.read_bytes() == data
    assert inspection.inspect(tmp_path / "i")[1] == []
    assert answers(tmp_path / "i") == expected
    assert list((tmp_path / "i").glob("before-repair-*")) == []


def test_no_changed_bit_of_a_derived_file_changes_an_answer(tmp_path: Path) -> None:
    build(tmp_path / "i", unit(60), size=30)
    expected, random = answers(tmp_path / "i"), np.random.default_rng(0)
    for path in sorted(tmp_path / "i" / one for one in derived_of(tmp_path / "i")):
        for place in random.integers(path.stat().st_size, size=40).tolist():
            flip(path, place, place % 8)
            assert (refusal_of(tmp_path / "i"), answers(tmp_path / "i")) == (None, expected)
            flip(path, place, place % 8)


def test_a_derived_file_that_cannot_be_made_leaves_the_index_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build(tmp_path / "i", unit(20))
    of_before(tmp_path / "i")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with open_writer(tmp_path / "i") as opened:
        with monkeypatch.context() as patch:
            patch.setattr(derived, "atomic_write", fail)
            with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
                opened.commit(items(unit(3), first=100), remove=["图0"])
        assert open_index(tmp_path / "i").ids == index.ids
        opened.commit(items(unit(3), first=100), remove=["图0"])
    assert open_index(tmp_path / "i").ids == [*index.ids[1:], "图100", 101, "图102"]


UPGRADE = """
import sys, time
from pathlib import Path
from typing import Any
from cn_clip.retrieval import columns, derived, ids
from cn_clip.retrieval.writer import open_writer
ids.SMALLEST = columns.SMALLEST = 1
columns.STRIPE_ROWS = 4
real, count = derived.digests_of, [0]
def digests_of(path):
    count[0] += 1
    if count[0] == int(sys.argv[2]):
        print("here", flush=True)
        time.sleep(60)
    return real(path)
derived.digests_of = digests_of
with open_writer(Path(sys.argv[1])) as opened:
    opened.finish()
"""


@pytest.mark.parametrize("step", [1, 4])
def test_a_kill_while_an_index_of_before_gets_them_loses_nothing(tmp_path: Path, step: int) -> None:
    build(tmp_path / "i", unit(40))
    expected, names = answers(tmp_path / "i"), derived_of(tmp_path / "i")
    of_before(tmp_path / "i")
    args = [sys.executable, "-c", UPGRADE, str(tmp_path / "i"), str(step)]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert answers(tmp_path / "i") == expected
    with open_writer(tmp_path / "i") as opened:
        opened.finish()
    assert derived_of(tmp_path / "i") == names
    assert inspection.inspect(tmp_path / "i")[1] == []
    assert answers(tmp_path / "i") == expected


# --- ids

WILD_IDS = st.one_of(st.integers(), st.text(max_size=5), st.integers(0, 20), st.integers(0, 20).map(str))
DISTINCT = st.lists(WILD_IDS, max_size=9, unique_by=lambda one: (type(one), one))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(DISTINCT, st.sets(st.integers(0, 20))), max_size=4),
    asked=st.lists(WILD_IDS, max_size=5),
)
def test_ids_are_found_as_in_a_dict(
    tmp_path_factory: pytest.TempPathFactory, steps: Sequence[tuple[list[ItemId], set[int]]], asked: list[ItemId]
) -> None:
    folder, known = tmp_path_factory.mktemp("ids") / "i", dict[tuple[type, ItemId], int]()
    with open_writer(folder, Manifest(MODEL)) as opened:
        for number, (added, removed) in enumerate(steps):
            row = unit(1)[0]
            opened.commit([NewItem(one, row, {"step": number}) for one in added], remove=removed)
            for one in [*removed, *added]:
                known.pop((type(one), one), None)
            known |= {(type(one), one): number for one in added}
            check(opened, known, asked)
    index = open_index(folder)
    assert [(type(one), one) for one in index.ids] == list(known)
    for one in [*asked, *index.ids]:
        assert (one in index) == ((type(one), one) in known)
        if one in index:
            assert index.metadata(one) == {"step": known[type(one), one]}


def check(opened: IndexWriter, known: dict[tuple[type, ItemId], int], asked: list[ItemId]) -> None:
    """The writer says of every id what the dict says."""
    assert len(opened) == len(known)
    found = opened.stored([*asked, *(one for _, one in known)])
    expected = {one: step for (_, one), step in known.items()} | {}
    assert {one: item.metadata["step"] for one, item in found.items()} == expected


def test_ids_of_the_same_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "hash_of", lambda item_id: b"\0" * 7 + bytes([len(str(item_id)) % 2]))
    index = build(tmp_path / "i", unit(300), size=100)
    assert [index.metadata(one)["number"] for one in index.ids] == list(range(300))
    assert "absent" not in index
    with open_writer(tmp_path / "i") as opened:
        opened.commit(items(unit(2), first=0, again=True))
        assert len(opened) == 300
    assert open_index(tmp_path / "i").ids == [*index.ids[2:], *index.ids[:2]]


def test_many_ids_are_found_as_few_are(tmp_path: Path) -> None:
    index = build(tmp_path / "i", unit(30_000), size=30_000)
    segment, all_ids = index.snapshot.rows.segments[0], index.ids
    table = ids.table_of(segment)
    hashes_N = ids.hashes_of(all_ids)
    numbers, rows = table.find(hashes_N)
    assert dict(zip(numbers.tolist(), rows.tolist(), strict=True)) == {number: number for number in range(30_000)}
    for start in range(0, 30_000, 999):
        numbers, rows = table.find(hashes_N[start : start + 3])
        assert (numbers.tolist(), rows.tolist()) == ([0, 1, 2][: len(rows)], list(range(start, start + 3))[: len(rows)])
    assert table.find(ids.hashes_of(["absent"]))[0].tolist() == []


# --- columns


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.lists(METADATA, max_size=9), st.sets(st.integers(0, 30))), max_size=4),
    wheres=st.lists(CONDITIONS, min_size=1, max_size=4),
)
def test_columns_of_merged_segments_answer_as_each_item_by_itself_would(
    tmp_path_factory: pytest.TempPathFactory, steps: Any, wheres: list[str]
) -> None:
    folder, known, number = tmp_path_factory.mktemp("columns") / "i", dict[ItemId, dict[str, Any]](), 0
    with open_writer(folder, Manifest(MODEL)) as opened:
        for added, removed in steps:
            news = [NewItem(number + place, unit(1)[0], one) for place, one in enumerate(added)]
            opened.commit(news, remove=removed)
            known = {one: held for one, held in known.items() if one not in removed}
            known |= {item.id: dict(item.metadata) for item in news}
            number += len(added)
        opened.finish()
    index = open_index(folder)
    assert index.ids == list(known)
    assert index.fields == list(dict.fromkeys(name for one in known.values() for name in one if name != "path"))
    fields = {name for one, held in known.items() for name in fields_of(one, held)}
    for where in wheres:
        condition = parse_condition(where)
        if known and not condition.fields <= fields:
            with pytest.raises(ConfigError, match="no item has the field"):
                index.search(unit(1), 1, where=where)
        else:
            found = index.search(unit(1), 1000, where=where)[0]
            assert {hit.id for hit in found} == {one for one, held in known.items() if condition.admits(one, held)}
    assert inspection.inspect(folder)[1] == []


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_conditions_hold_without_the_columns(tmp_path: Path, how: str) -> None:
    index = build(tmp_path / "i", unit(40), size=40)
    expected = [hit.id for hit in index.search(unit(1), 40, where="number>=30 or number=3")[0]]
    (path,) = (tmp_path / "i").glob("segment-*/columns.bin")
    if how == "gone":
        path.unlink()
    else:
        flip(path, 20)
    again = open_index(tmp_path / "i")
    assert [hit.id for hit in again.search(unit(1), 40, where="number>=30 or number=3")[0]] == expected
    assert len(expected) == 11


def test_items_that_share_no_fields_make_short_stripes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "STRIPE_ROWS", 65536)
    monkeypatch.setattr(columns, "STRIPE_CODES", 100)
    with open_writer(tmp_path / "i", Manifest(MODEL)) as opened:
        opened.commit([NewItem(number, unit(1)[0], {f"k{number}": 1}) for number in range(200)])
    # 11 rows of 11 fields are the first above 100, where one stripe of 200 would be 40,000.
    (path,) = (tmp_path / "i").glob("segment-*/columns.bin")
    assert path.stat().st_size < 40_000
    index = open_index(tmp_path / "i")
    assert [hit.id for hit in index.search(unit(1), 5, where="k150=1")[0]] == [150]


def test_an_id_too_long_for_a_number_is_refused_with_a_sentence(tmp_path: Path) -> None:
    build(tmp_path / "i", unit(4), size=4)
    with open_writer(tmp_path / "i") as opened, pytest.raises(DataError):
        opened.commit([NewItem(10**5000, unit(1)[0], {})])
    assert len(open_index(tmp_path / "i")) == 4
