"""Feature JSONL: what is written is what is read, numbers are rounded as Python rounds them, faults are located."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cn_clip.errors import DataError
from cn_clip.eval.decimal_text import parse_rows
from cn_clip.eval.feature_files import read_features, write_features

FLOAT32_MAX = float(np.finfo(np.float32).max)


def as_float32(tokens: list[str]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.array([float(token) for token in tokens]).astype(np.float32)


def middle_of_two_float32(value: float) -> str:
    low = np.float32(value)
    high = np.nextafter(low, np.float32(np.inf))
    return f"{(float(low) + float(high)) / 2:.40f}".rstrip("0")


DECIMALS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(lambda value: json.dumps(value)),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda value: json.dumps(value)),
    st.floats(0.0009765625, 1, width=32, exclude_max=True).map(middle_of_two_float32),
    st.from_regex(r"\A-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,40})?([eE][-+]?[0-9]{1,2})?\Z", fullmatch=True),
    st.from_regex(r"\A-?0\.[0-9]{1,26}\Z", fullmatch=True),
).filter(lambda token: token.isascii())


@settings(max_examples=400, deadline=None)
@given(st.lists(DECIMALS, min_size=1, max_size=12), st.sampled_from([",", ", ", " ,  "]))
def test_any_json_number_is_rounded_as_python_rounds_it(tokens: list[str], separator: str) -> None:
    parsed = parse_rows([separator.join(tokens).encode(), separator.join(reversed(tokens)).encode()])
    assert parsed.dtype == np.float32
    np.testing.assert_array_equal(parsed[0].view(np.int32), as_float32(tokens).view(np.int32))
    np.testing.assert_array_equal(parsed[1], parsed[0][::-1])


def test_values_near_the_middle_of_two_float32_are_rounded_as_python_rounds_them() -> None:
    tokens = [middle_of_two_float32(value)[:length] for value in (0.1, 0.3, 0.7) for length in range(16, 27)]
    np.testing.assert_array_equal(parse_rows([",".join(tokens).encode()])[0], as_float32(tokens))


@pytest.mark.parametrize(
    "row", [b"", b"0.1,", b",0.1", b"0.1,,0.2", b"0.1 0.2", b"+0.1", b".5", b"1.", b"01", b"--0.5", b"0x1", b"NaN",
            b"Infinity", b"true", b'"0.5"', b"0.5\xef\xbc\x91", b"0.\xb1", b"1_0", b"[0.1]", b"0.1-"]
)  # fmt: skip
def test_what_is_no_json_number_is_refused(row: bytes) -> None:
    with pytest.raises(ValueError, match="expected a number"):
        parse_rows([row])


def test_rows_of_different_lengths_are_refused() -> None:
    for rows in ([b"0.1,0.2", b"0.1"], [b"0.1", b"0.1,0.2"], [b"1,2,3", b"4", b"5,6"]):
        with pytest.raises(ValueError, match="different lengths"):
            parse_rows(rows)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_features_read_back_as_written(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=80, unique=True))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    one_row = st.lists(numbers, min_size=3, max_size=3)
    rows = np.array(data.draw(st.lists(one_row, min_size=len(ids), max_size=len(ids))), dtype=np.float32)
    path = tmp_path_factory.mktemp("features") / "f.jsonl"
    assert write_features(path, "image_id", [(ids[:2], rows[:2]), (ids[2:], rows[2:])]) == len(ids)
    found = read_features(path, "image_id")
    assert found.ids == ids
    assert [type(found_id) for found_id in found.ids] == [type(wanted) for wanted in ids]
    np.testing.assert_array_equal(found.vectors, rows)


def test_lines_are_the_json_of_the_float32_values(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    vectors = np.array([[0.1, -0.5, 1e-05], [1, 0, -0.0]], dtype=np.float32)
    write_features(path, "text_id", [([248816, "甲"], vectors)])
    assert path.read_bytes() == (
        b'{"text_id": 248816, "feature": [0.10000000149011612, -0.5, 9.999999747378752e-06]}\n'
        b'{"text_id": "\\u7532", "feature": [1.0, 0.0, -0.0]}\n'
    )


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("old")
    good = ([1], np.ones((1, 2), dtype=np.float32))
    with pytest.raises(DataError, match="2 ids and 1 vectors"):
        write_features(path, "image_id", [good, ([2, 3], good[1])])
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.jsonl"]
    assert path.read_text() == "old"


def test_other_spellings_of_the_same_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(
        b'{"feature": [1, 2.5], "image_id": 7}\r\n\n'
        b'{"image_id":"8","feature":[ -0.25 ,1E1]}\n'
        b'  {"image_id": 9, "source": [1], "feature": [0.5, 0.125] } '
    )
    found = read_features(path, "image_id")
    assert found.ids == [7, "8", 9]
    assert found.vectors.tolist() == [[1, 2.5], [-0.25, 10], [0.5, 0.125]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text_id": 3, "feature": [1.0, 2.0]}', r":43: no field image_id.*other modality"),
        ('{"image_id": 300}', r":43: no field feature"),
        ('{"image_id": 300, "feature": [1.0]}', r":43 feature: has 1 numbers, the lines before have 2"),
        ('{"image_id": 300, "feature": []}', r":43 feature: expected a list of numbers"),
        ('{"image_id": 300, "feature": 5}', r":43 feature: expected a list of numbers, got '5'"),
        ('{"image_id": 300, "feature": [[1.0, 2.0]]}', r":43 feature: expected numbers, got \[1.0, 2.0\]"),
        ('{"image_id": 300, "feature": [1.0, "2"]}', r":43 feature: expected numbers, got '2' at position 1"),
        ('{"image_id": 300, "feature": [1.0, true]}', r":43 feature: expected numbers, got True"),
        ('{"image_id": 300, "feature": [1.0, NaN]}', r":43 feature: holds NaN or infinity"),
        ('{"image_id": 300, "feature": [1.0, 1e39]}', r":43 feature: holds NaN or infinity"),
        ('{"feature": [1.0, 1' + "0" * 400 + '], "image_id": 300}', r":43 feature: a number is too large"),
        ('{"image_id": 300, "feature": [1.0, 2.0]', r":43: not valid JSON"),
        ("[1.0, 2.0]", r":43: expected a JSON object, got list"),
        ('{"image_id": 1.5, "feature": [1.0, 2.0]}', r":43 image_id: expected an integer or a string, got 1.5"),
        ('{"image_id": true, "feature": [1.0, 2.0]}', r":43 image_id: expected an integer or a string, got True"),
        ('{"image_id": 5, "feature": [1.0, 2.0]}', r":43 image_id: 5 is already on line 6"),
    ],
)
def test_a_fault_is_named_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "f.jsonl"
    good = [f'{{"image_id": {item}, "feature": [0.5, {item}.0]}}' for item in range(42)]
    path.write_text("\n".join([*good, line, '{"image_id": 99, "feature": [0.5, 2.0]}']))
    with pytest.raises(DataError, match="f.jsonl" + message):
        read_features(path, "image_id")


def test_the_length_is_that_of_the_first_line_also_between_batches(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    with path.open("w") as stream:
        for item in range(64):
            stream.write(json.dumps({"image_id": item, "feature": [0.5] * (2 if item < 32 else 3)}) + "\n")
    with pytest.raises(DataError, match=":33 feature: has 3 numbers, the lines before have 2"):
        read_features(path, "image_id")


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        read_features(tmp_path / "absent.jsonl", "image_id")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="has no lines"):
        read_features(tmp_path / "empty.jsonl", "image_id")


@pytest.mark.parametrize("byte", [byte for byte in range(256) if not 48 <= byte <= 57])
def test_a_byte_that_is_no_digit_is_never_taken_for_one(byte: int) -> None:
    digits = b"0.123456789012345678901234"
    for position in range(2, len(digits)):
        token = digits[:position] + bytes([byte]) + digits[position + 1 :]
        try:
            expected = [json.loads(part) for part in token.split(b",")]
        except ValueError:
            with pytest.raises(ValueError, match="expected a number"):
                parse_rows([token])
        else:
            np.testing.assert_array_equal(parse_rows([token])[0], as_float32([str(part) for part in expected]))
