"""Every path has one spelling that JSON, addresses and tables hold, and none has that of another."""

import json
import os
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cn_clip.data.paths import characters, path_of, readable, spelled
from cn_clip.index.sources import open_source


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("照片/假期 1.jpg".encode(), "照片/假期 1.jpg"),
        ("照片/假期 1.jpg".encode("gbk"), "gbk:照片/gbk:假期 1.jpg"),
        ("照片/".encode() + "假期.jpg".encode("gbk"), "照片/gbk:假期.jpg"),
        (b"\xff%20.jpg", "bytes:%FF%2520.jpg"),
        (b"\xd5\xd5\x01.jpg", "bytes:%D5%D5%01.jpg"),
        ("gbk:照片/utf-8:a/b:c".encode(), "utf-8:gbk:照片/utf-8:utf-8:a/b:c"),
        ("é/e\u0301".encode(), "é/e\u0301"),
        (b"", ""),
        ("照/a\nb\t.jpg".encode(), "照/bytes:a%0Ab%09.jpg"),
        ("\x85\u2028".encode(), "bytes:%C2%85%E2%80%A8"),
    ],
    ids=ascii,
)
def test_a_name_is_spelled_so_and_found_again(name: bytes, spelling: str) -> None:
    path = os.fsdecode(name)
    assert spelled(path) == spelling
    assert os.fsencode(path_of(spelling)) == name


@given(st.one_of(st.binary(max_size=40).map(os.fsdecode), st.text(st.characters(codec=None), max_size=20)))
def test_any_path_comes_back_and_its_spelling_is_held_by_all(path: str) -> None:
    spelling = spelled(path)
    assert path_of(spelling) == path
    assert json.loads(json.dumps(spelling, ensure_ascii=False).encode("utf-8")) == spelling
    assert unquote(quote(spelling, safe="")) == spelling
    assert readable(spelling) == spelling
    assert spelling.splitlines() in ([spelling], [])


def test_a_name_of_windows_that_is_no_text_comes_back() -> None:
    for name, spelling in (
        ("\ud800.jpg", "utf-16:%ED%A0%80.jpg"),
        ("\udce4\udcbd\udca0", "utf-16:%ED%B3%A4%ED%B2%BD%ED%B2%A0"),
    ):
        assert (spelled(name), path_of(spelling)) == (spelling, name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("假期.jpg".encode(), "假期.jpg"),
        ("假期.jpg".encode("gbk"), "假期.jpg"),
        (b"gbk:a.jpg", "gbk:a.jpg"),
        (b"bytes:%41", "bytes:%41"),
        (b"\xff.jpg", None),
        (b"a\n.jpg", None),
    ],
    ids=ascii,
)
def test_the_characters_of_a_name_are_those_of_its_encoding(name: bytes, text: str | None) -> None:
    assert characters(os.fsdecode(name)) == text


def test_values_are_readable_at_any_depth() -> None:
    given = {"id": 7, "path": "/a/\udcff.jpg", "more": [{"\udcd5\udcd5": None}, 1.5, "照片"]}
    assert readable(given) == {"id": 7, "path": "/a/bytes:%FF.jpg", "more": [{"gbk:照": None}, 1.5, "照片"]}


def test_an_index_calls_its_items_by_the_spelling_of_their_paths(tmp_path: Path) -> None:
    try:
        for name in (b"\xd5\xd5\xc6\xac", b"plain"):
            (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).mkdir()
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name + b"/\xff.jpg")).write_bytes(b"x")
    except OSError:  # macOS and Windows
        pytest.skip("this file system holds no names but in Unicode")
    source = open_source(tmp_path)
    assert [one.id for one in source.candidates] == ["plain/bytes:%FF.jpg", "gbk:照片/bytes:%FF.jpg"]
    assert all(one.read() == b"x" for one in source.candidates)
