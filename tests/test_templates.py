"""Prompt templates: the embedded sets, files of the user, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cn_clip.clip.templates import FOLDER, THEMED, fill, load_templates
from cn_clip.errors import DataError


@pytest.mark.parametrize("name", ["default", *THEMED])
def test_embedded_sets_hold_different_templates_with_one_slot(name: str) -> None:
    templates = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert len(templates) == len(set(templates)) >= 6
    assert all(template.count("{}") == 1 for template in templates)


def test_every_embedded_file_is_reachable_by_a_dataset_name() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == {"default", *THEMED}


def test_themed_dataset_has_its_own_templates_and_any_other_the_general_ones() -> None:
    assert "一盘{}" in load_templates("food-101")
    assert load_templates("openai") == load_templates("cifar-100") == load_templates("default")
    assert "一张{}的照片" in load_templates("openai")


def test_dataset_name_never_reaches_the_file_system() -> None:
    assert load_templates("../../clip/model_configs/RN50") == load_templates("openai")


def test_returned_list_may_be_changed_without_harm() -> None:
    load_templates("food-101").clear()
    assert load_templates("food-101")


def test_text_file_of_the_user_is_read_line_by_line_without_blank_lines_and_mark(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes("\ufeff一只{}\r\n\r\n  {}的画  \n".encode())
    assert load_templates("food-101", file) == ["一只{}", "{}的画"]


def test_json_file_of_the_user_is_read_as_a_list(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('["一只{}", "{a}中的{}"]', encoding="utf-8")
    assert load_templates("food-101", file) == ["一只{}", "{a}中的{}"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "一只{}\n一只\n", r"a\.txt:2: expected exactly one {}"),
        ("a.txt", "一只{}\n\n{}和{}\n", r"a\.txt:3: expected exactly one {}"),
        ("a.txt", "\n", r"a\.txt: holds no template"),
        ("a.txt", b"{}\n\xff{}\n", r"a\.txt:2: invalid UTF-8 at byte 0"),
        ("a.json", "[]", r"a\.json: holds no template"),
        ("a.json", '["{}", "x"]', r"a\.json: item 2: expected exactly one {}"),
        ("a.json", '["{}", 3]', r"a\.json: item 2: expected a string, got int"),
        ("a.json", '{"a": 1}', r"a\.json: expected a JSON list of strings, got dict"),
        ("a.json", '["{}",\n', r"a\.json:2: not valid JSON"),
        ("a.json", b'["\xff"]', r"a\.json: invalid UTF-8"),
    ],
)
def test_faulty_file_is_refused_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_templates("openai", file)


@pytest.mark.parametrize("name", ["none.txt", "none.json"])
def test_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}: cannot be opened"):
        load_templates("openai", tmp_path / name)


@given(st.text())
def test_fill_puts_any_label_in_literally(label: str) -> None:
    assert fill("一张{}的{照片}", label) == f"一张{label}的{{照片}}"
