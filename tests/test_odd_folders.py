"""Names as cameras, copies and counters leave them: what is cleaned, what is warned of, and where copies go."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import odd_folders
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from odd_folders import Case, fill, outcome
from test_dataset_from_folder import ALL_TRAIN, convert, read

from cn_clip.data.names import caption, caption_of, cleaned, says_something, stems_of
from cn_clip.data.review import short
from cn_clip.errors import ConfigError, DataError
from cn_clip.preprocess.dataset_from_folder import Options, main, run


@pytest.mark.parametrize(
    ("stem", "text", "kinds"),
    [
        # copies
        ("狼 - 副本", "狼", {"copy"}),
        ("狼 - 副本 (2)", "狼", {"copy"}),
        ("狼-副本-副本", "狼", {"copy"}),
        ("狼的副本2", "狼", {"copy"}),
        ("狼 - Copy", "狼", {"copy"}),
        ("狼 copy 3", "狼", {"copy"}),
        ("Copy of 狼", "狼", {"copy"}),
        ("复件 狼", "狼", {"copy"}),
        ("photocopy", "photocopy", set()),
        # counters
        ("仓鼠2", "仓鼠", {"counter"}),
        ("仓鼠 (3)", "仓鼠", {"counter"}),
        ("仓鼠（12）", "仓鼠", {"counter"}),
        ("仓鼠_04", "仓鼠", {"counter"}),
        ("皮卡丘 25", "皮卡丘", {"counter"}),
        ("产品0012", "产品", {"counter"}),
        ("cat_2", "cat", {"counter"}),
        ("cat (1)", "cat", {"counter"}),
        ("iPhone 15", "iPhone 15", set()),
        ("F-16", "F-16", set()),
        ("奥迪A4", "奥迪A4", set()),
        ("第3", "第3", set()),
        ("版本1.5", "版本1.5", set()),
        ("流浪地球 (2019)", "流浪地球 (2019)", set()),
        ("春节2024", "春节2024", set()),
        # cameras, screenshots and chat programs
        ("IMG_2002_大猩猩", "大猩猩", {"camera"}),
        ("IMG_20240102_123456", "", {"camera"}),
        ("IMG-20240102-WA0001", "", {"camera"}),
        ("_DSC0012 日落", "日落", {"camera"}),
        ("大猩猩_IMG_2002", "大猩猩", {"camera"}),
        ("微信图片_20240102123456_3大猩猩", "大猩猩", {"camera"}),
        ("mmexport1700000000000", "", {"camera"}),
        ("Screenshot_20240102_123456_com.tencent.mm", "", {"camera"}),
        ("Screenshot 2024-01-02 at 12.34.56", "", {"camera"}),
        ("截屏2024-01-02 下午3.04.05", "", {"camera"}),
        ("屏幕截图 2024-01-02 123456", "", {"camera"}),
        ("WhatsApp Image 2024-01-02 at 12.34.56 PM", "", {"camera"}),
        ("P1010012", "", {"camera"}),
        ("图片1", "", {"camera"}),
        ("下载 (3)", "", {"camera", "counter"}),
        ("3f2a9c0011aabbcc", "", {"camera"}),
        ("u=1234,5678&fm=26", "", {"camera"}),
        ("照片墙", "照片墙", set()),
        ("imagine", "imagine", set()),
        ("DSCovery", "DSCovery", set()),
        # dates
        ("大猩猩_20240102", "大猩猩", {"date"}),
        ("大猩猩 2024-01-02", "大猩猩", {"date"}),
        ("2024年1月2日 大猩猩", "大猩猩", {"date"}),
        ("大猩猩1700000000000", "大猩猩", {"date"}),
        ("20240102_大猩猩", "大猩猩", set()),  # a number at the start goes from every name
        ("20240102_狼 - 副本", "狼", {"copy"}),
        # nothing
        ("0001妙蛙种子", "妙蛙种子", set()),
        ("cafe\u0301", "caf\u00e9", set()),
    ],
)
def test_names_are_cleaned_at_both_ends(stem: str, text: str, kinds: set[str]) -> None:
    assert cleaned(stem) == (text, kinds)


PIECES = (
    *("狼", "大猩猩", "仓鼠", "cat", "iPhone", "第", "年", "月", "日", "e\u0301", "😀", "𠀀"),
    *(
        "IMG",
        "DSC",
        "微信图片",
        "mmexport",
        "Screenshot",
        "图片",
        "copy",
        "副本",
        "的",
        "复制",
        "of",
        "at",
        "PM",
        "WA",
        "com.a",
    ),
    *(
        " ",
        "_",
        "-",
        " - ",
        ".",
        "(",
        ")",
        "（",
        "）",
        "[",
        "]",
        "#",
        "0",
        "1",
        "25",
        "2024",
        "01",
        "20240102",
        "1700000000000",
    ),
)
NAMES = st.one_of(st.lists(st.sampled_from(PIECES), max_size=9).map("".join), st.text(max_size=40))


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NAMES)
@example("(1) (2) (3)")
@example("2024-01-02副本")
def test_cleaning_takes_only_the_ends_and_is_done_after_once(name: str) -> None:
    once = cleaned(name)
    assert once.text in unicodedata.normalize("NFC", name)
    assert cleaned(once.text).text == once.text
    assert once.text == once.text.strip()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(NAMES, NAMES)
def test_cleaning_never_empties_a_caption(folder: str, name: str) -> None:
    for text_from in ("name", "folder", "both"):
        stems = stems_of(folder.replace("/", ""), f"{name.replace('/', '')}.jpg", text_from)
        as_it_is = caption(stems, clean=False)
        assert bool(caption(stems, clean=True)) == bool(as_it_is)


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from("狼猫狗大猩种子的")),
    st.sampled_from(["", " - 副本", " (2)", "_副本", " - Copy", "2", "_IMG_2002"]),
)
def test_what_was_put_behind_a_name_is_gone(name: str, behind: str) -> None:
    assert cleaned(f"狼{name}狼{behind}").text == f"狼{name}狼"


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from("狼猫狗大猩种子的")),
    st.sampled_from(["", "IMG_2002_", "DSC_0001 ", "微信图片_20240102123456_", "0007"]),
)
def test_what_was_put_before_a_name_is_gone(name: str, before: str) -> None:
    assert cleaned(f"{before}狼{name}狼").text == f"狼{name}狼"


@pytest.mark.parametrize(
    "name", ["1" * 250, "IMG_" + "1_" * 120, "2024" * 60 + "x", "a" + " " * 250, "( 1" * 80, "_" * 255]
)
def test_the_longest_names_are_cleaned_in_time(name: str) -> None:
    cleaned(name)  # a pattern that goes back and forth would take minutes


@pytest.mark.parametrize(
    ("folder", "name", "text_from", "clean", "text"),
    [
        ("红色托特包", "背面.jpg", "both", False, "红色托特包 背面"),
        ("红色托特包", "背面.jpg", "folder", False, "红色托特包"),
        ("红色托特包", "背面2.jpg", "both", True, "红色托特包 背面"),
        ("红色托特包", "IMG_2002.jpg", "both", True, "红色托特包"),
        ("IMG_2002", "IMG_2003.jpg", "both", True, "IMG_2002 IMG_2003"),
        ("01_红色托特包", "0001.jpg", "both", False, "红色托特包"),
        ("妙蛙种子", "妙蛙种子1.jpg", "both", False, "妙蛙种子1"),
        ("", "背面.jpg", "both", False, "背面"),
        ("", "背面.jpg", "folder", False, ""),
    ],
)
def test_the_text_is_that_of_the_file_the_folder_or_both(
    folder: str, name: str, text_from: Any, clean: bool, text: str
) -> None:
    assert caption(stems_of(folder, name, text_from), clean=clean) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("😀", False),
        ("！！", False),
        ("---", False),
        ("", False),
        ("❤", True),
        ("猫😀", True),
        ("①", True),
        ("ไทย", True),
    ],
)
def test_emoji_and_signs_alone_say_nothing_but_those_of_the_vocabulary(text: str, says: bool) -> None:
    assert says_something(text) == says


# --- whole folders


EXPECTED: dict[str, tuple[dict[str, int], list[str]]] = {
    "copies": (
        {"熊猫": 1, "狼": 1, "狼 - Copy (2)": 1, "狼 - 副本": 1},
        [
            "2 captions contain a copy mark, such as '狼 - Copy (2)'; --clean-names turns that into '狼'",
            "identical copies of earlier pictures, kept in the same split: 2, 狼 - 副本.jpg = 狼 - Copy (2).jpg, "
            "狼.jpg = 狼 - Copy (2).jpg; with another caption: 2, so check whether a name is wrong",
        ],
    ),
    "counters --clean-names": (
        {"iPhone 15": 1, "仓鼠": 3, "第3": 1},
        [
            "3 of 5 pictures share their caption with another, most often '仓鼠' (3); train with cn-clip train "
            "--multi-positive, or each counts as a wrong answer for the others"
        ],
    ),
    "cameras": (
        {"DSC_0012": 1, "IMG_2002_大猩猩": 1, "mmexport1700000000000": 1, "微信图片_20240102123456": 1},
        [
            "1 caption contains a name given by a camera, a screenshot or a chat app, such as 'IMG_2002_大猩猩'; "
            "--clean-names turns that into '大猩猩'",
            "3 names of pictures say nothing about the content, such as 'DSC_0012'; rename them, or give a table "
            "(--table)",
        ],
    ),
    "cameras --clean-names": (
        {"DSC_0012": 1, "大猩猩": 1, "mmexport1700000000000": 1, "微信图片_20240102123456": 1},
        [
            "3 names of pictures say nothing about the content, such as 'DSC_0012'; cleaning would leave nothing, so "
            "they stay as they are; rename them, or give a table (--table)"
        ],
    ),
    "products": (
        {"正面": 5, "背面": 5},
        [
            "10 of 10 pictures share their caption with another, most often '正面' (5); they are in different folders: "
            "--text-from both puts the folder's name first"
        ],
    ),
    "products --text-from both": (
        {f"{colour}托特包 {side}": 1 for colour in "红橙黄绿蓝" for side in ("正面", "背面")},
        [],
    ),
    "album --clean-names --text-from both": (
        {"西湖": 3, "长城": 3},
        [
            "6 of 6 pictures share their caption with another, most often '西湖' (3); train with cn-clip train "
            "--multi-positive, or each counts as a wrong answer for the others"
        ],
    ),
    "one_picture": (
        {"橘猫": 1},
        ["only 1 picture: training and recall compare pictures with each other and need at least 2; add pictures"],
    ),
    "no_header --table t.csv": (
        {"一只橘猫": 1, "两只柴犬": 1},
        ["t.csv: has no header; its two columns are taken as image, text"],
    ),
    "chinese_excel --table t.csv": (
        {"一只橘猫，在睡觉": 1, "两只柴犬": 1},
        ["t.csv: is not UTF-8, read as GB18030"],
    ),
    "workbook --table t.xlsx": ({"一只橘猫": 1, "两只柴犬": 1}, []),
    "long_caption --table t.csv": (
        {"两只柴犬": 1, "很" * 9999 + "长": 1},
        [
            "1 caption of more than the 50 tokens (about 50 Chinese characters) that the model reads; the rest is cut "
            "off (the longest has 10,000 characters, a.jpg); put what matters first"
        ],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_of_odd_folders_the_captions_and_the_warnings(name: str, tmp_path: Path) -> None:
    (case,) = [case for case in odd_folders.CASES if case.name == name]
    found = outcome(case, tmp_path)
    captions, warnings = EXPECTED[name]
    assert found.error is None
    assert dict(found.captions) == captions
    assert [line.removeprefix("warning: ") for line in found.warnings] == warnings


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "emoji_names",
            "its name holds no word, only '😀', of which the model knows nothing; rename it or give --table",
        ),
        ("number_names", "/in/0001.jpg: the file name carries no text; expected a name such as 0001妙蛙种子.png"),
        ("rows_of_three --table t.csv", "names no columns; put a line such as image,text before it"),
    ],
)
def test_what_cannot_be_a_dataset_is_one_sentence_and_nothing_is_written(
    name: str, sentence: str, tmp_path: Path
) -> None:
    (case,) = [case for case in odd_folders.CASES if case.name == name]
    found = outcome(case, tmp_path)
    assert sentence in str(found.error)
    assert found.files == ()


def test_every_odd_folder_is_told_of_in_chinese_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CN_CLIP_LANG", "zh")
    for number, case in enumerate(odd_folders.CASES):
        (tmp_path / str(number)).mkdir()
        for line in outcome(case, tmp_path / str(number)).warnings:
            assert any("一" <= one <= "鿿" for one in line)
            assert "warning" not in line


def test_the_same_captions_in_25_folders_lead_to_text_from_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "in", *(f"商品{number}/背面.jpg" for number in range(25)))
    convert(tmp_path)
    said = capsys.readouterr().out
    assert "\n  25  背面\n" in said
    assert "'背面' (25); they are in different folders: --text-from both puts the folder's name first" in said


def test_ten_samples_and_the_commonest_come_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "in", *(f"{number:03}图{number % 7}号.png" for number in range(30)))
    (tmp_path / "in" / "031坏.png").write_bytes(b"no picture")
    with pytest.raises(DataError):
        convert(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "31 pictures; captions of 10:"
    assert lines[1] == "  000图0号.png  图0号"
    assert lines[10] == "  031坏.png     坏"
    assert lines[11] == "The most common captions (number of pictures):"
    assert lines[12:17] == ["  5  图0号", "  5  图1号", "  4  图2号", "  4  图3号", "  4  图4号"]


def test_a_preview_writes_nothing_and_json_has_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "in", "仓鼠.png", "仓鼠2.png")
    main(["--folder", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--preview", "--json", "--lmdb"])
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["splits"] == []
    assert found["captions"]["samples"] == [
        {"file": "仓鼠.png", "text": "仓鼠"},
        {"file": "仓鼠2.png", "text": "仓鼠2"},
    ]
    assert found["captions"]["commonest"] == [{"text": "仓鼠", "images": 1}, {"text": "仓鼠2", "images": 1}]
    (warning,) = found["captions"]["warnings"]
    assert (warning["kind"], warning["images"], warning["example"]) == ("counter", 1, "仓鼠2")
    assert warning["message"] in err
    assert not (tmp_path / "out").exists()


def test_copies_of_one_picture_never_lie_in_two_splits(tmp_path: Path) -> None:
    names = [f"{number}图{number}.png" for number in range(40)]
    copied = {f"z{number}又.png": f"{number}图{number}.png" for number in range(40)}
    fill(tmp_path / "in", *names, same=copied)
    run(Options(str(tmp_path / "out"), str(tmp_path / "in"), splits="train,valid", split_ratio="1,1"))
    train, valid = (set(read(tmp_path / "out", split)[0].values()) for split in ("train", "valid"))
    assert len(train) + len(valid) == 40
    assert train & valid == set()
    # Pictures without copies are where they were.
    fill(tmp_path / "one", *names)
    run(Options(str(tmp_path / "two"), str(tmp_path / "one"), splits="train,valid", split_ratio="1,1"))
    assert set(read(tmp_path / "two")[0].values()) == train


def test_splits_that_few_pictures_leave_empty_are_told_with_the_next_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "in", "1猫.png", "2狗.png")
    run(Options(str(tmp_path / "out"), str(tmp_path / "in")))
    assert (
        "no file written for it; 2 pictures are few, so add some, or give another --split-ratio or --seed"
        in capsys.readouterr().out
    )
    run(Options(str(tmp_path / "all"), str(tmp_path / "in"), splits="train,valid", split_ratio="1,0"))
    assert "no picture fell into valid: no file written for it\n" in capsys.readouterr().out


def test_captions_without_chinese_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "in", "cat.png", "dog.png", "猫.png")
    convert(tmp_path)
    assert "2 of 3 captions have no Chinese characters (such as cat); the model was trained" in capsys.readouterr().out


def test_names_of_folders_need_folders(tmp_path: Path) -> None:
    fill(tmp_path / "in", "猫.png", "狗/1.png")
    with pytest.raises(DataError, match=r"猫\.png: is in no folder below --folder whose name carries a text"):
        convert(tmp_path, text_from="folder")
    assert convert(tmp_path, text_from="both")[1] == [(0, "狗", [0]), (1, "猫", [1])]


def test_options_for_names_are_refused_beside_a_table() -> None:
    for options, name in (({"text_from": "both"}, "--text-from"), ({"clean_names": True}, "--clean-names")):
        with pytest.raises(ConfigError, match=f"{name}: is for texts from names; those of a table are taken as they"):
            Options("out", table="t.csv", **options)  # type: ignore[arg-type]


def test_emoji_alone_in_a_table_are_a_faulty_row(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a.png", "b.png")
    (tmp_path / "in" / "t.csv").write_text("image,text\na.png,😀\nb.png,猫😀\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"t\.csv:2: column 'text' holds no word, only '😀', of which the model knows"):
        convert(tmp_path, table=str(tmp_path / "in" / "t.csv"), folder=None)
    assert convert(tmp_path, table=str(tmp_path / "in" / "t.csv"), folder=None, on_error="skip")[1] == [
        (0, "猫😀", [0])
    ]


def test_a_caption_on_the_screen_is_one_line_and_short() -> None:
    assert short("猫\n狗\x1b[2J") == "猫\\n狗\\x1b[2J"
    assert short("猫" * 60) == "猫" * 60
    assert short("猫" * 10_000) == "猫" * 59 + "…"


def test_the_file_name_is_the_text_unless_another_is_asked_for() -> None:
    assert (
        caption(stems_of("狗", "0001妙蛙种子2.png", "name"), clean=False)
        == caption_of("0001妙蛙种子2.png")
        == "妙蛙种子2"
    )
    assert ALL_TRAIN["splits"] == "train"
    assert Case(odd_folders.copies, {"text_from": "both"}).name == "copies --text-from both"
