"""The embedded emoji pictures with Chinese names and tags, and the datasets made of them; for the demo and tests."""

import base64
import csv
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

from cn_clip.clip.pictures import opened
from cn_clip.clip.templates import fill, load_templates
from cn_clip.data.records import DATASET, text_line
from cn_clip.emoji_pack import Emoji, Vendor, load
from cn_clip.errors import ConfigError
from cn_clip.files import atomic_write, written_together

__all__ = [
    "CLASSES",
    "Emoji",
    "Rule",
    "Vendor",
    "captions",
    "classify",
    "drawn_classes",
    "export",
    "held_out",
    "load",
    "png",
    "write_classification",
    "write_dataset",
]

_UNFIT_FOR_FILE_NAMES = re.compile(r'[\\/:*?"<>|\x00-\x1f]')


@dataclass(frozen=True)
class Rule:
    """Chooses the pictures of a class: patterns that match the whole subgroup, and within the name."""

    subgroup: str
    name: str = ""
    unless: str = "$^"

    def admits(self, emoji: Emoji) -> bool:
        """Whether the picture belongs to the class."""
        fits = re.fullmatch(self.subgroup, emoji.subgroup) and re.search(self.name, emoji.name)
        return bool(fits) and not re.search(self.unless, emoji.name)


# Labels are words that the tags use, and no label is a kind of another ("bird", hence not "animal").
CLASSES: dict[str, Rule] = {
    "时钟": Rule("time", "点|钟"),
    "心": Rule("heart", "心", "心型|心中箭|心叹|两颗|修复"),
    "猫脸": Rule("cat-face"),
    "手": Rule("hand-(fingers|single).*|hands", unless="握手"),
    "鸟": Rule("animal-bird", unless="羽毛|翅膀"),
    "昆虫": Rule("animal-bug", unless="蜗牛|蛛|细菌|蠕|蝎"),
    "花": Rule("plant-flower"),
    "水果": Rule("food-fruit"),
    "蔬菜": Rule("food-vegetable"),
    "甜点": Rule("food-sweet"),
    "饮料": Rule("drink", unless="奶瓶|茶壶|冰块"),
    "建筑": Rule("place-building", unless="施工|砖|岩石|木头|婚礼|自由"),
    "汽车": Rule("transport-ground", "车$", "火车|列车|轨|电车|摩托|自行"),
    "船": Rule("transport-water", unless="锚|救生圈"),
    "月亮": Rule("sky & weather", "月"),
    "球": Rule("sport", "球$"),
    "鞋": Rule("clothing", "鞋|靴"),
    "乐器": Rule("musical-instrument"),
    "书": Rule("book-paper", "书|本"),
    "箭头": Rule("arrow"),
    "星座": Rule("zodiac"),
    "家庭": Rule("family", "家庭"),
    "圆": Rule("geometric", "圆$"),
    "正方形": Rule("geometric", "方块|方框"),
    "轮椅": Rule("person-activity", "轮椅"),
    "日文": Rule("alphanum", "日文"),
}


@cache
def _names(vendor: Vendor) -> frozenset[str]:
    return frozenset(emoji.name for emoji in load(vendor))


def png(emoji: Emoji) -> bytes:
    """The picture as a PNG file, RGB."""
    stream = BytesIO()
    with opened(emoji.picture) as picture:
        picture.convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def captions(emoji: Emoji, *, seed: int = 0, vendor: Vendor = "noto") -> list[str]:
    """Up to three different training sentences, the name first; the same seed gives the same sentences.

    The others: name and two tags, and a phrase of the "emoji" prompt templates about the name. Each holds the name:
    tags alone fit many pictures, and a small model learns little from them in a few minutes.
    """
    choice = random.Random(f"{seed} {emoji.file}")
    pair = choice.sample(emoji.tags, min(2, len(emoji.tags)))
    phrase = fill(choice.choice(load_templates("emoji")), emoji.name)
    sentences = [emoji.name, "，".join(filter(None, [emoji.name, "、".join(pair)])), phrase]
    return list(dict.fromkeys(text for text in sentences if text == emoji.name or text not in _names(vendor)))


def export(folder: Path, *, vendor: Vendor = "noto", count: int | None = None) -> Path:
    """Writes `0001嘿嘿.png` ... and `captions.csv` (columns image, text; one caption a row) into `folder`.

    The folder is made when absent; returns the path of the CSV table. count: of the pictures, by subject; default: all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, str]] = []
    for emoji in load(vendor)[:count]:
        name = f"{emoji.number:04d}{_UNFIT_FOR_FILE_NAMES.sub('', emoji.name)}.png"
        (folder / name).write_bytes(png(emoji))
        rows.extend((name, caption) for caption in captions(emoji, vendor=vendor))
    table = folder / "captions.csv"
    with atomic_write(table) as stream:
        csv.writer(stream, lineterminator="\n").writerows([("image", "text"), *rows])
    return table


def held_out(*, seed: int, share: float, vendor: Vendor) -> frozenset[int]:
    """The numbers of the pictures that are kept from training: this share of all, the same ones for the same seed."""
    numbers = [emoji.number for emoji in load(vendor)]
    return frozenset(random.Random(f"{seed} held out").sample(numbers, round(share * len(numbers))))


def write_dataset(folder: Path, *, seed: int = 0, vendor: Vendor = "noto", held_out_share: float = 0) -> None:
    """Writes `{train,valid}_imgs.tsv` and `{train,valid}_texts.jsonl` into `folder`, which is made when absent.

    The texts of train are all `captions` of its pictures; those of valid are the names, text id = picture id. valid
    holds the pictures of `held_out`, train all others; with a share of 0 both hold all pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = held_out(seed=seed, share=held_out_share, vendor=vendor)
    learned = [emoji for emoji in load(vendor) if emoji.number not in kept]
    judged = [emoji for emoji in load(vendor) if emoji.number in kept or not kept]
    sentences = [(text, emoji.number) for emoji in learned for text in captions(emoji, seed=seed, vendor=vendor)]
    splits = {
        "train": (learned, list(enumerate(sentences, start=1))),
        "valid": (judged, [(emoji.number, (emoji.name, emoji.number)) for emoji in judged]),
    }
    with written_together(folder / DATASET, told=folder) as scratch:
        for split, (pictures, texts) in splits.items():
            with (scratch / f"{split}_imgs.tsv").open("w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(f"{one.number}\t{base64.b64encode(one.picture).decode()}\n" for one in pictures)
            with (scratch / f"{split}_texts.jsonl").open("w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(text_line(text_id, text, [image_id]) for text_id, (text, image_id) in texts)


def drawn_classes(vendor: Vendor) -> dict[str, Rule]:
    """The CLASSES of which the vendor has pictures."""
    return {label: rule for label, rule in CLASSES.items() if any(map(rule.admits, load(vendor)))}


def classify(classes: Mapping[str, Rule] = CLASSES, *, vendor: Vendor = "noto") -> dict[str, list[Emoji]]:
    """The pictures of each class; raises ConfigError for an empty class or a picture that falls into two."""
    members = {label: [emoji for emoji in load(vendor) if rule.admits(emoji)] for label, rule in classes.items()}
    seen: dict[str, str] = {}
    for label, emojis in members.items():
        if not emojis:
            raise ConfigError(f"class {label!r}: no picture fits its rule {classes[label]}")
        for emoji in emojis:
            if seen.setdefault(emoji.file, label) != label:
                raise ConfigError(f"picture {emoji.name!r} falls into the classes {seen[emoji.file]!r} and {label!r}")
    return members


def write_classification(
    folder: Path, classes: Mapping[str, Rule] = CLASSES, *, vendor: Vendor = "noto"
) -> Sequence[str]:
    """Writes `label_cn.txt` and `test/000/0001.png` ... into `folder`, which is made when absent; returns the labels.

    Raises ConfigError as `classify` does.
    """
    members = classify(classes, vendor=vendor)
    for index, emojis in enumerate(members.values()):
        pictures = folder / "test" / f"{index:03d}"
        pictures.mkdir(parents=True, exist_ok=True)
        for emoji in emojis:
            (pictures / f"{emoji.number:04d}.png").write_bytes(png(emoji))
    with atomic_write(folder / "label_cn.txt") as stream:
        stream.writelines(f"{label}\n" for label in members)
    return list(members)
