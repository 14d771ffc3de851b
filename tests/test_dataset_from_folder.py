"""Folders and tables to datasets: captions, ids, splits, bytes unchanged, and every fault with its place."""

import base64
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pytest
from dataset_files import picture, run_script, tree
from pyarrow import parquet
from unreadable_files import unreadable

from cn_clip.data.captions import split_of
from cn_clip.data.checks import check_split
from cn_clip.data.names import caption_of
from cn_clip.data.records import DATASET
from cn_clip.errors import ConfigError, DataError
from cn_clip.files import alone, lock_file
from cn_clip.preprocess import check_dataset
from cn_clip.preprocess.dataset_from_folder import Options, run, shares

SCRIPT = "preprocess/dataset_from_folder.py"
ALL_TRAIN = {"splits": "train", "split_ratio": "1"}


def fill(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        kinds = {".jpg": "JPEG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP"}
        kind = kinds.get(Path(name).suffix.lower(), "PNG")
        (folder / name).write_bytes(picture((number, 0, 0), kind=kind))
    return folder


def read(output: Path, split: str = "train") -> tuple[dict[str, bytes], list[tuple[Any, str, list[Any]]]]:
    lines = (output / f"{split}_imgs.tsv").read_text().splitlines()
    images = {key: base64.b64decode(text) for key, text in (line.split("\t") for line in lines)}
    records = map(json.loads, (output / f"{split}_texts.jsonl").read_text(encoding="utf-8").splitlines())
    return images, [(record["text_id"], record["text"], record["image_ids"]) for record in records]


def convert(tmp_path: Path, **options: Any) -> tuple[dict[str, bytes], list[tuple[Any, str, list[Any]]]]:
    run(Options(**{"output": str(tmp_path / "out"), "folder": str(tmp_path / "in"), **ALL_TRAIN, **options}))
    return read(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("0001妙蛙种子.png", "妙蛙种子"),
        ("12_- 小火龙.v2.JPG", "小火龙.v2"),
        ("皮卡丘 25.png", "皮卡丘 25"),
        ("0001.png", ""),
        ("1 cafe\u0301.png", "caf\u00e9"),
    ],
)
def test_the_caption_is_the_file_name_without_its_leading_number(name: str, caption: str) -> None:
    assert caption_of(name) == caption


def test_numbers_of_the_names_are_the_ids_and_the_bytes_are_kept(tmp_path: Path) -> None:
    fill(tmp_path / "in", "0002妙蛙草.jpg", "0001妙蛙种子.png", "sub/10小火龙.WEBP", "11动图.gif")
    images, texts = convert(tmp_path)
    names = {"1": "0001妙蛙种子.png", "2": "0002妙蛙草.jpg", "11": "11动图.gif", "10": "sub/10小火龙.WEBP"}
    assert list(images) == list(names)
    assert images == {key: (tmp_path / "in" / name).read_bytes() for key, name in names.items()}
    assert texts == [(0, "妙蛙种子", [1]), (1, "妙蛙草", [2]), (2, "动图", [11]), (3, "小火龙", [10])]


def test_names_in_gbk_are_read_as_text_and_those_in_neither_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "in", "3猫.png")
    try:
        for name in ("照片/1狗.png".encode("gbk"), b"2\xff.png"):
            path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(picture((9, 9, 9)))
    except OSError:  # macOS and Windows
        pytest.skip("this file system holds no names but in Unicode")
    images, texts = convert(tmp_path, ids="name", on_error="skip")
    assert list(images) == ["3猫.png", "gbk:照片/gbk:1狗.png"]
    assert [text for _, text, _ in texts] == ["猫", "狗"]
    assert "bytes:2%FF.png: the file name is neither UTF-8 nor GBK" in capsys.readouterr().err


def test_hidden_files_and_other_files_are_left_out(tmp_path: Path) -> None:
    fill(tmp_path / "in", "1猫.png", "._1猫.png", ".cache/2狗.png")
    (tmp_path / "in" / "说明.txt").write_text("x")
    assert list(convert(tmp_path)[0]) == ["1"]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [("auto", ["0", "1"]), ("sequence", ["0", "1"]), ("name", ["1猫.png", "b/1狗.png"])],
)
def test_ids_when_numbers_repeat(tmp_path: Path, ids: str, expected: list[str]) -> None:
    fill(tmp_path / "in", "1猫.png", "b/1狗.png")
    assert list(convert(tmp_path, ids=ids)[0]) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1猫.png", "1狗.png"], "1狗.png: its number 1 is also that of"),
        (["猫.png"], "猫.png: the file name starts with no"),
    ],
)
def test_numbers_that_lack_or_repeat_are_refused_when_asked_for(tmp_path: Path, names: list[str], message: str) -> None:
    fill(tmp_path / "in", *names)
    with pytest.raises(DataError) as caught:
        convert(tmp_path, ids="number")
    assert message.replace("1狗", "1猫") in str(caught.value).replace("1狗", "1猫")


def test_one_caption_of_two_pictures_is_one_text(tmp_path: Path) -> None:
    fill(tmp_path / "in", "1猫.png", "2猫.png", "3狗.png")
    assert convert(tmp_path)[1] == [(0, "猫", [1, 2]), (1, "狗", [3])]


def test_traditional_characters_are_simplified_on_request(tmp_path: Path) -> None:
    fill(tmp_path / "in", "1妙蛙種子.png", "2頭髮.png")
    assert [text for _, text, _ in convert(tmp_path)[1]] == ["妙蛙種子", "頭髮"]
    assert [text for _, text, _ in convert(tmp_path, simplify=True)[1]] == ["妙蛙种子", "头发"]


def test_the_division_is_the_same_each_time_and_near_the_ratio() -> None:
    parts = shares("8,1,1", ["train", "valid", "test"])
    splits = [split_of(f"{number}.png", parts, 0) for number in range(2000)]
    assert splits == [split_of(f"{number}.png", parts, 0) for number in range(2000)]
    assert [splits.count(name) for name in ("train", "valid", "test")] == [1621, 180, 199]
    assert [(number, splits[number]) for number in range(2000) if splits[number] != "train"][:4] == [
        (19, "valid"),
        (23, "test"),
        (34, "valid"),
        (36, "valid"),
    ]
    assert splits != [split_of(f"{number}.png", parts, 1) for number in range(2000)]


def test_a_share_of_zero_gets_nothing() -> None:
    assert {split_of(str(number), {"a": 0.0, "b": 1.0, "c": 0.0}, 0) for number in range(500)} == {"b"}


@pytest.mark.parametrize("ratio", ["1,1", "1,1,1,1", "a,b,c", "-1,1,1", "0,0,0", "nan,1,1", "inf,1,1", ""])
def test_a_bad_ratio_is_refused(ratio: str) -> None:
    with pytest.raises(ConfigError, match="--split-ratio: expected 3 numbers"):
        shares(ratio, ["a", "b", "c"])


def test_adding_a_picture_leaves_the_others_in_their_splits(tmp_path: Path) -> None:
    names = [f"{number}图{number}.png" for number in range(40)]
    found = []
    for folder, some in (("a", names), ("b", [*names, "新.png"])):
        fill(tmp_path / folder, *some)
        run(Options(str(tmp_path / f"out-{folder}"), str(tmp_path / folder), split_ratio="2,1,1"))
        texts = {s: {text for _, text, _ in read(tmp_path / f"out-{folder}", s)[1]} for s in ("train", "valid", "test")}
        found.append({name: part - {"新"} for name, part in texts.items()})
    assert found[0] == found[1]
    assert all(found[0].values())


def test_the_command_writes_a_sound_dataset_with_lmdb(tmp_path: Path) -> None:
    fill(tmp_path / "in", *[f"{number:04}图{number}.png" for number in range(30)])
    arguments = ("--folder", tmp_path / "in", "--output", tmp_path / "out", "--split_ratio", "0.5,0.5,0", "--lmdb")
    result = run_script(SCRIPT, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert [split["split"] for split in summary["splits"]] == ["train", "valid"]
    assert sum(split["images"] for split in summary["splits"]) == 30
    assert "no picture fell into test" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "lmdb",
        "train_imgs.tsv",
        "train_texts.jsonl",
        "valid_imgs.tsv",
        "valid_texts.jsonl",
    ]
    for split in ("train", "valid"):
        check = check_split(tmp_path / "out", split, tmp_path / "out" / "lmdb" / split)
        assert check.faults == []
        assert check.num_pairs == check.num_images


def broken_picture(folder: Path) -> str:
    (folder / "2坏.png").write_bytes(picture(size=(64, 64))[:60])
    return f"{folder}/2坏.png: the picture of 60 bytes does not decode"


def name_without_text(folder: Path) -> str:
    (folder / "0002.png").write_bytes(picture())
    return f"{folder}/0002.png: the file name carries no text"


@pytest.mark.parametrize("make", [broken_picture, name_without_text])
def test_a_faulty_picture_stops_with_its_file_or_is_skipped(tmp_path: Path, make: Callable[[Path], str]) -> None:
    fill(tmp_path / "in", "1猫.png", "3狗.png")
    message = make(tmp_path / "in")
    result = run_script(SCRIPT, "--folder", tmp_path / "in", "--output", tmp_path / "out")
    assert result.returncode == 1
    assert message in result.stderr
    assert tree(tmp_path / "out") == {}
    assert list(convert(tmp_path, on_error="skip")[0]) == ["1", "3"]


def test_a_stopped_run_leaves_the_files_of_the_earlier_one(tmp_path: Path) -> None:
    fill(tmp_path / "in", "1猫.png")
    convert(tmp_path)
    before = tree(tmp_path / "out")
    broken_picture(tmp_path / "in")
    with pytest.raises(DataError):
        convert(tmp_path)
    assert tree(tmp_path / "out") == before


def test_files_of_an_earlier_division_are_not_mixed_with_this_one(tmp_path: Path) -> None:
    fill(tmp_path / "in", "1猫.png")
    convert(tmp_path, splits="valid,train", split_ratio="0,1")
    with pytest.raises(DataError, match=r"train_imgs.tsv: is of an earlier run, and this one puts nothing into train"):
        convert(tmp_path, splits="valid,train", split_ratio="1,0")
    assert not (tmp_path / "out" / "valid_imgs.tsv").exists()


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"in: no usable picture; expected files ending in .jpg"):
        convert(tmp_path)
    with pytest.raises(DataError, match="gone: no such folder"):
        convert(tmp_path, folder=str(tmp_path / "gone"))


def write_table(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"table{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in (list(rows[0]), *(list(row.values()) for row in rows)):
            book.active.append(row)
        book.save(path)
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        separator = "\t" if suffix == ".tsv" else ","
        lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return str(path)


ROWS = [
    {"file": "a/猫.png", "caption": "一只猫", "key": 7},
    {"file": "狗.png", "caption": "一隻狗", "key": 8},
    {"file": "./a/猫.png", "caption": "猫在睡觉", "key": 7},
    {"file": "a/猫.png", "caption": "一只猫", "key": 7},
]
COLUMNS = {"image_column": "file", "text_column": "caption"}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".xlsx", ".jsonl"])
def test_rows_of_a_table_are_captions(tmp_path: Path, suffix: str) -> None:
    folder = fill(tmp_path / "in", "a/猫.png", "狗.png")
    table = write_table(folder, suffix, ROWS)
    images, texts = convert(tmp_path, folder=None, table=table, id_column="key", simplify=True, **COLUMNS)
    assert list(images) == ["7", "8"]
    assert texts == [(0, "一只猫", [7]), (1, "猫在睡觉", [7]), (2, "一只狗", [8])]


def test_a_table_without_id_column_counts(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a/猫.png", "狗.png")
    table = write_table(tmp_path, ".csv", ROWS)
    assert list(convert(tmp_path, table=table, **COLUMNS)[0]) == ["0", "1"]
    assert list(convert(tmp_path, table=table, ids="name", **COLUMNS)[0]) == ["a/猫.png", "狗.png"]


@pytest.mark.parametrize(
    ("row", "line", "message"),
    [
        ({"file": "gone.png", "caption": "无", "key": 9}, 6, "column 'file' names"),
        ({"file": "狗.png", "caption": " ", "key": 8}, 6, "column 'caption' is empty"),
        (
            {"file": "狗.png", "caption": "狗", "key": 9},
            6,
            "picture '狗.png' has the id 9 here and 8 in an earlier row",
        ),
        ({"file": "b.png", "caption": "狗", "key": 8}, 6, "duplicate image id 8, first that of picture '狗.png'"),
        ({"file": "b.png", "caption": "狗", "key": ""}, 6, "expected an id, got an empty string"),
    ],
)
def test_a_faulty_row_stops_with_its_line_or_is_skipped(
    tmp_path: Path, row: dict[str, Any], line: int, message: str
) -> None:
    fill(tmp_path / "in", "a/猫.png", "狗.png", "b.png")
    table = write_table(tmp_path, ".csv", [*ROWS, row])
    with pytest.raises(DataError) as caught:
        convert(tmp_path, table=table, id_column="key", **COLUMNS)
    assert str(caught.value).startswith(f"{table}:{line}: ")
    assert message in str(caught.value)
    images, _ = convert(tmp_path, table=table, id_column="key", on_error="skip", **COLUMNS)
    assert list(images) == ["7", "8"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"image,words\na,b\n", "has no column 'text'; it has image, words"),
        (
            "t.csv",
            "image,text\n皮卡丘.png,皮卡丘".encode() + b"\xff\n",
            r"t\.csv: invalid UTF-8 near byte 34; save the",
        ),
        ("t.csv", b"", "has no column 'image'; it has none"),
        ("t.parquet", b"PAR1 not", "cannot be read as Parquet"),
        ("t.xlsx", b"", r"is not a complete \.xlsx file; save it again, as \.xlsx or as \.csv"),
        ("t.xls", b"", r"expected a table whose name ends in one of \.csv, \.tsv, \.jsonl, \.parquet, \.xlsx; save it"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    fill(tmp_path / "in", "猫.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        convert(tmp_path, table=str(tmp_path / name), on_error="skip")


def test_what_was_skipped_is_told_when_nothing_is_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "in", "0001.png")
    with pytest.raises(DataError, match="no usable picture"):
        convert(tmp_path, on_error="skip")
    assert "skipped: " in capfd.readouterr().err


def test_options_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --folder"):
        Options("out")
    with pytest.raises(ConfigError, match="--id-column: is a column of a table"):
        Options("out", "in", id_column="key")


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p" / "d").mkdir(parents=True)
    (tmp_path / "p" / "1猫.png").write_bytes(picture((1, 2, 3)))
    (tmp_path / "p" / "d" / "2狗.png").write_bytes(picture((3, 2, 1)))
    options = {"folder": str(tmp_path / "p"), "output": str(tmp_path / "out")}
    with unreadable(errno.EACCES, tmp_path / "p" / "d"):
        with pytest.raises(DataError, match=r"p/d: the folder cannot be read \(Permission denied\)"):
            run(Options(**options))
        assert not (tmp_path / "out" / "train_imgs.tsv").exists()
        run(Options(**options, on_error="skip"))
    assert "p/d: the folder cannot be read (Permission denied)" in "".join(capsys.readouterr())


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("step", range(4))
def test_killed_between_two_files_the_dataset_is_the_new_one_for_whoever_reads_it_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """Two splits are four files: a kill after any number of them must not leave new pictures under old captions."""
    splits = {"splits": "train,valid", "split_ratio": "0.5,0.5", "output": str(tmp_path / "out")}
    for name in ("old", "new"):
        fill(tmp_path / name, *(f"{number}{name}{number}.png" for number in range(1, 9)))
    run(Options(folder=str(tmp_path / "new"), **{**splits, "output": str(tmp_path / "expected")}))
    run(Options(folder=str(tmp_path / "old"), **splits))
    replace, moved = os.replace, []

    def kill(source: Path, target: Path) -> None:
        if Path(target).parent == tmp_path / "out":
            if len(moved) == step:
                raise Killed
            moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(Killed):
            run(Options(folder=str(tmp_path / "new"), **splits))
    assert len(moved) == step
    assert check_dataset.run(check_dataset.Options(str(tmp_path / "out"), "train,valid")) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


def test_a_full_disk_is_a_sentence_with_the_place_and_the_old_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "in", "1猫.png")
    convert(tmp_path)
    before = tree(tmp_path / "out")

    def full(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cn_clip.data.captions.image_line", full)
    with pytest.raises(DataError, match=r"out: cannot be written \(No space left on device\)"):
        convert(tmp_path)
    assert tree(tmp_path / "out") == before


def test_two_at_once_into_one_folder_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "in", "1猫.png")
    (tmp_path / "out").mkdir()
    with (
        alone(lock_file(tmp_path / "out" / DATASET), "busy"),
        pytest.raises(ConfigError, match=r"out: another process is writing it \(pid "),
    ):
        convert(tmp_path)
