"""What is known of an item from its picture and its name: date, camera, place, folder and file."""

import io
import json
import math
import struct
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import IFDRational

from cn_clip import cli
from cn_clip.data import facts
from cn_clip.data.pictures import open_picture
from cn_clip.index.sources import FACTS
from cn_clip.retrieval.store import open_index

EXIF, GPS = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo
MAKE, MODEL, TAKEN, DIGITIZED = 0x010F, 0x0110, 0x9003, 0x9004


def exif(
    main: dict[int, Any] | None = None, detail: dict[int, Any] | None = None, place: dict[int, Any] | None = None
) -> Image.Exif:
    """EXIF of three directories."""
    made = Image.Exif()
    made.update(main or {})
    made.get_ifd(EXIF).update(detail or {})
    made.get_ifd(GPS).update(place or {})
    read = Image.Exif()  # as of a file, which names its inner directories
    read.load(made.tobytes())
    return read


def picture(made: Image.Exif, kind: str = "JPEG", color: str = "red") -> bytes:
    """A small file with that EXIF."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(stream, kind, exif=made)
    return stream.getvalue()


PHONE = exif(
    {MAKE: "Apple", MODEL: "iPhone 13", 0x0132: "2024:01:01 00:00:00"},
    {TAKEN: "2021:05:03 14:22:10", DIGITIZED: "2022:01:01 00:00:00"},
    {1: "S", 2: (33.0, 51.0, 36.0), 3: "E", 4: (151.0, 12.0, 40.5)},
)
OF_PHONE = {"date": "2021-05-03T14:22:10", "camera": "Apple iPhone 13", "latitude": -33.86, "longitude": 151.21125}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_every_format_tells_date_camera_and_place(kind: str) -> None:
    data = picture(PHONE, kind)
    assert facts.of_bytes(data) == OF_PHONE
    assert facts.of_picture(open_picture(data)) == OF_PHONE


@pytest.mark.filterwarnings(
    "ignore:Tag data larger than file:UserWarning"
)  # of Pillow 13, which has a bound of its own
def test_exif_whose_values_overlap_is_not_read() -> None:
    """3,000 entries that all name the same 100,000 bytes: 300 MB in Pillow."""
    entries = b"".join(struct.pack("<HHII", 0x9000 + number, 7, 100_000, 8) for number in range(3000))
    bomb = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3000) + entries + bytes(100_000)
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "AVIF", exif=bomb)
    assert "exif" not in open_picture(stream.getvalue()).info
    assert facts.of_bytes(stream.getvalue()) == {}


def test_a_picture_without_exif_tells_nothing() -> None:
    assert facts.of_bytes(picture(Image.Exif())) == {}
    assert facts.of_bytes(b"no picture") == {}


@pytest.mark.parametrize(
    ("written", "date"),
    [
        ("2021:05:03 14:22:10", "2021-05-03T14:22:10"),
        ("2021-05-03T14:22:10+08:00", "2021-05-03T14:22:10"),
        ("2021/5/3 4:02", "2021-05-03T04:02:00"),
        ("2021:05:03 14:22:10.125\0junk", "2021-05-03T14:22:10"),
        ("2021:05:03 24:61:10", "2021-05-03"),
        ("2021:05:03", "2021-05-03"),
        ("2024:02:29 00:00:00", "2024-02-29T00:00:00"),
        ("2021:02:29 00:00:00", None),
        ("2021:13:45 00:00:00", None),
        ("0000:00:00 00:00:00", None),
        ("0001:01:01 00:00:00", None),
        ("    :  :     :  :  ", None),
        ("三月五日", None),
        ("", None),
    ],
)
def test_dates_are_valid_or_absent(written: str, date: str | None) -> None:
    image = Image.new("RGB", (1, 1))
    image.getexif().get_ifd(EXIF)[TAKEN] = written
    assert facts.of_picture(image).get("date") == date


def test_the_date_of_scanning_counts_where_none_of_taking_is_valid() -> None:
    made = exif({}, {TAKEN: "0000:00:00 00:00:00", DIGITIZED: "2021:05:03 14:22:10"})
    assert facts.of_bytes(picture(made)) == {"date": "2021-05-03T14:22:10"}
    assert facts.of_bytes(picture(exif({TAKEN: "1999:12:31 23:59:59"}))) == {"date": "1999-12-31T23:59:59"}


@pytest.mark.parametrize(
    ("make", "model", "camera"),
    [
        ("Canon", "Canon EOS 5D", "Canon EOS 5D"),
        ("NIKON CORPORATION", "NIKON D750", "NIKON D750"),
        ("HUAWEI", "ELE-AL00", "HUAWEI ELE-AL00"),
        ("Apple\0\0", " iPhone\n13 \x07", "Apple iPhone 13"),
        ("小米".encode().decode("latin-1"), "Mi 9", "小米 Mi 9"),
        ("", "D750", "D750"),
        ("Canon", "", "Canon"),
        ("", "", None),
        ("x" * 500, "y", "x" * 64),
    ],
)
def test_the_camera_names_its_make_once(make: str, model: str, camera: str | None) -> None:
    image = Image.new("RGB", (1, 1))
    image.getexif().update({MAKE: make, MODEL: model})
    assert facts.of_picture(image).get("camera") == camera


@pytest.mark.parametrize(
    "place",
    [
        {1: "N", 2: (91.0, 0.0, 0.0), 3: "E", 4: (10.0, 0.0, 0.0)},
        {1: "N", 2: (10.0, 0.0, 0.0), 3: "E", 4: (180.0, 0.0, 1.0)},
        {1: "N", 2: (10.0, 61.0, 0.0), 3: "E", 4: (10.0, 0.0, 0.0)},
        {1: "N", 2: (-10.0, 0.0, 0.0), 3: "E", 4: (10.0, 0.0, 0.0)},
        {1: "N", 2: (IFDRational(1, 0), 0.0, 0.0), 3: "E", 4: (10.0, 0.0, 0.0)},
        {1: "N", 2: (math.inf, -math.inf, 1e308), 3: "E", 4: (1e308, 1e308)},
        {1: "X", 2: (10.0, 0.0, 0.0), 3: "E", 4: (10.0, 0.0, 0.0)},
        {2: (10.0, 0.0, 0.0), 4: (10.0, 0.0, 0.0)},
        {1: "N", 2: (10.0, 0.0, 0.0)},
        {1: "N", 2: (0.0, 0.0, 0.0), 3: "E", 4: (0.0, 0.0, 0.0)},
        {1: "N", 2: "ten", 3: "E", 4: None},
    ],
)
def test_a_place_that_is_none_is_left_out(place: dict[int, Any]) -> None:
    image = Image.new("RGB", (1, 1))
    image.getexif().get_ifd(GPS).update(place)
    assert facts.of_picture(image) == {}


ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.text()
    | st.binary()
    | st.integers()
    | st.floats()
    | st.builds(IFDRational, st.integers(), st.integers())
    | st.sampled_from(["2021:05:03 14:22:10", "N", "E", "W", "S", "0000:00:00 00:00:00"]),
    lambda one: st.lists(one, max_size=4).map(tuple),
    max_leaves=4,
)


@given(*(st.dictionaries(st.sampled_from(tags), ANYTHING) for tags in ([MAKE, MODEL], [TAKEN, DIGITIZED], range(1, 5))))
def test_exif_with_lies_never_raises_and_gives_only_what_is_possible(
    main: dict[int, Any], detail: dict[int, Any], place: dict[int, Any]
) -> None:
    image = Image.new("RGB", (1, 1))
    image.getexif().update(main)
    image.getexif().get_ifd(EXIF).update(detail)
    image.getexif().get_ifd(GPS).update(place)
    check(facts.of_picture(image))


@given(st.binary(max_size=200), st.integers(0, 400), st.binary(max_size=4))
def test_damaged_exif_never_raises(noise: bytes, start: int, patch: bytes) -> None:
    written = PHONE.tobytes()
    for data in (b"Exif\0\0" + noise, written[:start] + patch + written[start + len(patch) :], written[:start]):
        image = Image.new("RGB", (1, 1))
        image.info["exif"] = data
        check(facts.of_picture(image))


def check(found: facts.Facts) -> None:
    """Whether every field is one that an item may have."""
    json.dumps(found, allow_nan=False)
    assert set(found) <= {"date", "camera", "latitude", "longitude"}
    date, camera = str(found.get("date", "2000-01-01")), str(found.get("camera", "x"))
    assert datetime.fromisoformat(date).isoformat().startswith(date)
    assert camera.isprintable()
    assert 1 <= len(camera) <= 64
    assert ("latitude" in found) == ("longitude" in found)
    assert all(math.isfinite(float(found.get(name, 0))) for name in ("latitude", "longitude"))
    assert abs(float(found.get("latitude", 0))) <= 90
    assert abs(float(found.get("longitude", 0))) <= 180


def test_folder_and_file_come_from_the_name() -> None:
    assert facts.of_name("旅行/2021/a.jpg") == {"folder": "旅行/2021", "file": "a.jpg"}
    assert facts.of_name("a.jpg") == {"folder": "", "file": "a.jpg"}
    assert facts.of_name("more/旅行/a.jpg", "more/") == {"folder": "旅行", "file": "a.jpg"}
    assert facts.of_name(7) == {}


# --- in an index


def build(folder: Path, index: Path, *args: object) -> None:
    """Brings the index up to the folder."""
    model = ("--model", "Emoji-Tiny", "--num-threads", "1", "--num-workers", "0")
    cli.main(["index", "build", str(folder), "--output", str(index), *model, *map(str, args), "--json"])


def test_items_have_the_facts_and_a_table_is_believed_before_the_camera(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, index = tmp_path / "pictures", tmp_path / "i"
    (folder / "旅行").mkdir(parents=True)
    (folder / "旅行" / "a.jpg").write_bytes(picture(PHONE))
    (folder / "b.png").write_bytes(picture(Image.Exif(), "PNG", "blue"))
    build(folder, index)

    def known(item_id: str) -> dict[str, Any]:
        item = open_index(index).metadata(item_id)
        return {name: value for name, value in item.items() if name in (*FACTS, "note", "table_fields")}

    assert known("旅行/a.jpg") == {**OF_PHONE, "folder": "旅行", "file": "a.jpg"}
    assert known("b.png") == {"folder": "", "file": "b.png"}

    (folder / "旅行" / "a.jpg").rename(folder / "c.jpg")  # the same bytes by another name
    capsys.readouterr()
    build(folder, index)
    result = json.loads(capsys.readouterr().out)
    assert (result["encoded"], result["reused"]) == (0, 1)
    assert known("c.jpg") == {**OF_PHONE, "folder": "", "file": "c.jpg"}

    table = tmp_path / "t.csv"
    table.write_text("image,date,note\nc.jpg,2001,n\n", encoding="utf-8")
    build(folder, index, "--metadata", table)
    told = {**OF_PHONE, "folder": "", "file": "c.jpg", "date": "2001", "note": "n", "table_fields": ["date"]}
    assert known("c.jpg") == told
    (folder / "c.jpg").write_bytes(picture(PHONE, color="green"))
    build(folder, index)  # without the table, what it said stays, though the picture is another
    assert known("c.jpg") == told
    table.write_text("image,note\nc.jpg,m\n", encoding="utf-8")
    build(folder, index, "--metadata", table)  # it says nothing of the date any more
    assert known("c.jpg") == {**OF_PHONE, "folder": "", "file": "c.jpg", "note": "m"}
    capsys.readouterr()
    for args in ((), ("--metadata", table)):
        build(folder, index, *args)
        assert json.loads(capsys.readouterr().out)["unchanged"] == 2


def test_an_index_from_before_the_facts_gets_them_only_when_it_is_renewed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, index = tmp_path / "pictures", tmp_path / "i"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture(PHONE))
    with monkeypatch.context() as before:
        for name in ("of_picture", "of_bytes", "of_name"):
            before.setattr(facts, name, lambda *_: {})
        build(folder, index)
    assert "date" not in open_index(index).metadata("a.jpg")
    capsys.readouterr()
    build(folder, index)
    assert json.loads(capsys.readouterr().out)["unchanged"] == 1
    build(folder, index, "--renew")
    assert json.loads(capsys.readouterr().out)["encoded"] == 0
    assert OF_PHONE.items() <= open_index(index).metadata("a.jpg").items()
    assert open_index(index).metadata("a.jpg")["file"] == "a.jpg"
