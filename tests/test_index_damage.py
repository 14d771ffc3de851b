"""Damaged, unreadable and half-replaced indexes: a sentence or the right answer, and nothing healthy is taken away."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_index_commands import Command, built, command, feature_file, refusal, vectors
from test_index_store import MODEL, build, found, items, unit
from unreadable_files import unreadable

from cn_clip import digests
from cn_clip.data.lmdb_store import SplitWriter
from cn_clip.errors import DataError, UnreadableError
from cn_clip.index import ingest, sources
from cn_clip.retrieval import addresses, engines, graph, inspection, manifest, segments, writer
from cn_clip.retrieval.manifest import Manifest
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import open_writer

__all__ = ["built", "command", "refusal"]  # fixtures

AWAY = (errno.EACCES, errno.EIO, errno.ESTALE)
FILES = ("vectors.npy", "items.jsonl", "thumbnails.bin", "rows.npy", "blocks.crc32")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a file of a test has many."""
    monkeypatch.setattr(segments, "BLOCK_BYTES", 256)


@pytest.fixture
def small_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph from a few rows on."""
    monkeypatch.setattr(graph, "SMALLEST_GRAPH", 8)
    monkeypatch.setattr(writer, "SMALLEST_GRAPH", 8)


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Changes one bit."""
    with open(path, "rb+") as stream:
        stream.seek(place)
        (value,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([value ^ 1 << bit]))


def segment(index: Path, number: int = 0) -> Path:
    """The folder of a segment."""
    return sorted(index.glob("segment-*"))[number]


def answers(folder: Path) -> Any:
    """All that an index says."""
    index = open_index(folder)
    hits = index.search(unit(2, seed=9), 50)
    return list(index.items()), hits, [index.thumbnail(one) for one in index.ids], index.model, index.manifest.source


def refusal_of(folder: Path) -> str | None:
    """What is said instead of an answer."""
    try:
        answers(folder)
    except DataError as error:
        return str(error)
    return None


# --- digests


@pytest.mark.parametrize("engine", ["exact", "usearch"])
@pytest.mark.usefixtures("small_blocks", "small_graphs")
def test_no_changed_bit_is_taken_for_an_answer(tmp_path: Path, engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "i"
    with open_writer(folder, Manifest(MODEL, engine=engine, source="/p")) as opened:
        opened.commit(items(unit(12)))
        opened.commit(items(unit(6, seed=1), first=20), remove=[3])
        opened.finish()
    expected, random, num_refused = answers(folder), np.random.default_rng(0), 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        size = path.stat().st_size
        for place in random.integers(size, size=min(size, 60)).tolist():
            flip(path, place, place % 8)
            caplog.clear()
            refused = refusal_of(folder)
            if refused is None:
                assert answers(folder) == expected
                # The graph, which can be done without, is named in the log; the manifest has spaces.
                assert path.name in caplog.text or path.name == manifest.NAME
            else:
                assert str(folder) in refused
                num_refused += 1
            flip(path, place, place % 8)
    assert answers(folder) == expected
    assert num_refused > 400


@pytest.mark.parametrize("file", FILES[:3])
@pytest.mark.usefixtures("small_blocks")
def test_a_damaged_block_is_named_when_it_is_read_and_not_before(tmp_path: Path, file: str) -> None:
    vectors_ND = unit(64)
    build(tmp_path / "i", vectors_ND, size=64)
    path = segment(tmp_path / "i") / file
    place = path.stat().st_size - 10  # of the last item
    flip(path, place)
    index = open_index(tmp_path / "i")
    assert index.snapshot.rows.segments[0].item(0)[0] == "图0"
    assert index.snapshot.rows.segments[0].thumbnail(0) == b"jpg0"
    np.testing.assert_array_equal(index.snapshot.rows.gather(np.array([0]))[0], vectors_ND[0])
    asked = {FILES[0]: lambda: index.search(vectors_ND[63:], 1), FILES[1]: lambda: index.ids}
    with pytest.raises(DataError) as caught:
        asked.get(file, lambda: index.thumbnail(63))()
    start = place // 256 * 256
    assert str(caught.value) == (
        f"{path}: block {place // 256} (bytes {start} to {path.stat().st_size}) is damaged; see `cn-clip index "
        "check`, which repairs what can be with --repair"
    )


@pytest.mark.usefixtures("small_blocks")
def test_blocks_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "i", unit(64), size=64)
    index, seen = open_index(tmp_path / "i"), list[tuple[str, int]]()
    real = segments.MappedFile._check_block

    def check(file: segments.MappedFile, block: int) -> None:
        seen.append((file.path.name, block))
        real(file, block)

    monkeypatch.setattr(segments.MappedFile, "_check_block", check)
    for _ in range(3):
        index.search(unit(2), 64)
        assert len(index.ids) == 64
    assert len(seen) == len(set(seen))
    sizes = {file: (segment(tmp_path / "i") / file).stat().st_size for file in FILES[:2] + FILES[3:4]}
    # The headers were read when the index was opened.
    assert len(seen) == sum(-(-size // 256) for size in sizes.values()) - 2


def test_rows_longer_than_a_block_are_checked_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "BLOCK_BYTES", 16)
    vectors_ND = unit(4)
    build(tmp_path / "i", vectors_ND)
    flip(segment(tmp_path / "i") / "vectors.npy", 128 + 64 * 2 + 30)
    rows = open_index(tmp_path / "i").snapshot.rows
    np.testing.assert_array_equal(rows.gather(np.array([3, 1, 0])), vectors_ND[[3, 1, 0]])
    with pytest.raises(DataError, match=r"vectors\.npy: block 17 \(bytes 272 to 288\) is damaged"):
        rows.gather(np.array([3, 2]))


@pytest.mark.skipif(not hasattr(os, "pread"), reason="without pread a file is read through its map")
def test_a_disk_that_fails_later_is_an_error_and_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "i", unit(5))
    index = open_index(tmp_path / "i")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UnreadableError, match=r"items\.jsonl: cannot be read just now \(.*, errno 5\)"):
        _ = index.ids


def old_style(folder: Path) -> None:
    """Makes an index one of before there were digests of blocks and of the manifest."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["digest"]
    for one in content["segments"]:
        del one["files"]["blocks.crc32"]
        (folder / one["name"] / "blocks.crc32").unlink()
    (folder / "manifest.json").write_text(json.dumps(content))


def test_an_index_without_digests_of_blocks_opens_and_gets_some(tmp_path: Path) -> None:
    build(tmp_path / "i", unit(40))
    expected = answers(tmp_path / "i")
    old_style(tmp_path / "i")
    assert answers(tmp_path / "i") == expected
    assert inspection.inspect(tmp_path / "i")[1] == []
    with open_writer(tmp_path / "i") as opened:
        opened.commit(items(unit(1), first=90), remove=range(1, 40, 2))  # enough to write all anew
    assert (segment(tmp_path / "i") / "blocks.crc32").exists()
    assert inspection.inspect(tmp_path / "i")[1] == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"'<f4'", b"'>f4'"),
        (b"'<f4'", b"'<i4'"),
        (b"'<f4'", b"'<f5'"),
        (b"'<f4'", b"'|O' "),
        (b"False", b"True "),
        (b"(5, 16)", b"(4, 20)"),
        (b"(5, 16)", b"(5, -1)"),
        (b"{'descr'", b"{'''''''"),
        (b"{'descr'", b"{'desc\xff'"),
        (b"{'descr'", b"((((((((" * 1),
        (b"NUMPY", b"NUMPI"),
        (b"NUMPY\x01", b"NUMPY\x03"),
        (b"\x01\x00v\x00", b"\x01\x00\xff\xff"),
    ],
)
def test_a_damaged_header_is_one_sentence(tmp_path: Path, old: bytes, new: bytes) -> None:
    build(tmp_path / "i", unit(5))
    old_style(tmp_path / "i")
    path = segment(tmp_path / "i") / "vectors.npy"
    data = path.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(DataError) as caught:
        open_index(tmp_path / "i")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_damaged_list_of_removed_items_is_one_sentence(tmp_path: Path) -> None:
    build(tmp_path / "i", unit(20))
    with open_writer(tmp_path / "i") as opened:
        opened.commit(remove=[1, 3])
    (path,) = (tmp_path / "i").glob("removed-*")
    flip(path, 20)
    with pytest.raises(DataError, match=r"removed-[0-9]+\.npy: its bytes have changed; see `cn-clip index check`"):
        open_index(tmp_path / "i")


def test_a_merge_gives_damaged_bytes_no_new_digest(tmp_path: Path) -> None:
    build(tmp_path / "i", unit(7), size=1)
    flip(segment(tmp_path / "i", 2) / "thumbnails.bin", 1)
    said = r"thumbnails\.bin: block 0 .*; the 1 added and 0 removed items count; merging its segments failed$"
    with open_writer(tmp_path / "i") as opened, pytest.raises(DataError, match=said):
        opened.commit(items(unit(1), first=7))
    index = open_index(tmp_path / "i")
    assert len(index) == 8
    assert len(index.manifest.segments) == 8


# --- the graph


@pytest.fixture
def with_graph(tmp_path: Path, small_graphs: None) -> Path:
    """An index of 300 items with a graph."""
    build(tmp_path / "i", unit(300), engine="usearch", size=300)
    return tmp_path / "i"


def test_usearch_never_sees_a_changed_graph(
    with_graph: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = with_graph.glob("graph-*")
    monkeypatch.setattr(graph.Graph, "open", None)
    for place in np.random.default_rng(1).integers(path.stat().st_size, size=40).tolist():
        flip(path, place, place % 8)
        caplog.clear()
        index = open_index(with_graph)
        assert found(index, unit(300)[:2], 1) == [["图0"], [1]]
        (record,) = caplog.records
        assert record.getMessage().startswith(
            f"{path}: is damaged: its bytes are not those that were written; searching"
        )
        assert "\n" not in record.getMessage()
        flip(path, place, place % 8)
    flip(path, 5000)
    assert inspection.inspect(with_graph)[1] == [inspection.Damage(path.name, "its bytes have changed")]
    monkeypatch.undo()
    with open_writer(with_graph) as opened:
        opened.finish()
    assert inspection.inspect(with_graph)[1] == []


def test_a_graph_is_read_once_and_then_remembered(with_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", -3600)
    real, seen = digests.facts_of, list[str]()

    def facts_of(path: Path) -> Any:
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(digests, "facts_of", facts_of)
    for _ in range(3):
        assert isinstance(open_index(with_graph).engine, graph.GraphEngine)
    assert len(seen) == 1
    shutil.copytree(with_graph, with_graph.with_name("copy"))
    assert isinstance(open_index(with_graph.with_name("copy")).engine, graph.GraphEngine)
    assert len(seen) == 2


@pytest.mark.parametrize("number", AWAY)
def test_a_graph_that_cannot_be_read_now_is_done_without(
    with_graph: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    (path,) = with_graph.glob("graph-*")
    with unreadable(number, path):
        index = open_index(with_graph)
    assert isinstance(index.engine, engines.ExactEngine)
    assert f"{path}: cannot be read just now ({os.strerror(number)}, errno {number})" in caplog.text


def test_what_usearch_raises_while_it_searches_ends_the_use_of_the_graph(
    with_graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = open_index(with_graph)
    assert isinstance(index.engine, graph.GraphEngine)
    assert index.engine.graph is not None

    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError("No available threads to lock")

    index.engine.graph._index = type("Broken", (), {"search": fail, "__len__": lambda _: 300})()
    for _ in range(2):
        assert found(index, unit(300)[:2], 1) == [["图0"], [1]]
    (record,) = caplog.records
    assert "usearch fails (No available threads to lock); searching exactly" in record.getMessage()


# --- a reader beside a writer


def test_a_graph_replaced_while_it_is_opened_is_no_damage(
    with_graph: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old, real = manifest.read(with_graph), manifest.read
    with open_writer(with_graph) as opened:
        opened.commit(items(unit(20, seed=3), first=400))
        opened.finish()
    stale: Iterator[Manifest] = iter([old])
    monkeypatch.setattr(manifest, "read", lambda folder: next(stale, None) or real(folder))
    index = open_index(with_graph)
    assert (type(index.engine), len(index), caplog.records) == (graph.GraphEngine, 320, [])


def test_check_beside_a_writer_finds_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "i", unit(7), size=1)
    real, looked = inspection.facts_of, list[Path]()

    def facts_of(path: Path) -> Any:
        if not looked:  # all segments become one, and the old ones go
            with open_writer(tmp_path / "i") as opened:
                opened.commit(items(unit(1), first=7))
        looked.append(path)
        return real(path)

    monkeypatch.setattr(inspection, "facts_of", facts_of)
    facts, damaged = inspection.inspect(tmp_path / "i")
    assert (damaged, facts.num_items, len(facts.segments)) == ([], 8, 1)
    assert segment(tmp_path / "i") / "vectors.npy" in looked


# --- what cannot be read now is not gone


@pytest.mark.parametrize("number", AWAY)
@pytest.mark.parametrize("stat", [True, False])
def test_a_manifest_that_cannot_be_read_now_is_not_written_over(
    built: Path, tmp_path: Path, refusal: Callable[..., str], number: int, stat: bool
) -> None:
    before = (built / "manifest.json").read_bytes()
    with unreadable(number, built / "manifest.json", stat=stat):
        message = refusal("index", "build", tmp_path / "pictures", "--output", built)
        with pytest.raises(UnreadableError):
            addresses.facts(built)
        if stat:
            with pytest.raises(UnreadableError), open_writer(built, Manifest(MODEL)):
                pass
    assert message.startswith(f"{built / 'manifest.json'}: cannot be read just now ({os.strerror(number)}, errno")
    assert (built / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("number", AWAY)
@pytest.mark.parametrize("stat", [True, False])
def test_pictures_that_cannot_be_read_now_stop_a_repair(
    built: Path, tmp_path: Path, command: Command, number: int, stat: bool
) -> None:
    before = vectors(open_index(built))
    flip(segment(built, 1) / "vectors.npy", 3000)
    content = (built / "manifest.json").read_bytes()
    with unreadable(number, tmp_path / "pictures", stat=stat):
        message = command("index", "check", built, "--repair", status=1)["error"]
    assert f"cannot be read{' just now' if stat else ''} ({os.strerror(number)}, errno {number})" in message
    assert (built / "manifest.json").read_bytes() == content
    assert list(built.glob("before-repair-*")) == []
    result = command("index", "check", built, "--repair")
    assert (result["num_lost"], result["num_items"]) == (0, 12)
    after = vectors(open_index(built))
    assert after.keys() == before.keys()
    for one, vector in after.items():
        np.testing.assert_allclose(vector, before[one], atol=1e-5)


def test_a_repair_that_takes_long_is_one_step_all_the_same(
    built: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "COMMIT_SECONDS", 0.0)
    flip(segment(built, 1) / "vectors.npy", 3000)
    content = (built / "manifest.json").read_bytes()
    repair = ("index", "check", built, "--repair", "--batch-size", 1)
    last = json.loads((segment(built, 1) / "items.jsonl").read_text().splitlines()[-1])["id"]
    with unreadable(errno.EIO, tmp_path / "pictures" / last):
        assert "nothing was changed" in command(*repair, status=1)["error"]
    assert (built / "manifest.json").read_bytes() == content
    aside = Path(command(*repair)["kept_aside"])
    assert len(command("index", "check", aside, status=1)["damaged"]) == 1


def test_a_picture_that_is_too_large_is_not_called_empty(
    built: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "LARGEST_PICTURE", 99_999)
    path = next((tmp_path / "pictures").rglob("*.png"))
    path.write_bytes(bytes(100_000))
    assert command("index", "build", tmp_path / "pictures", "--output", built)["skipped_by_reason"] == {"damaged": 1}


def test_a_repair_without_the_package_that_a_picture_needs_loses_none(
    built: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise DataError("a HEIC picture needs: pip install 'cn-clip-next[photos]'")

    flip(segment(built, 1) / "vectors.npy", 3000)
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "open_picture", refuse)
        message = command("index", "check", built, "--repair", status=1)["error"]
    assert "pip install 'cn-clip-next[photos]'; nothing was changed" in message
    assert command("index", "check", built, "--repair")["num_lost"] == 0


@pytest.mark.parametrize("number", AWAY)
@pytest.mark.parametrize("file", [*FILES, "manifest"])
def test_a_file_of_an_index_that_cannot_be_read_now_stops_a_repair(
    built: Path, command: Command, number: int, file: str
) -> None:
    path = built / "manifest.json" if file == "manifest" else segment(built) / file
    reason = f"cannot be read just now ({os.strerror(number)}, errno {number})"
    content = (built / "manifest.json").read_bytes()
    with unreadable(number, path):
        listed = command("index", "check", built, status=1)
        message = command("index", "check", built, "--repair", status=1)["error"]
    if file != "manifest":
        assert listed["damaged"] == [{"path": f"{segment(built).name}/{file}", "reason": reason}]
    assert f"{path}: {reason}" in message
    assert (built / "manifest.json").read_bytes() == content
    assert command("index", "check", built)["damaged"] == []


@pytest.mark.parametrize("kind", ["features", "lmdb"])
def test_a_source_that_cannot_be_read_now_stops_a_repair(tmp_path: Path, command: Command, kind: str) -> None:
    if kind == "features":
        source, _ = feature_file(tmp_path / "a.img_feat.jsonl", 5)
    else:
        source = lmdb_of(tmp_path / "split", 5) / "imgs"
    model = () if kind == "features" else ("--model", "Emoji-Tiny", "--num-threads", "1")
    command("index", "build", source, "--output", tmp_path / "i", *model)
    flip(segment(tmp_path / "i") / "vectors.npy", 200)
    with unreadable(errno.EIO, source, stat=True):
        assert f"{source}" in command("index", "check", tmp_path / "i", "--repair", status=1)["error"]
    source.rename(tmp_path / "gone")
    assert command("index", "check", tmp_path / "i", "--repair", status=1)["num_lost"] == 5


def test_build_keeps_the_items_of_pictures_that_cannot_be_read_now(
    built: Path, tmp_path: Path, command: Command
) -> None:
    pictures = tmp_path / "pictures"
    for number in AWAY:
        for stat in (True, False):
            for path in sorted(pictures.rglob("*.png")):
                os.utime(path, (number, number + stat))  # changed, so that they are read
            with unreadable(number, pictures / "d0", stat=stat):
                result = command("index", "build", pictures, "--output", built)
            assert (result["removed"], result["num_items"]) == ([], 12)
    shutil.rmtree(pictures / "d0")
    assert len(command("index", "build", pictures, "--output", built)["removed"]) == 6


# --- what a repair takes away


def test_what_a_repair_takes_away_is_kept_as_an_index(built: Path, tmp_path: Path, command: Command) -> None:
    before = vectors(open_index(built))
    path = segment(built, 1) / "vectors.npy"
    flip(path, 3000)
    shutil.rmtree(tmp_path / "pictures")
    result = command("index", "check", built, "--repair", status=1)
    assert (result["num_lost"], result["num_items"]) == (5, 7)
    aside = Path(result["kept_aside"])
    assert aside.parent == built
    assert command("index", "check", aside, status=1)["damaged"] == [
        {"path": f"{path.parent.name}/vectors.npy", "reason": "its bytes have changed"}
    ]
    flip(aside / path.parent.name / "vectors.npy", 3000)  # say, of a backup
    shutil.move(aside, tmp_path / "restored")
    assert command("index", "check", tmp_path / "restored")["damaged"] == []
    assert vectors(open_index(tmp_path / "restored")) == before
    assert command("index", "check", built)["damaged"] == []


def test_discard_keeps_nothing(built: Path, tmp_path: Path, command: Command, refusal: Callable[..., str]) -> None:
    flip(segment(built, 1) / "vectors.npy", 3000)
    result = command("index", "check", built, "--repair", "--discard")
    assert (result["num_lost"], result["kept_aside"]) == (0, None)
    assert list(built.glob("before-repair-*")) == []
    assert command("index", "check", built, "--discard", status=2)["error"]


def test_a_repair_takes_away_what_a_killed_one_left_and_no_check_does(built: Path, command: Command) -> None:
    left = built / "segment-000099" / "blocks.crc32"
    left.parent.mkdir()
    left.write_bytes(b"of no segment")
    assert command("index", "check", built)["damaged"] == []
    assert left.exists()
    assert command("index", "check", built, "--repair")["repaired"] is False
    assert not left.parent.exists()


def test_a_repair_of_the_graph_alone_keeps_nothing_aside(with_graph: Path, command: Command) -> None:
    flip(next(with_graph.glob("graph-*")), 5000)
    result = command("index", "check", with_graph, "--repair")
    assert (result["remaining"], result["kept_aside"]) == ([], None)


def test_on_a_disk_without_links_the_index_is_copied(
    built: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    flip(segment(built, 1) / "vectors.npy", 3000)
    monkeypatch.setattr(os, "link", fail)
    aside = Path(command("index", "check", built, "--repair")["kept_aside"])
    assert len(list(aside.rglob("*.npy"))) == 6


@pytest.mark.usefixtures("small_blocks")
def test_a_repair_keeps_the_vectors_and_thumbnails_of_whole_blocks(tmp_path: Path, command: Command) -> None:
    vectors_ND = unit(60)
    build(tmp_path / "i", vectors_ND, size=60)
    folder = segment(tmp_path / "i")
    flip(folder / "vectors.npy", 128 + 64 * 30)
    flip(folder / "thumbnails.bin", 0)
    result = command("index", "check", tmp_path / "i", "--repair", status=1)
    lost = gone_of(result)
    assert lost == {30, 31, 32, 33}
    index = open_index(tmp_path / "i")
    assert len(index) == 60 - len(lost)
    for item_id, values in index.items():
        np.testing.assert_array_equal(index.vector(item_id), vectors_ND[values["number"]])
    assert (index.thumbnail("图0"), index.thumbnail(59)) == (None, b"jpg59")
    assert command("index", "check", tmp_path / "i")["damaged"] == []


def gone_of(result: dict[str, Any]) -> set[int]:
    """The numbers of lost items."""
    return {int(str(one).removeprefix("图")) for one in result["lost"]}


def test_digests_are_made_again_without_a_model(built: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from cn_clip.index import jobs

    before = vectors(open_index(built))
    flip(segment(built) / "blocks.crc32", 0)
    monkeypatch.setattr(jobs, "open_encoder", None)
    assert command("index", "check", built, "--repair")["num_lost"] == 0
    assert vectors(open_index(built)) == before


# --- sources that hold less than they say


def lmdb_of(folder: Path, count: int, *, lost: int = 0) -> Path:
    """A split that says `count` pictures and holds `lost` fewer."""
    import base64

    import lmdb

    from cn_clip.demo import emoji

    glyphs = emoji.load("twemoji")
    with SplitWriter(folder) as split:
        for number in range(count):
            split.put_image(number, base64.b64encode(emoji.png(glyphs[number])))
    with lmdb.open(str(folder / "imgs"), map_size=2**24) as env, env.begin(write=True) as transaction:
        for number in range(lost):
            transaction.delete(str(number).encode())
    return folder


def test_an_lmdb_that_holds_less_than_it_says_takes_no_items_away(
    tmp_path: Path, command: Command, refusal: Callable[..., str]
) -> None:
    split = lmdb_of(tmp_path / "split", 7)
    model = ("--model", "Emoji-Tiny", "--num-threads", "1")
    command("index", "build", split, "--output", tmp_path / "i", *model)
    shutil.rmtree(split)
    lmdb_of(split, 7, lost=1)
    sentence = f"{split / 'imgs'}: num_images says 7, but it holds 6 pictures; build the dataset again"
    assert refusal("index", "build", split, "--output", tmp_path / "i") == sentence
    assert len(open_index(tmp_path / "i")) == 7
    output = tmp_path / "f.jsonl"
    args = ("--image-data", split / "imgs", "--image-feat-output-path", output, "--resume", "Emoji-Tiny")
    assert sentence in command("features", "--extract-image-feats", *args, status=1)["error"]
    assert not output.exists()
