"""Errors say where: in the sentence for people, in fields for programs."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from cn_clip.clip.templates import read_labels
from cn_clip.data.records import read_texts
from cn_clip.errors import CnClipError, ConfigError, DataError, OutputError, UnreadableError, Where
from cn_clip.features.files import read_features
from cn_clip.files import atomic_write


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (Where("t.jsonl"), "t.jsonl"),
        (Where(Path("a") / "t.jsonl", line=7), "a/t.jsonl:7"),
        (Where("t.jsonl", line=7, field="image_ids"), "t.jsonl:7 image_ids"),
        (Where("f.npz", field="features"), "f.npz features"),
        (Where("f.npz", part="row 3", field="image_id", id=15), "f.npz: row 3 image_id"),
        (Where("t.jsonl", line=7).of("text"), "t.jsonl:7 text"),
    ],
)
def test_where_is_said_as_the_sentence_begins(where: Where, said: str) -> None:
    assert str(where) == said
    assert str(DataError("is wrong", at=where)) == f"{said}: is wrong"


def test_an_error_of_no_file_has_no_fields() -> None:
    error = ConfigError("--k: expected at least 1")
    assert (str(error), error.path, error.line, error.id) == ("--k: expected at least 1", None, None, None)


def test_the_fields_pass_to_another_process() -> None:
    for kind in (DataError, UnreadableError, OutputError):
        error = pickle.loads(pickle.dumps(kind("is wrong", at=Where("a.tsv", line=3, id="x"))))
        assert (type(error), str(error), error.path, error.line, error.id) == (
            kind,
            "a.tsv:3: is wrong",
            "a.tsv",
            3,
            "x",
        )


def _error_of(read: object, path: Path, *args: object) -> CnClipError:
    with pytest.raises(CnClipError) as caught:
        read(path, *args)  # type: ignore[operator]
    assert str(caught.value).startswith(str(path))
    return caught.value


def test_readers_say_path_and_line_as_fields(tmp_path: Path) -> None:
    texts = tmp_path / "t.jsonl"
    texts.write_text('{"text_id": 1, "text": "猫"}\n{"text_id": 2}\n', encoding="utf-8")
    rows = tmp_path / "f.jsonl"
    rows.write_text('{"image_id": 5, "feature": [1.0]}\n\n{"image_id": 5, "feature": [0.5]}\n', encoding="utf-8")
    table = tmp_path / "f.npz"
    np.savez(table, ids=np.array([5, 6, 5]), features=np.eye(3, dtype=np.float32))
    labels = tmp_path / "labels.txt"
    labels.write_text("猫\n\n狗\n", encoding="utf-8")
    found = [
        _error_of(read_texts, texts),
        _error_of(read_features, rows, "image_id"),
        _error_of(read_features, table, "image_id"),
        _error_of(read_labels, labels),
        _error_of(read_labels, tmp_path / "none.txt"),
    ]
    assert [(error.path, error.line, error.id) for error in found] == [
        (str(texts), 2, None),
        (str(rows), 3, 5),
        (str(table), None, 5),
        (str(labels), 2, None),
        (str(tmp_path / "none.txt"), None, None),
    ]


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        with atomic_write(path):
            pass

    assert _error_of(write, tmp_path / "missing" / "out.txt").path == str(tmp_path / "missing" / "out.txt")
