"""Records of the tsv and jsonl files: the meaning of ids, and a Fault for each line that is none."""

import base64
import json
from pathlib import Path

import pytest
from dataset_files import jsonl_line, tsv_line
from hypothesis import given
from hypothesis import strategies as st

from cn_clip.data.records import (
    Fault,
    ImageRecord,
    TextRecord,
    canonical_id,
    decode_base64,
    id_from_key,
    id_key,
    image_line,
    read_image_records,
    read_text_records,
    text_line,
)
from cn_clip.errors import DataError

WORDS = (
    st.text(st.characters(exclude_characters="\t\r\n\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
    .map(str.strip)
    .filter(bool)
)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        ("7", 7),
        ("0", 0),
        (-5, -5),
        ("-5", -5),
        ("007", "007"),
        ("+7", "+7"),
        ("-0", "-0"),
        ("٣", "٣"),
        ("a-7", "a-7"),
        ("7.0", "7.0"),
        ("皮卡丘.png", "皮卡丘.png"),
        ("9" * 40, int("9" * 40)),
    ],
)
def test_an_id_has_one_form(value: object, expected: object) -> None:
    result = canonical_id(value)
    assert (type(result), result) == (type(expected), expected)


@pytest.mark.parametrize(
    "value", [True, False, 1.0, None, "", "a\tb", "a\n", "\r", "a\0", [1], {}, "\ud83d", b"7", " 7", "a　"]
)
def test_what_is_no_id_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="id"):
        canonical_id(value)


@pytest.mark.parametrize("value", ["文" * 171, "a" * 512, 10**600, "9" * 5000])
def test_an_id_longer_than_an_lmdb_key_is_refused_with_the_limit(value: object) -> None:
    with pytest.raises(DataError, match="at most 511 bytes"):
        canonical_id(value)


def test_an_id_of_511_bytes_is_accepted() -> None:
    assert canonical_id("a" * 511) == "a" * 511


@given(st.integers(-(10**30), 10**30) | WORDS)
def test_a_key_gives_back_its_id(value: int | str) -> None:
    identity = canonical_id(value)
    if identity != "num_images":
        assert id_from_key(id_key(identity)) == identity


def test_the_name_of_the_count_is_no_picture_id() -> None:
    with pytest.raises(DataError, match="reserved"):
        id_key("num_images")


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="not UTF-8"):
        id_from_key(b"\xff\xfe")


@given(st.binary(max_size=100))
def test_both_base64_alphabets_decode(data: bytes) -> None:
    assert decode_base64(base64.b64encode(data)) == data
    assert decode_base64(base64.urlsafe_b64encode(data) + b" ") == data


@pytest.mark.parametrize("text", [b"QUJ", b"Q", b"QU$J", b"b'QUJD'", "图图图图".encode()])
def test_truncated_or_damaged_base64_is_refused(text: bytes) -> None:
    with pytest.raises(DataError, match="truncated or damaged"):
        decode_base64(text)


def test_image_lines_become_records_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "train_imgs.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + b"10\tQUJD\r\n" + b"\n" + b"a-7\tQQ==\n" + b"007\tQQ==")
    assert list(read_image_records(path)) == [
        ImageRecord(10, b"QUJD", 1),
        ImageRecord("a-7", b"QQ==", 3),
        ImageRecord("007", b"QQ==", 4),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"10 QUJD", "expected `id<TAB>base64` with one tab, got no tab"),
        (b"10\tQUJD\tQUJD", "got 2 tabs"),
        (b"\xff\xfe\tQUJD", "invalid UTF-8 at byte 0"),
        (b"num_images\tQUJD", "reserved"),
        (b"a" * 600 + b"\tQUJD", "at most 511 bytes"),
    ],
)
def test_a_faulty_image_line_is_named_and_the_next_one_read(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "train_imgs.tsv"
    path.write_bytes(b"1\tQUJD\n" + line + b"\n3\tQUJD\n")
    first, fault, last = read_image_records(path)
    assert (first, last) == (ImageRecord(1, b"QUJD", 1), ImageRecord(3, b"QUJD", 3))
    assert isinstance(fault, Fault)
    assert str(fault).startswith(f"{path}:2: ")
    assert message in str(fault)


def test_text_lines_become_records(tmp_path: Path) -> None:
    path = tmp_path / "train_texts.jsonl"
    path.write_bytes(jsonl_line(8428, "高级感托特包斜挎", [1076345, "517602", "a"]) + jsonl_line("t", "", []))
    assert list(read_text_records(path)) == [
        TextRecord(8428, "高级感托特包斜挎", (1076345, 517602, "a"), 1),
        TextRecord("t", "", (), 2),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"{", "not valid JSON"),
        (b'{"text_id": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"text_id": 1, "text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "a", "image_ids": []}', "the field 'text_id' is missing"),
        (b'{"text_id": 1, "image_ids": []}', "the field 'text' is missing"),
        (b'{"text_id": 1, "text": "a"}', "the field 'image_ids' is missing"),
        (b'{"text_id": true, "text": "a", "image_ids": []}', "text_id: expected an integer or string id, got boolean"),
        (b'{"text_id": 1, "text": true, "image_ids": []}', "text of text_id 1: expected a string, got boolean true"),
        (b'{"text_id": 1, "text": "a", "image_ids": 7}', "image_ids of text_id 1: expected a list of ids, got number"),
        (
            b'{"text_id": 1, "text": "a", "image_ids": [7, 1.5]}',
            "image_ids of text_id 1: expected an integer or string",
        ),
    ],
)
def test_a_faulty_text_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "train_texts.jsonl"
    path.write_bytes(jsonl_line(1) + line + b"\n" + jsonl_line(3))
    first, fault, last = read_text_records(path)
    assert (first, last) == (TextRecord(1, "红色", (), 1), TextRecord(3, "红色", (), 3))
    assert isinstance(fault, Fault)
    assert str(fault).startswith(f"{path}:2: ")
    assert message in str(fault)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_a_fault(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty"
    path.write_bytes(content)
    for read in (read_image_records, read_text_records):
        (fault,) = read(path)
        assert str(fault).startswith(f"{path}: the file is empty; expected lines of")


@given(st.binary(max_size=300))
def test_any_bytes_give_records_or_faults_only(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "wild"
    path.write_bytes(content)
    for item in [*read_image_records(path), *read_text_records(path)]:
        assert isinstance(item, (Fault, ImageRecord, TextRecord))


@given(st.integers(0, 10**12) | WORDS, st.binary(max_size=50))
def test_written_image_lines_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, name: int | str, data: bytes
) -> None:
    identity = canonical_id(name)
    if identity == "num_images" or str(identity).startswith("\ufeff"):
        return
    path = tmp_path_factory.getbasetemp() / "one.tsv"
    path.write_bytes(image_line(identity, data or b"x"))
    assert list(read_image_records(path)) == [ImageRecord(identity, base64.b64encode(data or b"x"), 1)]


def test_written_text_lines_keep_chinese_readable() -> None:
    line = text_line(3, "妙蛙种子", [1, "a"])
    assert line == '{"text_id": 3, "text": "妙蛙种子", "image_ids": [1, "a"]}\n'
    assert json.loads(line) == {"text_id": 3, "text": "妙蛙种子", "image_ids": [1, "a"]}


def test_a_fault_is_told_with_file_line_and_id() -> None:
    fault = Fault("a.tsv", 3, "broken", "x")
    assert str(fault) == "a.tsv:3: broken"
    assert fault.as_dict() == {"file": "a.tsv", "line": 3, "id": "x", "message": "broken"}
    assert tsv_line(1, b"A") == b"1\tQQ==\n"
