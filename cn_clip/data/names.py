"""The text that the name of a picture file or of its folder carries, and what people do not mean by it.

File managers, cameras and chat programs put things into names that say nothing of a picture: `狼 - 副本`, `仓鼠2`,
`IMG_2002_大猩猩`. `cleaned` takes them off both ends, never out of the middle.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Literal, NamedTuple, TypeAlias

from cn_clip.clip.tokenizer import vocab

TextFrom: TypeAlias = Literal["name", "folder", "both"]
# What is taken off a name.
Kind: TypeAlias = Literal["camera", "date", "copy", "counter"]

_LEADING_COUNTER = re.compile(r"\A[0-9_\-\s]+")
_EDGES = re.compile(r"\A[\s_\-–—.、，,]+|[\s_\-–—、，,]+\Z")

_HAN = "[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
# Numbers with what separates those of dates, times and bursts: 2024-01-02 at 12.34.56, 20240102-WA0001.
_NUMBERS = r"\d+(?:(?:[\s_\-.:：年月日时分秒]+(?:at\s|WA|上午|下午|AM|PM)?|WA)\d+){0,12}(?!\d)[日时分秒]?(?:\s*[AP]M)?"
# Names that only cameras and programs give, and words that people use too, which count only before a number.
_CAMERAS = (
    r"_?IMG|IMG_E|_?MG|_?DSC[NFI]?|CIMG|PXL|MVIMG|FB_IMG|VID|DJI|GOPR|SAM|PANO|BURST|mmexport|wx_camera|Snipaste|"
    r"WhatsApp[ _]Image|Screenshots?|(?:企业)?微信(?:图片|截图)|QQ(?:图片|截图|空间|浏览器截图)|"
    r"(?:TIM|钉钉)(?:图片|截图)|屏幕(?:截图|快照|捕获)|截屏"
)
_WORDS = (
    r"image|images|img|photo|picture|pic|scan|camera|snapshot|untitled|unnamed|download|图片|照片|相片|图像|截图|扫描|下载|"
    r"未命名|未标题|无标题|新建|P(?=\d{7})"
)
_APP = r"(?:[\s_\-]*(?:com|cn|tv|org|net)(?:\.[A-Za-z0-9_]+)+)?"
_DAY = (
    r"(?:19|20)\d\d(?:年\d{1,2}月(?:\d{1,2}[日号])?|([\-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])(?!\d)|"
    r"(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{6}(?!\d))"
)
_TIME = r"(?:[\s_\-T]*\d\d[.:：\-_时点]?\d\d(?:[.:：\-_分]?\d\d)?秒?(?!\d))?"
_NUMBER = r"(?:\d{1,3}|0\d{1,7})"

_PATTERNS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("camera", re.compile(rf"\A(?:{_CAMERAS})(?:[\s_\-.]*{_NUMBERS}{_APP}|(?=[\s_\-])|\Z)", re.IGNORECASE)),
    ("camera", re.compile(rf"\A(?:{_WORDS})[\s_\-.]*(?:{_NUMBERS}|\Z)", re.IGNORECASE)),
    ("camera", re.compile(rf"[\s_\-]+(?:{_CAMERAS})[\s_\-]*\d+\Z", re.IGNORECASE)),
    ("date", re.compile(rf"\A{_DAY}{_TIME}")),
    ("date", re.compile(rf"[\s_\-]*(?<!\d)[(（]?{_DAY}{_TIME}[)）]?\Z")),
    ("date", re.compile(r"[\s_\-]*(?<!\d)\d{9,}\Z")),  # seconds or milliseconds since 1970
    (
        "copy",
        re.compile(
            r"[\s_\-–—]*[(（]?(?:的?副本|拷贝|复件)(?:[\s_]*[(（]?\d{1,3}[)）]?)?[)）]?\Z|"
            r"(?:[\s_\-–—]+|[(（])(?:复制|copy)(?:[\s_]*[(（]?\d{1,3}[)）]?)?[)）]?\Z",
            re.IGNORECASE,
        ),
    ),
    (
        "copy",
        re.compile(
            r"\A(?:(?:副本|复件)(?:[\s_]*[(（]\d{1,3}[)）])?[\s_\-–—]+|copy[\s_]*(?:[(（]\d{1,3}[)）][\s_]*)?of[\s_]+)",
            re.IGNORECASE,
        ),
    ),
    ("counter", re.compile(r"[\s_\-]*(?:\(\s*\d{1,3}\s*\)|（\s*\d{1,3}\s*）|\[\s*\d{1,3}\s*\]|【\s*\d{1,3}\s*】)\Z")),
    ("counter", re.compile(rf"(?<={_HAN})(?<!第)[\s_\-#]*{_NUMBER}\Z|(?<=[A-Za-z])_\d{{1,4}}\Z")),
)
# Nothing is taken off a name without one of these.
_SUSPECT = re.compile(rf"\d|副本|拷贝|复件|复制|copy|timg|OIP|OIF|\Ath\Z|u=|{_CAMERAS}|{_WORDS}", re.IGNORECASE)
# Digests and names that sites give: 3f2a9c…, u=1234,5678&fm=26, OIP-C.
_OF_SITES = re.compile(
    r"(?=[0-9a-f\-]*\d)[0-9a-f]{8,}(?:-[0-9a-f]{4,})*|u=[\d,&a-z=._]+|timg|OIP(?:-C)?|OIF(?:-C)?|th", re.IGNORECASE
)


class Cleaned(NamedTuple):
    """What is left of a text, "" if nothing is, and which kinds of things were taken off it."""

    text: str
    kinds: frozenset[Kind]


@dataclass(frozen=True)
class Naming:
    """Whose name carries the text of a picture, and whether it is cleaned."""

    text_from: TextFrom = "name"
    clean: bool = False


def caption_of(file_name: str) -> str:
    """`0001妙蛙种子.png` -> 妙蛙种子: no ending, no leading digits, blanks, `_`, `-`; "" if nothing is left."""
    return _without_counter(PurePosixPath(file_name).stem)


def stems_of(folder: str, file_name: str, text_from: TextFrom) -> tuple[str, ...]:
    """The names that carry the text of a picture, without ending. folder: of its folder, "" for none."""
    own = PurePosixPath(file_name).stem
    return {"name": (own,), "folder": (folder,), "both": (folder, own)}[text_from]


def caption(stems: Sequence[str], *, clean: bool) -> str:
    """The text of a picture of the names that carry it; "" if they carry none.

    Cleaning that leaves nothing is not done: `IMG_2002` stays so, but is left out beside the text of a folder.
        caption(("红色托特包", "背面2"), clean=True) == "红色托特包 背面"
    """
    return (clean and cleaned_caption(stems).text) or _joined([_without_counter(stem) for stem in stems])


def cleaned_caption(stems: Sequence[str]) -> Cleaned:
    """The text of the names as `cleaned` leaves them, and what it took off any of them."""
    parts = [cleaned(stem) for stem in stems]
    return Cleaned(_joined([part.text for part in parts]), frozenset().union(*(part.kinds for part in parts)))


def _joined(texts: Sequence[str]) -> str:
    """The texts that are not empty; only the last where it begins with the one before, as 猫 and 猫在睡觉 do."""
    kept = [text for text in texts if text]
    if len(kept) == 2 and kept[1].startswith(kept[0]):
        del kept[0]
    return " ".join(kept)


def _without_counter(stem: str) -> str:
    return _LEADING_COUNTER.sub("", unicodedata.normalize("NFC", stem)).strip()


def cleaned(stem: str) -> Cleaned:
    """A name without its ending, or a text made of one, without what cameras, copies, dates and counters put there.

    cleaned("IMG_2002_大猩猩").text == "大猩猩"
    cleaned("狼 - 副本 (2)").text == "狼"
    cleaned("iPhone 15").text == "iPhone 15"    # numbers belong to Latin words more often than not
    """
    text, kinds = unicodedata.normalize("NFC", stem).strip(), set[Kind]()
    if not _SUSPECT.search(_LEADING_COUNTER.sub("", text)):  # 50 times as fast, and true of most names
        return Cleaned(_EDGES.sub("", _LEADING_COUNTER.sub("", text)), frozenset())
    while True:
        before = text
        for kind, pattern in _PATTERNS:
            shorter = _EDGES.sub("", pattern.sub("", text, count=1))
            if len(shorter) < len(_EDGES.sub("", text)):
                if shorter != _without_counter(text):  # that goes from every name
                    kinds.add(kind)
                text = shorter
        text = _EDGES.sub("", _LEADING_COUNTER.sub("", text))
        if text == before:
            break
    if _OF_SITES.fullmatch(text):
        return Cleaned("", frozenset({*kinds, "camera"}))
    return Cleaned(text, frozenset(kinds))


def says_something(text: str) -> bool:
    """Whether a text has a letter or a digit, or else a sign that the model knows; of emoji it knows few."""
    kinds = [unicodedata.category(one)[0] for one in text]
    signs = [one for one, kind in zip(text, kinds, strict=True) if kind == "S"]
    return any(kind in "LN" for kind in kinds) or not _known_signs().isdisjoint(signs)


@cache
def _known_signs() -> frozenset[str]:
    return frozenset(word for word in vocab() if len(word) == 1 and unicodedata.category(word)[0] == "S")
