"""Large collections of pictures: folders, tar files, Parquet tables and LMDBs, by path and by URI, in parts."""

import datetime
import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from dataset_files import picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from cn_clip.data.bulk_pictures import open_collection
from cn_clip.data.lmdb_store import SplitWriter
from cn_clip.data.spilled import Spilled, first_twice
from cn_clip.data.storage import StorageError, open_storage, shown
from cn_clip.errors import CnClipError, ConfigError, DataError, MissingExtraError
from cn_clip.files import atomic_write

# Seven pictures, told apart by their bytes.
PICTURES = [picture((20 * number, 0, 0)) for number in range(7)]


def write_folder(folder: Path) -> str:
    for number, data in enumerate(PICTURES):
        path = folder / ("a" if number < 4 else "b/c") / f"{number}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "captions.csv").write_text("not looked at")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "0.png").write_bytes(b"hidden")
    return str(folder)


def write_tars(folder: Path) -> str:
    folder.mkdir()
    for name, numbers in (("00", range(3)), ("01", range(3, 7))):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in numbers:
                for suffix, data in (("png", PICTURES[number]), ("txt", b"caption")):
                    info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"{folder}/{{00..01}}.tar"


def write_tables(folder: Path) -> str:
    folder.mkdir()
    for name, numbers in (("x", range(5)), ("y", range(5, 7))):
        values = {"id": [f"{n}" for n in numbers], "image": [{"bytes": PICTURES[n], "path": None} for n in numbers]}
        parquet.write_table(pyarrow.table(values), folder / f"{name}.parquet", row_group_size=2)
    return str(folder)


def write_lmdb(folder: Path) -> str:
    import base64

    with SplitWriter(folder) as writer:
        for number, data in enumerate(PICTURES):
            writer.put_image(number, base64.b64encode(data))
    return str(folder)


KINDS: dict[str, tuple[Any, list[Any]]] = {
    "folder": (write_folder, [f"{'a' if n < 4 else 'b/c'}/{n}.PNG" for n in range(7)]),
    "tars": (write_tars, [f"{'00' if n < 3 else '01'}.tar/{n:03d}" for n in range(7)]),
    "tables": (write_tables, list(range(7))),
    "lmdb": (write_lmdb, list(range(7))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_parts_hold_every_picture_once_in_order(tmp_path: Path, kind: str, size: int) -> None:
    write, ids = KINDS[kind]
    collection = open_collection(write(tmp_path / "data"))
    assert list(collection.ids) == ids
    parts = [pickle.loads(pickle.dumps(collection.part(start, min(start + size, 7)))) for start in range(0, 7, size)]
    found = [part[number] for part in parts for number in range(len(part))]
    assert [one.key for one in found] == ids
    assert [one.data for one in found] == PICTURES
    assert [image_id for part in parts for image_id in part.ids] == ids


@pytest.mark.parametrize("kind", ["folder", "tars", "tables"])
def test_a_uri_holds_what_its_path_holds(tmp_path: Path, kind: str) -> None:
    location = KINDS[kind][0](tmp_path / "data")
    by_path, by_uri = open_collection(location), open_collection(f"file://{location}")
    assert (list(by_uri.ids), by_uri.digest) == (list(by_path.ids), by_path.digest)
    part = pickle.loads(pickle.dumps(by_uri.part(2, 7)))
    assert [part[number].data for number in range(5)] == PICTURES[2:]


@pytest.mark.parametrize("kind", ["folder", "tars", "tables"])
def test_an_address_in_memory_holds_what_was_put_there(tmp_path: Path, kind: str) -> None:
    """The way to an object store but for the network: nothing of it is a disk's."""
    location = KINDS[kind][0](tmp_path / "data")
    there = open_storage(f"memory://{tmp_path}/data")
    for path in (path for path in (tmp_path / "data").rglob("*") if path.is_file()):
        there.child(path.relative_to(tmp_path / "data").as_posix()).write(path.read_bytes())
    collection = open_collection(f"memory://{location}")
    assert list(collection.ids) == KINDS[kind][1]
    part = pickle.loads(pickle.dumps(collection.part(2, 7)))
    assert [part[number].data for number in range(5)] == PICTURES[2:]
    assert not list((tmp_path / "data").rglob(".*lock"))
    file = there.list_files()[0]
    there.at(file.path).delete()
    assert there.at(file.path).find() is None
    with pytest.raises(DataError, match=f"memory://.*{Path(file.path).name}: cannot be read") as raised:
        there.at(file.path).read()
    assert not isinstance(raised.value, StorageError)


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_tells_other_data(tmp_path: Path, kind: str) -> None:
    location = KINDS[kind][0](tmp_path / "data")
    before = open_collection(location).digest
    assert open_collection(location).digest == before
    path = next(
        path for path in sorted((tmp_path / "data").rglob("*.*")) if path.is_file() and "thumb" not in str(path)
    )
    if kind == "lmdb":
        path = tmp_path / "data" / "imgs" / "data.mdb"
    path.touch()
    if path.suffix != ".csv":
        assert open_collection(location).digest != before


def write_bytes(folder: Path, name: bytes, data: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError:  # macOS and Windows
        pytest.skip("this file system holds no names but in Unicode")


def test_files_have_ids_also_where_their_names_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    names = {"照片/1.png".encode("gbk"): "gbk:照片/1.png", b"\xff\n.png": "bytes:%FF%0A.png", b"z.png": "z.png"}
    for number, name in enumerate(names):
        write_bytes(folder, name, PICTURES[number])
    for location in (str(folder), f"file://{folder}", f"{folder}/*.png"):
        collection = open_collection(location)
        part = pickle.loads(pickle.dumps(collection.part(0, len(collection.ids))))
        found = {part[number].key: part[number].data for number in range(len(part))}
        expected = {spelling: PICTURES[number] for number, spelling in enumerate(names.values())}
        assert found == {key: data for key, data in expected.items() if "*" not in location or "/" not in key}
        assert all((path.isprintable() and path.isascii()) or "照片" in path for path in part.paths or ())


def test_members_of_tars_have_ids_also_where_their_names_are_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    names = {"照片/1.png".encode("gbk"): "gbk:照片/1", b"\xff.png": "bytes:%FF", "猫.png".encode(): "猫"}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(PICTURES[number])
            tar.addfile(info, io.BytesIO(PICTURES[number]))
    write_bytes(folder, "包.tar".encode("gbk"), stream.getvalue())
    collection = open_collection(str(folder))
    assert list(collection.ids) == [f"gbk:包.tar/{spelling}" for spelling in names.values()]
    part = collection.part(0, 3)
    assert [part[number].data for number in range(3)] == PICTURES[:3]


def test_folders_that_links_join_are_looked_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_folder(folder)
    (folder / "b" / "up").symlink_to(folder)
    (folder / "z").symlink_to(folder / "a")
    assert list(open_collection(str(folder)).ids) == KINDS["folder"][1]


def test_stars_names_and_single_files_are_found(tmp_path: Path) -> None:
    write_tars(tmp_path / "data")
    for name, number in (("*.tar", 7), ("01.tar", 4), ("0[!0]*.tar", 4), ("", 7), ("{01,00}.tar", 7)):
        assert len(open_collection(f"{tmp_path}/data/{name}").ids) == number
    assert open_collection(f"{tmp_path}/data/01.tar").ids[0] == "01.tar/003"
    assert open_collection(f"{tmp_path}/{{data}}/../data/01.tar".replace("{data}", "data")).ids[0] == "01.tar/003"


def test_errors_of_a_picture_name_its_place(tmp_path: Path) -> None:
    folder = open_collection(write_folder(tmp_path / "folder")).part(0, 7)
    (tmp_path / "folder/a/2.PNG").unlink()
    with pytest.raises(DataError, match=r"folder/a/2\.PNG: cannot be read") as raised:
        folder[2]
    assert not isinstance(raised.value, StorageError)  # this picture alone is missing
    tars = open_collection(write_tars(tmp_path / "tars")).part(0, 7)
    assert str(tars[3].where) == f"{tmp_path}/tars/01.tar/003.png"
    assert tars.paths is not None
    assert tars.paths[0] == f"{tmp_path}/tars/00.tar/000.png"
    (tmp_path / "tars/01.tar").write_bytes((tmp_path / "tars/01.tar").read_bytes()[:600])
    with pytest.raises(DataError, match=r"tars/01\.tar/006\.png: the file became shorter") as raised:
        tars[6]
    assert (raised.value.path, raised.value.id) == (f"{tmp_path}/tars/01.tar/006.png", tars.ids[6])
    tables = open_collection(write_tables(tmp_path / "tables")).part(0, 7)
    assert [str(tables[number].where) for number in (4, 5)] == [
        f"{tmp_path}/tables/x.parquet: row 5",
        f"{tmp_path}/tables/y.parquet: row 1",
    ]


def refusal(location: Path | str) -> str:
    with pytest.raises(CnClipError) as raised:
        open_collection(str(location))
    return str(raised.value)


def test_places_that_hold_no_pictures_are_told(tmp_path: Path) -> None:
    assert "holds no picture, tar or Parquet file, and is no LMDB" in refusal(tmp_path / "none")
    assert refusal(tmp_path / "{0..1}.tar").endswith("0.tar: no such file")
    assert "expected * in the last part" in refusal(f"{tmp_path}/*/x*.tar")
    write_folder(tmp_path / "mixed")
    (tmp_path / "mixed" / "x.tar").write_bytes(b"")
    assert "holds 7 pictures, 1 tar files; name one kind" in refusal(tmp_path / "mixed")
    (tmp_path / "cut.tar").write_bytes(b"cut")
    assert "cut.tar: cut short" in refusal(tmp_path / "cut.tar")
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    assert "no.parquet: cannot be read as Parquet" in refusal(tmp_path / "no.parquet")
    parquet.write_table(pyarrow.table({"id": [1], "picture": [b""]}), tmp_path / "other.parquet")
    assert "expected a column image_id or id and one with the bytes" in refusal(tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"id": [1, 1], "image": [b"", b""]}), tmp_path / "twice.parquet")
    assert "image id 1 comes twice" in refusal(tmp_path / "twice.parquet")
    parquet.write_table(pyarrow.table({"id": [1, None], "image": [b"", b""]}), tmp_path / "null.parquet")
    assert "null.parquet: row 2: expected an integer or string id" in refusal(tmp_path / "null.parquet")


def test_a_value_that_is_no_picture_is_told(tmp_path: Path) -> None:
    values = {"id": [1, 2], "image": pyarrow.array([None, "text"])}
    parquet.write_table(pyarrow.table(values), tmp_path / "text.parquet")
    part = open_collection(str(tmp_path / "text.parquet")).part(0, 2)
    for index, got in ((0, "NoneType"), (1, "str")):
        with pytest.raises(DataError, match=rf"row {index + 1} image: expected the bytes of a picture, got {got}"):
            part[index]


# --- the storage


def test_what_is_written_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (open_storage(str(tmp_path / "new/x")), open_storage(f"file://{tmp_path}/new/y")):
        place.write(b"first")
        with monkeypatch.context() as patched:
            patched.setattr("cn_clip.jsonl.os.replace", _no_space)
            with pytest.raises(StorageError, match=r"new/[xy]: cannot be written \(No space left"):
                place.write(b"second")
        assert place.read() == b"first"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["x", "y"]


def _no_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_killed_writers_left_goes(tmp_path: Path) -> None:
    for name in (".part-1.parquet.abcdefgh.tmp", ".other.abcdefgh.tmp", "part-1.parquet"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with atomic_write(tmp_path / "part-2.parquet"):
        open_storage(str(tmp_path)).delete_leftovers("part-")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".other.abcdefgh.tmp",
        "part-1.parquet",
        "part-2.parquet",
    ]


def test_keys_in_a_uri_are_not_told() -> None:
    assert shown("s3://KEY:SECRET@bucket/a?endpoint_override=localhost:1") == "s3://bucket/a"
    assert shown("D/a?b@c") == "D/a?b@c"


def test_unknown_stores_are_refused() -> None:
    for location in ("nope://x/y", "mock:///x"):
        with pytest.raises(ConfigError, match=r"expected a path, s3://, gs:// or file://"):
            open_storage(location)


def test_stores_that_fsspec_opens_are_read_and_not_written() -> None:
    from fsspec import register_implementation
    from fsspec.implementations.memory import MemoryFileSystem

    class Other(MemoryFileSystem):  # type: ignore[misc]
        protocol = "webdav"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(MemoryFileSystem._strip_protocol(path.removeprefix("webdav://")))

    register_implementation("webdav", Other, clobber=True)
    open_storage("memory://dav/features").child("a.txt").write(b"a")
    there = open_storage("webdav://dav/features")
    assert [there.below(one.path) for one in there.list_files()] == ["a.txt"]
    assert there.child("a.txt").read() == b"a"
    with pytest.raises(ConfigError, match=r"webdav://dav/features/b.txt: this store is only read"):
        there.child("b.txt").write(b"b")
    with pytest.raises(MissingExtraError, match=r"^oss://k/x: Install ossfs"):
        open_storage("oss://k/x")


# --- what lies beside pictures


def write_samples(path: Path) -> str:
    """Five samples of WebDataset; that of number 3 lies in parts far from each other, 4 has a picture alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        add("3.txt", "远".encode())
        for number in range(5):
            if number < 3:
                add(f"{number}.txt", f"图 {number}\n".encode())
                fields = {"author": "李" if number else None, "year": 2000 + number, "path": "x", "tags": ["a"]}
                add(f"{number}.json", json.dumps(fields).encode())
            if number == 3:
                add("filler.bin", bytes(1 << 17))
            add(f"{number}.png", PICTURES[number])
    return str(path)


def test_samples_of_a_tar_say_what_was_asked_for(tmp_path: Path) -> None:
    location = write_samples(tmp_path / "s.tar")
    beside = {}
    for columns in ((), ("caption",), ("year", "none"), ("*",)):
        part = pickle.loads(pickle.dumps(open_collection(location, columns).part(0, 5)))
        assert [part[number].data for number in range(5)] == PICTURES[:5]
        beside[columns] = [dict(part[number].beside) for number in range(5)]
    assert beside[()] == [{}] * 5
    assert beside["caption",] == [{"caption": "图 0"}, {"caption": "图 1"}, {"caption": "图 2"}, {"caption": "远"}, {}]
    assert beside["year", "none"] == [{"year": 2000}, {"year": 2001}, {"year": 2002}, {}, {}]
    assert beside["*",][:2] == [
        {"year": 2000, "tags": ["a"], "caption": "图 0"},
        {"author": "李", "year": 2001, "tags": ["a"], "caption": "图 1"},
    ]


def test_a_text_of_a_sample_that_is_none_is_told(tmp_path: Path) -> None:
    for number, (name, data) in enumerate([("0.json", b"{"), ("0.json", b"[]"), ("0.txt", b"\xff\xff")]):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for member, content in ((name, data), ("0.png", PICTURES[0])):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        part = open_collection(f"{tmp_path}/{number}.tar", ["*"]).part(0, 1)
        with pytest.raises(DataError, match=rf"{number}\.tar/0\.png.*write the tar again"):
            part[0]
        assert open_collection(f"{tmp_path}/{number}.tar").part(0, 1)[0].data == PICTURES[0]  # it was not asked for


def test_rows_of_a_table_say_what_was_asked_for(tmp_path: Path) -> None:
    values = {
        "id": [f"{number}" for number in range(4)],
        "image": PICTURES[:4],
        "text": ["猫", None, "", "狗"],
        "score": [0.5, float("nan"), None, 2.0],
        "day": [datetime.date(2026, 1, 31)] * 4,
        "path": ["s3://b/1.jpg"] * 4,
        "raw": [b"bytes"] * 4,
    }
    (tmp_path / "t").mkdir()
    parquet.write_table(pyarrow.table(values), tmp_path / "t" / "x.parquet", row_group_size=3)
    wanted = ("text", "score", "day", "path")
    part = pickle.loads(pickle.dumps(open_collection(str(tmp_path / "t"), wanted).part(1, 4)))
    day = {"day": "2026-01-31", "path": "s3://b/1.jpg"}
    assert [dict(part[number].beside) for number in range(3)] == [day, day, {"text": "狗", "score": 2.0} | day]
    with pytest.raises(DataError, match=r"row 1.* raw: expected what JSON holds, got bytes"):
        open_collection(str(tmp_path / "t"), ["*"]).part(0, 1)[0]
    with pytest.raises(ConfigError, match=r"column nope: .*/t has day, path, raw, score, text"):
        open_collection(str(tmp_path / "t"), ["nope"])
    with pytest.raises(ConfigError, match=r"column text: .*folder has no columns, only pictures"):
        open_collection(write_folder(tmp_path / "folder"), ["text"])


# --- long listings


def test_records_come_back_by_their_numbers() -> None:
    for count in (0, 1, 63, 64, 65, 1000):
        spilled = Spilled([number, f"名\udcff{number}"] for number in range(count))
        assert list(spilled) == [[number, f"名\udcff{number}"] for number in range(count)]
        for start, stop in ((0, 1), (62, 66), (64, 128), (999, 2000), (5, 5)):
            assert [one[0] for one in spilled.read(start, stop)] == list(range(count))[start:stop]
        spilled.append(["more"])
        assert spilled.read(count, count + 1) == [["more"]]


@given(st.lists(st.one_of(st.integers(0, 50), st.text(max_size=1)), max_size=40))
def test_an_id_that_comes_twice_is_found_and_no_other(ids: list[Any]) -> None:
    found = first_twice(ids, len(ids))
    assert (found is None) == (len(set(ids)) == len(ids))
    assert found is None or ids.count(found) > 1


names = st.text("ab-.0", min_size=1, max_size=3).filter(lambda name: name.strip(".") and not name.startswith("."))


@given(st.sets(st.lists(names, min_size=1, max_size=4).map(tuple), max_size=12))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_are_walked_in_the_order_of_their_paths(tmp_path: Path, paths: set[tuple[str, ...]]) -> None:
    files = {path for path in paths if not any(other[: len(path)] == path for other in paths - {path})}
    base = tmp_path / hashlib.blake2b(repr(sorted(files)).encode()).hexdigest()[:16]
    there = open_storage(f"memory://{base}")
    for parts in files:
        base.joinpath(*parts).parent.mkdir(parents=True, exist_ok=True)
        base.joinpath(*parts).write_bytes(b"")
        there.child("/".join(parts)).write(b"x")
    for storage in (open_storage(str(base)), there):
        found = [storage.below(one.path) for one in storage.walk()]
        assert found == sorted("/".join(parts) for parts in files)
