"""The dataset checker: every fault of a split at once, with file, line and id."""

import errno
import json
import pickle
from pathlib import Path

import lmdb
import pytest
from dataset_files import GOLDEN_LMDB, jsonl_line, run_script, tsv_line, write_split
from unreadable_files import unreadable

from cn_clip.data.checks import check_split
from cn_clip.preprocess import build_lmdb_dataset

SCRIPT = "preprocess/check_dataset.py"


def build(folder: Path) -> None:
    build_lmdb_dataset.run(build_lmdb_dataset.Options(str(folder), "train"))


def faults(folder: Path, split: str = "train") -> list[str]:
    result = check_split(folder, split, folder / "lmdb" / split)
    return [str(fault).replace(f"{folder}/", "") for fault in result.faults]


def overwrite(folder: Path, items: dict[bytes, bytes | None]) -> None:
    with lmdb.open(str(folder), map_size=2**24) as env, env.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.delete(key) if value is None else transaction.put(key, value)


def test_a_sound_dataset_passes_and_its_counts_are_told() -> None:
    result = run_script(SCRIPT, "--data_dir", GOLDEN_LMDB)
    assert result.returncode == 0, result.stdout
    assert result.stdout == "train: 4 valid images, 4 valid texts, 4 pairs in the LMDB, no problems found\n"


def test_every_fault_is_listed_with_file_line_and_id(tmp_path: Path) -> None:
    images = [tsv_line(1), b"no tab\n", tsv_line(2, b"bad"), tsv_line(1), b"4\tQUJ\n", b"\xff\tQUJD\n"]
    texts = [
        jsonl_line(1, "红", [1, 9]),
        b"[]\n",
        jsonl_line(1, "红"),
        b'{"text_id": 5}\n',
        b"\xff\n",
        jsonl_line(2, [3]),
    ]
    write_split(tmp_path, images, texts)
    result = run_script(SCRIPT, "--data_dir", tmp_path, "--splits", "train", "--json")
    assert result.returncode == 1
    summary = json.loads(result.stdout)
    (split,) = summary["splits"]
    assert (summary["ok"], summary["faults"], split["images"], split["texts"], split["pairs"]) == (
        False,
        11,
        1,
        1,
        None,
    )
    places = [(Path(fault["file"]).name, fault["line"], fault["id"]) for fault in split["faults"]]
    assert places == [
        ("train_imgs.tsv", 2, None),
        ("train_imgs.tsv", 3, 2),
        ("train_imgs.tsv", 4, 1),
        ("train_imgs.tsv", 5, 4),
        ("train_imgs.tsv", 6, None),
        ("train_texts.jsonl", 1, 1),
        ("train_texts.jsonl", 2, None),
        ("train_texts.jsonl", 3, 1),
        ("train_texts.jsonl", 4, None),
        ("train_texts.jsonl", 5, None),
        ("train_texts.jsonl", 6, None),
    ]


def test_all_splits_are_found_and_faults_are_lines_of_text(tmp_path: Path) -> None:
    write_split(tmp_path, [tsv_line(1)], [jsonl_line(1, "红", [1])], split="valid")
    write_split(tmp_path, [tsv_line(1)], [b""])
    result = run_script(SCRIPT, "--data_dir", tmp_path)
    assert result.returncode == 1
    fault, train, valid = result.stdout.splitlines()
    assert fault.startswith(f"{tmp_path}/train_texts.jsonl: the file is empty; expected lines of")
    assert train == "train: 1 valid image, 0 valid texts, no LMDB, 1 problem found"
    assert valid == "valid: 1 valid image, 1 valid text, no LMDB, no problems found"


def test_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    assert faults(tmp_path) == [
        "train_imgs.tsv: no such file; a split has _imgs.tsv and _texts.jsonl",
        "train_texts.jsonl: no such file; a split has _imgs.tsv and _texts.jsonl",
    ]


@pytest.mark.parametrize("arguments", [["--data_dir", "/nowhere"], ["--data_dir", "."]])
def test_a_folder_without_a_dataset_is_refused(arguments: list[str]) -> None:
    result = run_script(SCRIPT, *arguments)
    assert result.returncode == 1
    assert "/nowhere: the data_dir does not exist" in result.stderr or ".: holds no dataset" in result.stderr


def test_an_lmdb_older_than_the_files_is_found(tmp_path: Path) -> None:
    write_split(tmp_path, [tsv_line(1), tsv_line(2), tsv_line(3)], [jsonl_line(1, "红", [1]), jsonl_line(2, "绿", [2])])
    build(tmp_path)
    assert faults(tmp_path) == []
    write_split(tmp_path, [tsv_line(1), tsv_line(2, tsv_png()), tsv_line(4)], [jsonl_line(1, "蓝", [1, 4])])
    assert faults(tmp_path) == [
        "lmdb/train/imgs: image id 2 (line 2 of the tsv file) is not the picture of the tsv file; build the LMDB again",
        "lmdb/train/imgs: image id 4 (line 3 of the tsv file) is missing; build the LMDB again",
        "lmdb/train/imgs: image id 3 has no sound line in the tsv file; build the LMDB again",
        "lmdb/train/pairs: pair 0 is (1, 1, '红'), line 1 of the jsonl file says (1, 1, '蓝'); build it again",
    ]
    write_split(tmp_path, [tsv_line(1), tsv_line(2), tsv_line(3)], [jsonl_line(1, "红", [1])])
    assert faults(tmp_path) == ["lmdb/train/pairs: holds 2 pairs, the jsonl file 1; build the LMDB again"]


def tsv_png() -> bytes:
    from dataset_files import picture

    return picture((1, 2, 3))


def test_an_lmdb_without_its_files_is_checked_by_itself(tmp_path: Path) -> None:
    write_split(tmp_path, [tsv_line(1), tsv_line(2)], [jsonl_line(1, "红", [1, 2])])
    build(tmp_path)
    for name in ("train_imgs.tsv", "train_texts.jsonl"):
        (tmp_path / name).unlink()
    result = check_split(tmp_path, "train", tmp_path / "lmdb" / "train")
    assert (result.faults, result.num_images, result.num_texts, result.num_pairs) == ([], 2, 1, 2)
    overwrite(tmp_path / "lmdb" / "train" / "imgs", {b"2": None, b"1": b"QUJD"})
    overwrite(tmp_path / "lmdb" / "train" / "pairs", {b"0": pickle.dumps(len)})
    assert faults(tmp_path) == [
        "lmdb/train/imgs: num_images says 2, but it holds 1 pictures; build it again",
        "lmdb/train/imgs: image id 1: the picture of 3 bytes does not decode (no known picture format)",
        "lmdb/train/pairs: pair 0: refused, expected a pickled (image id, text id, text): it asks for builtins.len",
        "lmdb/train/pairs: pair 1 names picture 2, which is not in lmdb/train/imgs",
    ]


def test_a_broken_lmdb_is_one_fault(tmp_path: Path) -> None:
    write_split(tmp_path, [tsv_line(1)], [jsonl_line(1, "红", [1])])
    build(tmp_path)
    (tmp_path / "lmdb" / "train" / "pairs" / "data.mdb").write_bytes(b"x" * 9000)
    (fault,) = faults(tmp_path)
    assert "lmdb/train/pairs: cannot be read as an LMDB" in fault


@pytest.mark.parametrize("name", ["train_imgs.tsv", "train_texts.jsonl"])
def test_a_file_that_cannot_be_read_now_is_one_fault_and_not_missing(tmp_path: Path, name: str) -> None:
    write_split(tmp_path, [tsv_line(1)], [jsonl_line(1, "红", [1])])
    build(tmp_path)
    with unreadable(errno.EIO, tmp_path / name, stat=True):
        (fault,) = faults(tmp_path)
    assert fault.endswith(f"{name}: cannot be read just now (Input/output error, errno 5); is the disk there?")
    with unreadable(errno.EIO, tmp_path / "lmdb", stat=True):
        assert "lmdb/train: cannot be read just now (Input/output error, errno 5)" in faults(tmp_path)[0]
