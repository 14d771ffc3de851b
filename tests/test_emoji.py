"""The embedded emoji pictures, the datasets written from them, and their builder."""

import base64
import csv
import json
import os
import re
import subprocess
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import warm_python
from PIL import Image

from cn_clip.demo import emoji
from cn_clip.errors import ConfigError

ROOT = Path(__file__).parents[1]
ARCHIVE = ROOT / "cn_clip" / "emoji_pack" / "noto_emoji.zip"


def run_script(*args: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([warm_python.program(), *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def named(name: str) -> emoji.Emoji:
    (found,) = [one for one in emoji.load() if one.name == name]
    return found


def test_pictures_and_names_are_unique() -> None:
    found = emoji.load()
    assert len(found) == 1631
    assert len({one.name for one in found}) == 1631
    assert len({one.picture for one in found}) == 1631
    assert [one.number for one in found] == list(range(1, 1632))
    assert found[0].emoji == "😀"


def test_emoji_carries_name_tags_and_group() -> None:
    panda = named("熊猫")
    assert (panda.emoji, panda.group, panda.subgroup) == ("🐼", "动物与自然", "animal-mammal")
    assert named("按键：1").tags == ("1", "一", "按键")
    assert all(one.name not in one.tags for one in emoji.load())


def test_there_are_eight_groups_and_no_flags() -> None:
    assert len({one.group for one in emoji.load()}) == 8
    assert not [one.name for one in emoji.load() if "\U0001f1e6" <= one.emoji[0] <= "\U0001f1ff"]


def test_pictures_are_64_pixels_rgb_on_white() -> None:
    for one in emoji.load():
        with Image.open(BytesIO(one.picture)) as picture:
            assert (picture.size, picture.mode, picture.format) == ((64, 64), "RGB", "WEBP")
    with Image.open(BytesIO(emoji.png(named("红苹果")))) as apple:
        assert (apple.format, apple.getpixel((0, 0)), apple.getpixel((63, 63))) == ("PNG", (255,) * 3, (255,) * 3)
        red, green, blue = apple.getpixel((32, 40))
        assert red > 180 > 100 > max(green, blue)


def test_archive_carries_notice_and_licences() -> None:
    with zipfile.ZipFile(ARCHIVE) as archive:
        assert "Apache License" in archive.read("LICENSE-Apache-2.0.txt").decode()
        assert "Cal Henderson" in archive.read("LICENSE-emoji-datasource.txt").decode()
        assert "Miles Johnson" in archive.read("LICENSE-emojibase-data.txt").decode()
        assert "UNICODE LICENSE V3" in archive.read("LICENSE-Unicode-3.0.txt").decode()
        assert "https://github.com/googlefonts/noto-emoji" in archive.read("NOTICE.md").decode()


def test_captions_begin_with_the_name_and_differ() -> None:
    for one in emoji.load():
        sentences = emoji.captions(one)
        assert sentences[0] == one.name
        assert 1 <= len(sentences) == len(set(sentences)) <= 3
        assert all(one.name in sentence for sentence in sentences)
    assert emoji.captions(named("旋转木马"), seed=3) == ["旋转木马", "旋转木马，木马、游乐园", "一个旋转木马的小图"]


def test_captions_change_with_the_seed_only() -> None:
    found = emoji.load()[:100]
    first = [emoji.captions(one) for one in found]
    assert first == [emoji.captions(one) for one in found]
    assert first != [emoji.captions(one, seed=1) for one in found]


def test_no_caption_is_the_name_of_another_picture() -> None:
    names = {one.name for one in emoji.load()}
    for one in emoji.load():
        assert not names.intersection(emoji.captions(one)[1:])


def test_written_dataset_has_many_sentences_to_learn_and_the_names_to_judge(tmp_path: Path) -> None:
    emoji.write_dataset(tmp_path / "new" / "emoji")
    folder = tmp_path / "new" / "emoji"
    found = emoji.load()
    for split in ("train", "valid"):
        lines = (folder / f"{split}_imgs.tsv").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == [str(one.number) for one in found]
        assert base64.b64decode(lines[41].split("\t")[1]) == found[41].picture
    valid = read_jsonl(folder / "valid_texts.jsonl")
    assert valid[41] == {"text_id": 42, "text": found[41].name, "image_ids": [42]}
    assert [row["text"] for row in valid] == [one.name for one in found]
    train = read_jsonl(folder / "train_texts.jsonl")
    assert 4500 < len(train) == len({row["text"] for row in train}) == train[-1]["text_id"]
    assert {image_id for row in train for image_id in row["image_ids"]} == {one.number for one in found}


def test_what_is_held_out_is_in_no_training_text(tmp_path: Path) -> None:
    emoji.write_dataset(tmp_path, seed=7, vendor="twemoji", held_out_share=0.2)
    kept = emoji.held_out(seed=7, share=0.2, vendor="twemoji")
    assert len(kept) == 322
    assert kept != emoji.held_out(seed=8, share=0.2, vendor="twemoji")
    found = {one.number: one for one in emoji.load("twemoji")}
    for split, numbers in (("valid", kept), ("train", found.keys() - kept)):
        lines = (tmp_path / f"{split}_imgs.tsv").read_text().splitlines()
        assert {int(line.split("\t")[0]) for line in lines} == numbers
        rows = read_jsonl(tmp_path / f"{split}_texts.jsonl")
        assert {image_id for row in rows for image_id in row["image_ids"]} == numbers
        names = {found[number].name for number in numbers}
        assert names <= {row["text"] for row in rows}
        if split == "valid":
            assert {(row["text_id"], row["text"]) for row in rows} == {(one, found[one].name) for one in kept}


def test_written_dataset_passes_the_builder(tmp_path: Path) -> None:
    emoji.write_dataset(tmp_path)
    done = run_script("cn_clip/preprocess/build_lmdb_dataset.py", "--data_dir", tmp_path, "--splits", "train,valid")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lmdb" / "valid" / "pairs").is_dir()


def test_export_writes_named_pictures_and_a_table_of_captions(tmp_path: Path) -> None:
    table = emoji.export(tmp_path / "pictures")
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows[0] == {"image": "0001嘿嘿.png", "text": "嘿嘿"}
    files = {path.name for path in table.parent.glob("*.png")}
    assert len(files) == 1631
    assert {row["image"] for row in rows} == files
    assert f"{named('按键：*').number:04d}按键：.png" in files


def test_export_becomes_a_dataset_by_its_table(tmp_path: Path) -> None:
    table = emoji.export(tmp_path / "pictures")
    args = ["--table", table, "--output", tmp_path / "out", "--splits", "train", "--split-ratio", "1"]
    done = run_script("cn_clip/preprocess/dataset_from_folder.py", *args)
    assert done.returncode == 0, done.stderr
    texts = {row["text"]: row["image_ids"] for row in read_jsonl(tmp_path / "out" / "train_texts.jsonl")}
    assert texts["熊猫"] == [named("熊猫").number]
    assert set(texts) == {caption for one in emoji.load() for caption in emoji.captions(one)}


def test_classes_are_disjoint_have_six_pictures_each_and_labels_known_to_the_captions() -> None:
    members = emoji.classify()
    assert len(members) == 26
    chosen = [one.file for found in members.values() for one in found]
    assert len(chosen) == len(set(chosen))
    for label, found in members.items():
        assert len(found) >= 6, label
        assert 2 * sum(label in " ".join([one.name, *one.tags]) for one in found) >= len(found), label


def test_classification_folder_has_labels_and_numbered_folders(tmp_path: Path) -> None:
    rules = {"猫脸": emoji.Rule("cat-face"), "月亮": emoji.Rule("sky & weather", "月", "微笑")}
    assert emoji.write_classification(tmp_path / "zs", rules) == ["猫脸", "月亮"]
    assert (tmp_path / "zs" / "label_cn.txt").read_text(encoding="utf-8") == "猫脸\n月亮\n"
    assert sorted(path.name for path in (tmp_path / "zs" / "test").iterdir()) == ["000", "001"]
    cats, moons = (list((tmp_path / "zs" / "test" / name).glob("*.png")) for name in ("000", "001"))
    assert (len(cats), len(moons)) == (9, 9)


def test_overlapping_and_empty_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="'大笑的猫' falls into the classes '猫' and '动物'"):
        emoji.classify({"猫": emoji.Rule("cat-face"), "动物": emoji.Rule("(cat|monkey)-face")})
    with pytest.raises(ConfigError, match="class '恐龙': no picture"):
        emoji.classify({"恐龙": emoji.Rule("dinosaur")})


# --- the drawings of the other vendor


def test_twemoji_has_other_drawings_under_names_that_noto_has_too() -> None:
    found = emoji.load("twemoji")
    assert len(found) == len({one.name for one in found}) == len({one.picture for one in found}) == 1610
    assert {one.name for one in found} <= {one.name for one in emoji.load()}
    assert not {one.picture for one in found} & {one.picture for one in emoji.load()}
    for one in found[::40]:
        with Image.open(BytesIO(one.picture)) as picture:
            assert (picture.size, picture.mode, picture.format) == ((64, 64), "RGB", "WEBP")


def test_twemoji_archive_names_its_makers_and_licence() -> None:
    with zipfile.ZipFile(ARCHIVE.with_name("twemoji_emoji.zip")) as archive:
        notice = archive.read("NOTICE.md").decode()
        assert "Twitter, Inc and other contributors" in notice
        assert "https://creativecommons.org/licenses/by/4.0/" in notice
        assert "LICENSE-Apache-2.0.txt" not in archive.namelist()
        # The notice names the file of each licence; each is there in full.
        assert set(re.findall(r"LICENSE-[\w.-]+\.txt", notice)) == {
            name for name in archive.namelist() if name.startswith("LICENSE")
        }
        by = archive.read("LICENSE-CC-BY-4.0.txt").decode()
        assert by.startswith("Attribution 4.0 International\n")
        assert all(f"Section {number} -- " in by for number in range(1, 9))
        assert "UNICODE LICENSE V3" in archive.read("LICENSE-Unicode-3.0.txt").decode()


def test_dataset_and_classes_can_be_of_twemoji(tmp_path: Path) -> None:
    emoji.write_dataset(tmp_path, vendor="twemoji")
    assert len((tmp_path / "valid_imgs.tsv").read_text().splitlines()) == 1610
    assert len(read_jsonl(tmp_path / "valid_texts.jsonl")) == 1610
    classes = emoji.drawn_classes("twemoji")
    assert set(emoji.CLASSES) - set(classes) == {"家庭"}
    assert min(map(len, emoji.classify(classes, vendor="twemoji").values())) >= 6


# --- the builder, on packages of a few pictures


def source(unified: str, image: str, order: int, category: str = "Symbols", google: bool = True) -> dict[str, Any]:
    picture = {"unified": unified, "image": image, "sort_order": order, "has_img_google": google}
    return {**picture, "category": category, "subcategory": "keycap"}


@pytest.fixture
def packages(tmp_path: Path) -> Callable[[list[dict[str, Any]], list[dict[str, Any]]], list[object]]:
    """Writes two packages in npm's layout, with the pictures 1.png (half transparent red), 2.png and 3.png (blue)."""

    def write(pictures: list[dict[str, Any]], names: list[dict[str, Any]]) -> list[object]:
        drawings, texts = tmp_path / "g", tmp_path / "e"
        (drawings / "img" / "google" / "64").mkdir(parents=True)
        (texts / "zh").mkdir(parents=True)
        for name, colour in [("1", (255, 0, 0, 0)), ("2", (0, 0, 255, 255)), ("3", (0, 0, 255, 255))]:
            Image.new("RGBA", (64, 64), colour).save(drawings / "img" / "google" / "64" / f"{name}.png")
        (drawings / "emoji.json").write_text(json.dumps(pictures))
        (texts / "zh" / "data.json").write_text(json.dumps(names))
        for folder in (drawings, texts):
            (folder / "LICENSE").write_text("licence")
        return ["--pictures", drawings, "--names", texts, "--output", tmp_path / "out.zip"]

    return write


NAMES: list[dict[str, Any]] = [
    {"hexcode": "0031-20E3", "emoji": "1", "label": "按键: 1", "tags": ["按键: 1", "一"]},
    {"hexcode": "1F170", "emoji": "A", "label": "AB 型血", "tags": ["血"]},
    {"hexcode": "1F171", "emoji": "B", "label": "型血"},
    {"hexcode": "1F1E6", "emoji": "F", "label": "旗"},
]


def test_builder_joins_names_drops_flags_and_equal_pictures(packages: Any, tmp_path: Path) -> None:
    sources = [
        source("1F171", "3.png", 3),
        source("1F170", "2.png", 2),
        source("0031-FE0F-20E3", "1.png", 1),
        source("1F1E6", "2.png", 4, category="Flags"),
        source("1F1E6", "2.png", 5, google=False),
        source("1F999", "2.png", 6),
    ]
    done = run_script("tools/build_emoji_dataset.py", *packages(sources, NAMES))
    assert done.returncode == 0, done.stderr
    assert "left out, same picture as another: AB型血" in done.stdout
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        records = [json.loads(line) for line in archive.read("emoji.jsonl").splitlines()]
        with Image.open(BytesIO(archive.read("0001.webp"))) as picture:
            assert picture.getpixel((5, 5)) == (255, 255, 255)
        assert "LICENSE-emojibase-data.txt" in archive.namelist()
    common = {"group": "符号", "subgroup": "keycap"}
    assert records == [
        {"file": "0001.webp", "emoji": "1", "name": "按键：1", "tags": ["一"], **common},
        {"file": "0002.webp", "emoji": "B", "name": "型血", "tags": [], **common},
    ]


def test_builder_writes_the_same_bytes_again(packages: Any, tmp_path: Path) -> None:
    args = packages([source("1F170", "2.png", 2)], NAMES)
    assert run_script("tools/build_emoji_dataset.py", *args).returncode == 0
    first = (tmp_path / "out.zip").read_bytes()
    assert run_script("tools/build_emoji_dataset.py", *args).returncode == 0
    assert (tmp_path / "out.zip").read_bytes() == first
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:  # whose clock ticks only every other second
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_builder_takes_the_drawings_of_the_vendor(packages: Any, tmp_path: Path) -> None:
    args = packages([{**source("1F170", "2.png", 1), "has_img_twitter": True}], NAMES)
    folder = tmp_path / "g" / "img"
    (folder / "google").rename(folder / "twitter")
    done = run_script("tools/build_emoji_dataset.py", "--vendor", "twemoji", *args)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert "Twemoji" in archive.read("NOTICE.md").decode()
        assert json.loads(archive.read("emoji.jsonl"))["name"] == "AB型血"


def test_builder_refuses_two_pictures_of_one_name(packages: Any, tmp_path: Path) -> None:
    names = [NAMES[0], {**NAMES[1], "label": "按键：1"}]
    args = packages([source("0031-20E3", "1.png", 1), source("1F170", "2.png", 2)], names)
    done = run_script("tools/build_emoji_dataset.py", *args)
    assert done.returncode == 1
    assert "two pictures have the same name" in done.stderr
    assert not (tmp_path / "out.zip").exists()


# --- the training set of the bundled model, on packages of a few pictures


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    """A cache of three unpacked packages: names, Noto and Twemoji with the same two emoji each."""
    cache = tmp_path / "cache"
    for vendor, package in [("google", "emoji-datasource-google"), ("twitter", "emoji-datasource-twitter")]:
        folder = cache / f"{package}-16.0.0" / "package"
        (folder / "img" / vendor / "64").mkdir(parents=True)
        for name, colour in [("1", (200, 0, 0)), ("2", (0, 0, 200))]:
            Image.new("RGB", (64, 64), colour).save(folder / "img" / vendor / "64" / f"{name}.png")
        common = {"category": "Objects", f"has_img_{vendor}": True, "short_names": []}
        records = [
            {"unified": "1F381", "image": "1.png", "sort_order": 1, "name": "WRAPPED PRESENT", **common},
            {"unified": "1F511", "image": "2.png", "sort_order": 2, "name": "KEY", **common},
        ]
        (folder / "emoji.json").write_text(json.dumps(records))
    names = cache / "emojibase-data-17.0.0" / "package"
    texts = {
        "zh": [
            {"hexcode": "1F381", "label": "礼物", "tags": ["盒子", "庆祝"]},
            {"hexcode": "1F511", "label": "钥匙", "tags": ["锁"]},
        ],
        "zh-hant": [{"hexcode": "1F381", "label": "禮物", "tags": ["驚喜"]}],
        "en": [{"hexcode": "1F381", "label": "wrapped gift"}],
    }
    for language, records in texts.items():
        (names / language).mkdir(parents=True)
        (names / language / "data.json").write_text(json.dumps(records))
    return cache


def test_training_set_keeps_the_held_out_vendor_out_and_repeats_itself(packs: Path, tmp_path: Path) -> None:
    args = [
        "tools/build_emoji_training_set.py",
        "--packs",
        packs,
        "--vendors",
        "noto",
        "--copies",
        "3",
        "--captions",
        "4",
    ]
    for name in ("a", "b"):
        done = run_script(*args, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert "train: 6 pictures" in done.stdout
    for file in ("train_imgs.tsv", "train_texts.jsonl", "valid_imgs.tsv", "valid_texts.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    valid = [
        {key: row[key] for key in ("text", "image_ids")} for row in read_jsonl(tmp_path / "a" / "valid_texts.jsonl")
    ]
    assert valid == [{"text": "礼物", "image_ids": [1]}, {"text": "钥匙", "image_ids": [2]}]
    train = read_jsonl(tmp_path / "a" / "train_texts.jsonl")
    assert len({row["text"] for row in train}) == len(train)
    gift = {row["text"] for row in train if set(row["image_ids"]) <= {1, 2, 3}}
    assert all(any(word in text for word in ("礼物", "盒子", "庆祝", "惊喜")) for text in gift)


def test_training_set_refuses_to_learn_from_the_held_out_vendor(packs: Path, tmp_path: Path) -> None:
    args = ["--packs", packs, "--vendors", "noto,twemoji", "--output", tmp_path / "out"]
    done = run_script("tools/build_emoji_training_set.py", *args)
    assert done.returncode == 2
    assert "--held-out twemoji: is one of" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_package_that_is_not_the_one_expected_is_refused(packs: Path, tmp_path: Path) -> None:
    (packs / "openmoji-17.0.0.tgz").write_bytes(b"something else")
    args = ["--packs", packs, "--vendors", "openmoji", "--output", tmp_path / "out"]
    done = run_script("tools/build_emoji_training_set.py", *args)
    assert done.returncode == 1
    assert "openmoji-17.0.0.tgz: expected sha512-" in done.stderr
