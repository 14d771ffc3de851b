"""Feature files: what is written is what is read, numbers are rounded as Python rounds them, faults are located."""

import gzip
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cn_clip.data.records import RecordId, plain_id
from cn_clip.errors import ConfigError, DataError, MissingExtraError
from cn_clip.eval import make_topk_predictions
from cn_clip.evaluation import classification
from cn_clip.features.files import read_features, write_features, write_rows
from cn_clip.features.options import OutputFormat, format_of

FLOAT32_MAX = float(np.finfo(np.float32).max)


def as_float32(tokens: list[str]) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.array([float(json.loads(token)) for token in tokens]).astype(np.float32)


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


def numbers_of(folder: Path, *rows: bytes) -> np.ndarray:
    """The vectors of a feature file whose lines hold these."""
    lines = [b'{"image_id": %d, "feature": [%s]}\n' % (number, row) for number, row in enumerate(rows)]
    (folder / "f.jsonl").write_bytes(b"".join(lines))
    return read_features(folder / "f.jsonl", "image_id").vectors


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(DECIMALS, min_size=1, max_size=12), st.sampled_from([",", ", ", " ,  "]))
def test_any_json_number_is_rounded_as_python_rounds_it(tmp_path: Path, tokens: list[str], separator: str) -> None:
    expected = as_float32(tokens)
    rows = [separator.join(tokens).encode(), separator.join(reversed(tokens)).encode()]
    if not np.isfinite(expected).all():
        with pytest.raises(DataError, match=r"holds NaN or infinity|too large"):
            numbers_of(tmp_path, *rows)
        return
    parsed = numbers_of(tmp_path, *rows)
    assert parsed.dtype == np.float32
    np.testing.assert_array_equal(parsed[0].view(np.int32), expected.view(np.int32))
    np.testing.assert_array_equal(parsed[1], parsed[0][::-1])


def test_values_near_the_middle_of_two_float32_are_rounded_as_python_rounds_them(tmp_path: Path) -> None:
    tokens = [middle_of_two_float32(value)[:length] for value in (0.1, 0.3, 0.7) for length in range(16, 27)]
    np.testing.assert_array_equal(numbers_of(tmp_path, ",".join(tokens).encode())[0], as_float32(tokens))


@pytest.mark.parametrize(
    "row", [b"", b"0.1,", b",0.1", b"0.1,,0.2", b"0.1 0.2", b"+0.1", b".5", b"1.", b"01", b"--0.5", b"0x1", b"NaN",
            b"Infinity", b"true", b'"0.5"', b"0.5\xef\xbc\x91", b"0.\xb1", b"1_0", b"[0.1]", b"0.1-"]
)  # fmt: skip
def test_what_is_no_json_number_is_refused(tmp_path: Path, row: bytes) -> None:
    with pytest.raises(DataError, match=r"f\.jsonl:1"):
        numbers_of(tmp_path, row)


def test_rows_of_different_lengths_are_refused(tmp_path: Path) -> None:
    for rows in ([b"0.1,0.2", b"0.1"], [b"0.1", b"0.1,0.2"]):
        with pytest.raises(DataError, match=r"f\.jsonl:2 feature: has \d numbers, the lines before have \d"):
            numbers_of(tmp_path, *rows)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_features_read_back_as_written(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=80, unique_by=plain_id))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    one_row = st.lists(numbers, min_size=3, max_size=3)
    rows = np.array(data.draw(st.lists(one_row, min_size=len(ids), max_size=len(ids))), dtype=np.float32)
    path = tmp_path_factory.mktemp("features") / "f.jsonl"
    assert write_features(path, "image_id", [(ids[:2], rows[:2]), (ids[2:], rows[2:])]) == len(ids)
    found = read_features(path, "image_id")
    wanted = list(map(plain_id, ids))
    assert found.ids == wanted
    assert [type(found_id) for found_id in found.ids] == list(map(type, wanted))
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
    assert found.ids == [7, 8, 9]
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


# --- npz and Parquet

TABLES: list[OutputFormat] = ["npz", "parquet"]
FORMATS: list[OutputFormat] = ["jsonl", *TABLES]
ROWS = np.array([[0.1, -0.5], [1e-38, 0.25], [3.0, -0.0]], dtype=np.float32)


def write(path: Path, output_format: OutputFormat, ids: Sequence[RecordId], rows: np.ndarray) -> None:
    blocks = [rows[:2], rows[2:]]
    write_rows(path, "image_id", ids, blocks, embed_dim=rows.shape[1], output_format=output_format)


IDS = st.one_of(
    st.lists(st.integers(-(2**63), 2**63), min_size=1, max_size=20, unique=True),
    st.lists(st.text(), min_size=1, max_size=20, unique=True),
    st.lists(st.one_of(st.integers(), st.text(st.characters())), min_size=1, max_size=20, unique=True),
    st.lists(st.sampled_from(["1", "01", "a\0", "\ud800", '"', "null"]), min_size=1, unique=True),
).filter(lambda ids: len(set(map(plain_id, ids))) == len(ids))


@settings(max_examples=80, deadline=None)
@example(ids=["a\0"], seed=0, output_format="npz")
@example(ids=["\ud800"], seed=0, output_format="parquet")
@given(ids=IDS, seed=st.integers(0, 2**32 - 1), output_format=st.sampled_from(FORMATS))
def test_every_format_gives_back_every_bit_and_every_id(
    tmp_path_factory: pytest.TempPathFactory, ids: list[RecordId], seed: int, output_format: OutputFormat
) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**32, size=(len(ids), 3), dtype=np.uint32)
    rows = np.where(np.isfinite(bits.view(np.float32)), bits.view(np.float32), np.float32(0.5))
    path = tmp_path_factory.mktemp("features") / "f"
    write(path, output_format, ids, rows)
    found = read_features(path, "image_id")
    wanted = list(map(plain_id, ids))
    assert found.ids == wanted
    assert [type(found_id) for found_id in found.ids] == list(map(type, wanted))
    assert found.vectors.dtype == np.float32
    assert found.vectors.tobytes() == rows.tobytes()


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_integer_and_its_digits_are_one_id(tmp_path: Path, output_format: OutputFormat) -> None:
    rows = np.ones((3, 2), dtype=np.float32)
    write(tmp_path / "f", output_format, ["7", "-3", "007"], rows)
    assert read_features(tmp_path / "f", "image_id").ids == [7, -3, "007"]
    write(tmp_path / "f", output_format, [7, 8, "7"], rows)
    with pytest.raises(DataError, match="image_id: 7 is already on"):
        read_features(tmp_path / "f", "image_id")


def test_one_long_id_does_not_make_an_npz_explode(tmp_path: Path) -> None:
    ids = ["short", "x" * 200_000, *map(str, range(98))]
    with pytest.raises(
        DataError, match=r"x.npz image_id: 'x+'… has 200000 characters, .*76 MiB.*write parquet or jsonl"
    ):
        write(tmp_path / "x.npz", "npz", ids, np.eye(100, dtype=np.float32))
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "x.npz", "npz", ["y" * 200_000], np.ones((1, 1), dtype=np.float32))


def test_numpy_reads_the_npz_without_pickle(tmp_path: Path) -> None:
    for ids, kept in ([[7, -3, 2**40]] * 2, [["甲", "b", "007"]] * 2, [[7, "007", "b"], ["7", '"007"', '"b"']]):
        write(tmp_path / "f.npz", "npz", ids, ROWS)
        with np.load(tmp_path / "f.npz", allow_pickle=False) as arrays:
            assert sorted(arrays.files) == ["features", "field", "id_kind", "ids"]
            assert arrays["ids"].tolist() == kept
            assert arrays["ids"].dtype.kind == ("i" if kept[0] == 7 else "U")
            assert arrays["features"].tobytes() == ROWS.tobytes()
            assert (arrays["features"].dtype, arrays["features"].shape) == (np.dtype("float32"), (3, 2))
            assert str(arrays["field"]) == "image_id"
            assert str(arrays["id_kind"]) == {7: "int", "甲": "str", "7": "json"}[kept[0]]


def test_the_parquet_has_typed_columns_a_row_group_a_block_and_metadata(tmp_path: Path) -> None:
    write(tmp_path / "f.parquet", "parquet", [7, 8, 9], ROWS)
    with pq.ParquetFile(tmp_path / "f.parquet") as file:
        assert (file.num_row_groups, file.schema_arrow.names) == (2, ["image_id", "feature"])
        assert file.schema_arrow.field("image_id").type == pa.int64()
        kind = file.schema_arrow.field("feature").type
        assert (kind.list_size, kind.value_type) == (2, pa.float32())
        assert json.loads(file.schema_arrow.metadata[b"cn_clip"]) == {"field": "image_id", "id_kind": "int"}
        assert file.read().column("feature").to_pylist() == ROWS.tolist()


@pytest.mark.parametrize("values", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2)])
def test_parquet_of_other_programs_is_read(tmp_path: Path, values: pa.DataType) -> None:
    table = pa.table({
        "feature": pa.array([[0.5, 2], [4, 8]], type=values),
        "more": [None, 1.5],
        "text_id": pa.array([3, 1], type=pa.uint8()),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "theirs.pq")
    found = read_features(tmp_path / "theirs.pq", "text_id")
    assert (found.ids, found.vectors.tolist()) == ([3, 1], [[0.5, 2], [4, 8]])


@pytest.mark.parametrize("ids", [pa.dictionary(pa.int32(), pa.string()), pa.string_view(), pa.large_string()])
def test_ids_and_tensors_of_other_kinds_are_read(tmp_path: Path, ids: pa.DataType) -> None:
    stored = pa.array([[0.5, 2], [4, 8]], pa.list_(pa.float32(), 2))
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2]), stored)
    plain = pa.array(["甲", "b"])
    names = plain.dictionary_encode() if pa.types.is_dictionary(ids) else plain.cast(ids)
    pq.write_table(pa.table({"text_id": names, "feature": tensors}), tmp_path / "theirs.pq")
    found = read_features(tmp_path / "theirs.pq", "text_id")
    assert (found.ids, found.vectors.tolist()) == (["甲", "b"], [[0.5, 2], [4, 8]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x93NUMPY\x01\x00v\x00", "is an npy file, which has no ids; save ids and features with np.savez"),
        (gzip.compress(b"{}", mtime=0), "is compressed with gzip; unpack it first"),
        ('{"text_id": 1}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    ],
)
def test_files_of_other_kinds_are_recognised(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=f"x.jsonl: {message}"):
        read_features(tmp_path / "x.jsonl", "text_id")


def test_an_npz_with_other_members_and_a_table_with_a_column_twice_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("ids", "1 2")
        archive.writestr("features", "0.5")
    with pytest.raises(DataError, match=r"x.npz ids: is no numpy array; save the file with np.savez"):
        read_features(tmp_path / "x.npz", "text_id")
    twice = pa.table([pa.array([1]), pa.array([2]), pa.array([[0.5]])], ["text_id", "text_id", "feature"])
    pq.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet: has 2 columns text_id; expected one"):
        read_features(tmp_path / "x.parquet", "text_id")


def test_text_beyond_unicode_in_an_npz_is_refused_whoever_reads_it(tmp_path: Path) -> None:
    names = np.array(["猫", "狗"])
    names.view(np.uint32)[1] = 0x110000
    rows = {"ids": names, "features": ROWS[:2]}
    path = tmp_path / "f.npz"
    np.savez(path, **rows)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"f\.npz ids: holds 0x110000, which is no character; extract it again"):
        read_features(path, "image_id")
    np.savez(path, features=ROWS[:2], labels=np.array([0, 1]), classes=names.astype(">U1"))
    with pytest.raises(DataError, match=r"f\.npz classes: holds 0x110000, which is no character; compute"):
        classification.read(path)


def test_npz_of_numpy_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "mine.npz", ids=np.array(["a", "b"]), features=np.array([[0.5], [0.25]]))
    found = read_features(tmp_path / "mine.npz", "text_id")
    assert (found.ids, found.vectors.tolist(), found.vectors.dtype) == (["a", "b"], [[0.5], [0.25]], np.float32)


@pytest.mark.parametrize("output_format", TABLES)
@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([1, 2, 1], ROWS, "row 3 image_id: 1 is already on row 1"),
        ([1, 2, 3], np.where(ROWS == 3, np.nan, ROWS), "row 3 feature: holds NaN or infinity"),
    ],
)
def test_a_fault_in_a_table_is_named_with_file_and_row(
    tmp_path: Path, output_format: OutputFormat, ids: list[RecordId], rows: np.ndarray, message: str
) -> None:
    write(tmp_path / "f", output_format, ids, rows)
    with pytest.raises(DataError, match=f"{tmp_path}/f.* ?{message}"):
        read_features(tmp_path / "f", "image_id")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.array([1])}, "expected the arrays ids and features, it has"),
        ({"ids": np.array([1]), "features": np.ones((2, 2))}, "one id a row"),
        ({"ids": np.array([1.5]), "features": np.ones((1, 2))}, "expected integers or text, got float64"),
        ({"ids": np.array([1]), "features": np.ones((1, 2), dtype=int)}, "expected floats, got int64"),
        (
            {"ids": np.array([1], dtype=object), "features": np.ones((1, 2))},
            "cannot be read as npz .*save ids as integers",
        ),
        ({"ids": np.empty(0, dtype=int), "features": np.ones((0, 2))}, "the file has no rows"),
        ({"ids": np.array([1]), "features": np.ones((1, 0))}, "the vectors are empty"),
        (
            {"ids": np.array([1]), "features": np.ones((1, 2)), "field": np.array("text_id")},
            "no image_id, only text_id",
        ),
        ({"ids": np.array(["1.5"]), "features": np.ones((1, 2)), "id_kind": np.array("json")}, "row 1 image_id"),
    ],
)
def test_a_faulty_npz_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(DataError, match=rf"f\.npz.*{message}"):
        read_features(tmp_path / "f.npz", "image_id")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text_id": [1], "feature": [[0.5]]}, "expected the columns image_id and feature, it has .*other modality"),
        ({"image_id": [1.5], "feature": [[0.5]]}, "image_id: expected integers or strings, got double"),
        ({"image_id": [1], "feature": [[5]]}, "expected lists of floats, got list"),
        ({"image_id": [1], "feature": [0.5]}, "expected lists of floats, got double"),
        ({"image_id": [1, None], "feature": [[0.5], [0.5]]}, "row 2 image_id: is null"),
        ({"image_id": [1, 2], "feature": [[0.5], None]}, "row 2 feature: is null"),
        ({"image_id": [1, 2], "feature": [[0.5, 1], [0.5, None]]}, "row 2 feature: holds null"),
        ({"image_id": [1, 2, 3], "feature": [[0.5], [1.0], [1, 0.5]]}, "row 3 feature: has 2 numbers, .* have 1"),
        ({"image_id": [1], "feature": [[1e39]]}, "row 1 feature: holds NaN or infinity"),
        ({"image_id": pa.array([], pa.int64()), "feature": pa.array([], pa.list_(pa.float32()))}, "has no rows"),
    ],
)
def test_a_faulty_parquet_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "f.parquet")
    with pytest.raises(DataError, match=rf"f\.parquet.*{message}"):
        read_features(tmp_path / "f.parquet", "image_id")


@pytest.mark.parametrize("output_format", TABLES)
def test_damaged_tables_are_refused_wherever_they_are_cut(tmp_path: Path, output_format: OutputFormat) -> None:
    path = tmp_path / f"f.{output_format}"
    write(path, output_format, [1, 2, 3], ROWS)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=rf"f\.{output_format}: "):
            read_features(path, "image_id")


@pytest.mark.parametrize("output_format", TABLES)
def test_a_changed_number_in_a_table_is_noticed(tmp_path: Path, output_format: OutputFormat) -> None:
    path = tmp_path / f"f.{output_format}"
    rows = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    write(path, output_format, [1, 2, 3], rows)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(rows[1, 5].tobytes(), np.float32(0.5).tobytes()))
    assert path.read_bytes() != whole
    with pytest.raises(DataError, match=rf"f\.{output_format}: cannot be read as"):
        read_features(path, "image_id")


def test_the_content_decides_on_the_format_and_a_false_name_is_told(tmp_path: Path) -> None:
    write(tmp_path / "features.dat", "npz", [1, 2, 3], ROWS)
    assert read_features(tmp_path / "features.dat", "image_id").ids == [1, 2, 3]
    write(tmp_path / "f.parquet", "jsonl", [1, 2, 3], ROWS)
    with pytest.raises(DataError, match="is no parquet file, though its name says so"):
        read_features(tmp_path / "f.parquet", "image_id")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "f.parquet", "parquet", [1, 2, 3], ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cn-clip-next\[parquet\]'"):
        read_features(tmp_path / "f.parquet", "image_id")


@pytest.mark.parametrize(
    ("path", "wanted", "expected"),
    [
        (None, None, "jsonl"), (None, "npz", "npz"), ("a/x.npz", None, "npz"), ("x.PARQUET", None, "parquet"),
        ("x.txt", None, "jsonl"), ("x.txt", "npz", "npz"), ("x.jsonl", "jsonl", "jsonl"), ("x", "parquet", "parquet"),
    ],
)  # fmt: skip
def test_the_suffix_says_the_format_unless_a_flag_does(path: str, wanted: OutputFormat, expected: str) -> None:
    assert format_of(path, wanted) == expected


def test_a_flag_against_the_suffix_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--output-format npz: the suffix of x\.jsonl says jsonl"):
        format_of("x.jsonl", "npz")


@pytest.mark.parametrize("output_format", FORMATS)
def test_top_k_reads_every_format(tmp_path: Path, output_format: OutputFormat) -> None:
    images, texts = tmp_path / f"i.{output_format}", tmp_path / f"t.{output_format}"
    write(images, output_format, [10, 20, 30], ROWS)
    write_rows(texts, "text_id", ["a"], [ROWS[:1]], embed_dim=2, output_format=output_format)
    files = [f"--image-feats={images}", f"--text-feats={texts}", f"--output={tmp_path}/p.jsonl"]
    make_topk_predictions.main([*files, "--top-k=2", "--device=cpu"])
    # 0.1 * 0.1 + 0.5 * 0.5 = 0.26, 0 - 0.125, 0.3 + 0
    assert (tmp_path / "p.jsonl").read_text() == '{"text_id": "a", "image_ids": [30, 10]}\n'
