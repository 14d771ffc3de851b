"""Tables of pictures: encodings, separators, lines of names, Excel, and what is refused; the one reader of all."""

import csv
import io
import itertools
import json
import logging
import string
import sys
import warnings
import zipfile
from collections.abc import Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cn_clip.data import tables
from cn_clip.data.tables import read_rows
from cn_clip.errors import DataError, MissingExtraError

WANTED = ("image", "text")
ROWS = [{"image": "a.png", "text": "一只橘猫"}, {"image": "b.png", "text": "两条狗，在跑"}]


def rows_of(path: Path, wanted: Sequence[str] = WANTED) -> list[dict[Any, Any]]:
    return [row for _, row in read_rows(path, wanted, lambda _: None)]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def workbook(path: Path, *rows: Sequence[Any]) -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(list(row))
    book.save(path)
    return path


def text_table(separator: str = ",") -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator).writerows([WANTED, *(row.values() for row in ROWS)])
    return stream.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_unicode_of_any_kind_and_three_separators_are_read_without_a_word(
    tmp_path: Path, encoding: str, separator: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert rows_of(write(tmp_path / f"t{suffix}", text_table(separator).encode(encoding))) == ROWS
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("gb18030", "一只橘猫"), ("gbk", "种子頭髮"), ("gb18030", "㐀𠀀的猫"), ("big5", "一隻橘色的貓在頭髮上睡覺")],
)
def test_chinese_encodings_are_read_and_said_in_one_line(
    tmp_path: Path, encoding: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "t.csv", f"image,text\n照.png,{text}\n".encode(encoding))
    assert rows_of(path) == [{"image": "照.png", "text": text}]
    name = "BIG5" if encoding == "big5" else "GB18030"
    assert len(caplog.messages) == 1
    assert f"is not UTF-8, read as {name}" in caplog.messages[0]


@pytest.mark.parametrize(
    "content",
    [
        "image,text\na.png,一只橘猫在睡觉".encode() + b"\xff\n",
        "image,text\na.png,一只橘猫在睡觉".encode()[:-1],
        b"image,text\na.png,\x80\xff\n",
        b"image,text\na.png," + "\ue005".encode("gb18030") + "的".encode("gb18030"),
    ],
)
def test_damaged_utf8_and_what_is_no_text_are_not_taken_for_gb18030(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"t\.csv: invalid UTF-8 near byte \d+; save the table as UTF-8"):
        rows_of(write(tmp_path / "t.csv", content))


def test_the_byte_of_damage_is_counted_from_the_start_of_the_file(tmp_path: Path) -> None:
    before = "image,text\n" + "a.png,一只橘猫\n" * 80_000
    assert len(before.encode()) > 1 << 20
    with pytest.raises(DataError, match=f"invalid UTF-8 near byte {len(before.encode())};"):
        rows_of(write(tmp_path / "t.csv", before.encode() + b"\xff.png,x\n"))


CHINESE = st.text(st.sampled_from("的一是在不了有和人这中大为上个国我以要他时来用们" + string.ascii_letters + " ，。"))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(st.tuples(CHINESE, CHINESE), min_size=1, max_size=8),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "gb18030"]),
    st.sampled_from(",;\t"),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_was_written_is_read_in_every_encoding_and_with_every_separator(
    tmp_path: Path, cells: list[tuple[str, str]], encoding: str, separator: str, end: str
) -> None:
    rows = [{"image": f"猫{first}.png", "text": f"{second}。"} for first, second in cells]
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator, lineterminator=end).writerows([WANTED, *(row.values() for row in rows)])
    assert rows_of(write(tmp_path / "t.csv", stream.getvalue().encode(encoding))) == rows


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.binary(max_size=200),
    st.sampled_from([".csv", ".tsv", ".jsonl", ".xlsx"]),
    st.sampled_from([b"", b"image,text\n"]),
)
def test_any_bytes_are_rows_or_one_sentence_with_the_file(
    tmp_path: Path, data: bytes, suffix: str, head: bytes
) -> None:
    path = write(tmp_path / f"t{suffix}", head + data)
    sentence = f"{path}: "
    try:
        assert all(number >= 1 for number, _ in read_rows(path, WANTED, lambda _: None))
    except DataError as error:
        sentence = str(error)
    assert sentence.startswith(str(path))
    assert "\n" not in sentence


def test_excels_line_about_the_separator_is_no_row(tmp_path: Path) -> None:
    found = list(read_rows(write(tmp_path / "t.csv", "sep=;\r\nimage;text\r\na.png;一,二\r\n"), WANTED, lambda _: None))
    assert found == [(3, {"image": "a.png", "text": "一,二"})]


def test_rows_without_content_are_passed_over_and_names_lose_their_blanks(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "\n image , text\n,,\n\na.png,猫,\n,\n")
    assert list(read_rows(path, WANTED, lambda _: None)) == [(5, {"image": "a.png", "text": "猫"})]


def test_cells_that_lack_or_are_too_many_are_shown_to_the_reader(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path / "t.csv", "image,text\na.png\nb.png,一,二\n"))
    assert rows == [{"image": "a.png", "text": None}, {"image": "b.png", "text": "一", None: ["二"]}]


def test_a_quotation_mark_that_is_never_closed_is_refused_with_its_line(tmp_path: Path) -> None:
    lines = ["image,text", "a.png,一", 'b.png,"二', *(f"{number}.png,三" for number in range(200))]
    with pytest.raises(DataError, match=r"t\.csv:3: a cell goes over 201 lines; close the quotation mark"):
        rows_of(write(tmp_path / "t.csv", "\n".join(lines)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a.png,一\nb.png,二\n", [{"image": "a.png", "text": "一"}, {"image": "b.png", "text": "二"}]),
        ("一;a.JPG\n", [{"image": "a.JPG", "text": "一"}]),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".xlsx"])
def test_two_columns_without_names_are_taken_as_pictures_and_texts(
    tmp_path: Path, content: str, expected: list[dict[str, str]], suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"t{suffix}"
    if suffix == ".xlsx":
        workbook(path, *(line.replace(";", ",").split(",") for line in content.splitlines()))
    else:
        write(path, content)
    assert rows_of(path) == expected
    assert "has no header; its two columns are taken as" in "".join(caplog.messages)


@pytest.mark.parametrize("content", ["a.png,一,动物\n", "a.png\n", "a.png,b.png\n"])
def test_a_first_line_that_is_a_row_is_refused_with_the_line_to_write(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"t\.csv:1: the first line, 'a\.png.* put a line such as image,text before it"):
        rows_of(write(tmp_path / "t.csv", content))


def test_values_of_excel_are_those_of_json(tmp_path: Path) -> None:
    path = workbook(
        tmp_path / "t.xlsx",
        ("image", "text", "n", "x", "day", "when", "ok", "bad", None),
        (),
        ("a.png", "猫\n狗", 7, 1.5, date(2021, 5, 3), datetime(2021, 5, 3, 14, 22, 10), True, "#N/A", "no name"),
        ("b.png", None, 7.0),
    )
    first, second = read_rows(path, WANTED, lambda _: None)
    assert first == (
        3,
        {"image": "a.png", "text": "猫\n狗", "n": 7, "x": 1.5, "day": "2021-05-03", "when": "2021-05-03T14:22:10"}
        | {"ok": True, "bad": ""},
    )
    assert second == (4, {"image": "b.png", "text": "", "n": 7, "x": "", "day": "", "when": "", "ok": "", "bad": ""})
    json.dumps([first, second], allow_nan=False)


def test_of_several_sheets_the_first_that_is_visible_is_read_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = openpyxl.Workbook()
    book.active.title, book.active.sheet_state = "旧", "hidden"
    sheet = book.create_sheet("说明")
    sheet.append(WANTED)
    sheet.append(["a.png", "猫"])
    book.create_sheet("更多").append(["x"])
    book.save(tmp_path / "t.xlsx")
    assert rows_of(tmp_path / "t.xlsx") == [{"image": "a.png", "text": "猫"}]
    assert "has 3 sheets; only 说明 is read" in "".join(caplog.messages)


def changed(path: Path, member: str, edit: Any) -> Path:
    """The archive with one member rewritten."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content[member] = edit(content[member])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


SHEET = "xl/worksheets/sheet1.xml"


def test_a_formula_is_the_value_that_excel_computed(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", WANTED, ("a.png", "=1+1"))
    assert rows_of(path)[0]["text"] == ""  # nobody has computed it
    changed(
        path, SHEET, lambda xml: xml.replace(b"<f>1+1</f><v></v>", b"<f>1+1</f><v>2</v>").replace(b"<v />", b"<v>2</v>")
    )
    assert rows_of(path)[0]["text"] == 2


def test_an_archive_that_unpacks_to_too_much_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workbook(tmp_path / "t.xlsx", WANTED)
    changed(path, SHEET, lambda xml: xml + b" " * (9 << 20))
    assert path.stat().st_size < 30_000
    monkeypatch.setattr(tables, "MOST_UNPACKED_BYTES", 8 << 20)
    monkeypatch.setattr(openpyxl, "load_workbook", None)
    with pytest.raises(
        DataError, match=r"t\.xlsx: unpacks to 9 MB, more than the 8 MB that are read; save it as \.csv"
    ):
        rows_of(path)


def test_a_row_far_below_ends_the_table_at_excels_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workbook(tmp_path / "t.xlsx", WANTED, ("a.png", "猫"))
    changed(
        path, SHEET, lambda xml: xml.replace(b"</sheetData>", b'<row r="99999999999"><c r="A9"/></row></sheetData>')
    )
    monkeypatch.setattr(tables, "MOST_ROWS", 5000)
    assert rows_of(path) == [{"image": "a.png", "text": "猫"}]


def test_a_sheet_with_a_wrong_size_in_its_head_is_read_whole(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", WANTED, ("a.png", "猫"))
    changed(path, SHEET, lambda xml: xml.replace(b'ref="A1:B2"', b'ref="A1"'))
    assert rows_of(path) == [{"image": "a.png", "text": "猫"}]


def test_entities_that_grow_are_refused(tmp_path: Path) -> None:
    lol = b"".join(b'<!ENTITY a%d "%s">' % (one, b"&a%d;" % (one - 1) * 10) for one in range(1, 10))
    head = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a0 "lol">' + lol + b"]>"
    path = workbook(tmp_path / "t.xlsx", WANTED)
    changed(path, SHEET, lambda xml: head + xml.replace(b"image", b"&a9;"))
    with pytest.raises(
        DataError, match=r"t\.xlsx: cannot be read as \.xlsx \(.*\); save it again, as \.xlsx or as \.csv"
    ):
        rows_of(path)


def test_a_very_wide_sheet_is_refused(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", [f"c{number}" for number in range(300)])
    with pytest.raises(DataError, match=r"t\.xlsx: has more than 256 columns; leave only those"):
        rows_of(path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "t.xlsx",
            b"\xd0\xcf\x11\xe0" + b"0" * 99,
            r"is an old \.xls file or has a password; save it as \.xlsx without",
        ),
        ("t.xlsx", b"image,text\n", r"is not a complete \.xlsx file; save it again, as \.xlsx or as \.csv"),
        ("t.csv", b"PK\x03\x04" + b"0" * 99, r"is an Excel file by its content; rename it to \.xlsx"),
        ("t.csv", b"\xd0\xcf\x11\xe0" + b"0" * 99, r"is an old Excel file by its content; save it as \.xlsx or \.csv"),
        (
            "t.ods",
            b"",
            r"expected a table whose name ends in one of \.csv, \.tsv, \.jsonl, \.parquet, \.xlsx; save it as one",
        ),
    ],
)
def test_other_files_are_refused_with_what_to_do(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        rows_of(write(tmp_path / name, content))
    with pytest.raises(DataError, match=r"gone\.csv: no such file; give a table whose name ends in"):
        rows_of(tmp_path / "gone.csv")


def test_an_xlsx_cut_anywhere_is_one_sentence(tmp_path: Path) -> None:
    whole = workbook(tmp_path / "w.xlsx", WANTED, *(("a.png", f"猫{number}") for number in range(50))).read_bytes()
    for size in range(0, len(whole), 211):
        with pytest.raises(DataError, match=r"t\.xlsx: is not a complete"):
            rows_of(write(tmp_path / "t.xlsx", whole[:size]))


def test_a_damaged_member_is_one_sentence(tmp_path: Path) -> None:
    for number, member in enumerate(("xl/workbook.xml", SHEET, "[Content_Types].xml", "xl/styles.xml")):
        path = workbook(tmp_path / f"{number}.xlsx", WANTED, ("a.png", "猫"))
        changed(path, member, lambda xml: xml[: len(xml) // 2])
        with pytest.raises(DataError, match=r"cannot be read as \.xlsx"):
            rows_of(path)


def test_without_openpyxl_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = workbook(tmp_path / "t.xlsx", WANTED)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingExtraError, match=r"reading the Excel table .*t\.xlsx needs .*\[xlsx\]'"):
        rows_of(path)


def test_warnings_of_the_reader_are_not_the_users_and_those_of_the_caller_are_heard(tmp_path: Path) -> None:
    path = workbook(tmp_path / "t.xlsx", WANTED, ("a.png", "猫"), ("b.png", datetime(2021, 1, 1)))
    changed(path, SHEET, lambda xml: xml.replace(b"<v>44197</v>", b"<v>99999999</v>"))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in read_rows(path, WANTED, lambda _: None):
            warnings.warn("mine", UserWarning, stacklevel=1)
    assert {str(one.message) for one in heard} == {"mine"}


def test_a_large_table_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("image,text\n")
        stream.writelines(f"{number}.png,猫{number}\n" for number in range(100_000))
    some = itertools.islice(read_rows(path, WANTED, lambda _: None), 2)
    assert [number for number, _ in some] == [2, 3]


def test_the_line_about_an_encoding_is_a_warning_of_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows_of(write(tmp_path / "t.csv", "image,text\na.png,橘猫\n".encode("gbk")))
    assert [(one.name, one.levelno) for one in caplog.records] == [("cn_clip.data.tables", logging.WARNING)]
