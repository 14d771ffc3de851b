"""What the captions of a dataset look like before it is written: samples, the commonest, and what nobody meant."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol, TypeAlias

from cn_clip import terminal
from cn_clip.clip.tokenizer import CONTEXT_LENGTH, encode
from cn_clip.data.names import Kind, Naming, caption, cleaned_caption
from cn_clip.language import both
from cn_clip.terminal import counted

WarningKind: TypeAlias = Literal[Kind, "bare", "repeated", "long", "no Chinese", "few"]

NUM_SAMPLES = 10
NUM_COMMONEST = 5
# Captions that several pictures have are told from this share of the pictures on, or when one caption has so many.
REPEATED_SHARE = 0.1
MOST_REPEATED = 10
# Of a text on the screen.
_SHOWN_CHARACTERS = 60
_HAN_BEGINS = "\u3400"


class Captioned(Protocol):
    """A picture: its name below its folder, its captions, and the names that they were made of, none for a table."""

    @property
    def name(self) -> str: ...

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def stems(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Doubt:
    """Something about captions that people rarely mean; message: a sentence with the next step, for people."""

    kind: WarningKind
    num_pictures: int
    example: str
    message: str

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"kind": self.kind, "images": self.num_pictures, "example": self.example, "message": self.message}


@dataclass(frozen=True)
class Review:
    """samples: (name of a picture, one of its captions), spread evenly. commonest: (caption, how many pictures)."""

    num_pictures: int
    samples: list[tuple[str, str]]
    commonest: list[tuple[str, int]]
    doubts: list[Doubt] = field(default_factory=list)

    def tell(self, tell: Callable[[str], None]) -> None:
        """Prints it."""
        total, count = self.num_pictures, len(self.samples)
        tell(both(f"{total:,} 张图片，其中 {count} 张的文本：", f"{total:,} pictures; captions of {count}:"))
        for line in terminal.align([(f"  {short(name)}", short(text)) for name, text in self.samples]):
            tell(line)
        if self.commonest and self.commonest[0][1] > 1:
            tell(both("最常见的文本（图片张数）：", "The most common captions (number of pictures):"))
            rows = [(f"  {num}", short(text)) for text, num in self.commonest]
            for line in terminal.align(rows, right=frozenset({0})):
                tell(line)
        else:
            tell(both("没有重复的文本", "No caption is repeated"))
        for doubt in self.doubts:
            tell(both("注意：", "warning: ") + doubt.message)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "samples": [{"file": name, "text": text} for name, text in self.samples],
            "commonest": [{"text": text, "images": num} for text, num in self.commonest],
            "warnings": [doubt.as_dict() for doubt in self.doubts],
        }


def short(text: str) -> str:
    """One line for a screen: the start of a long text."""
    shown = terminal.shown(text[: _SHOWN_CHARACTERS + 1])
    return shown if len(text) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…"


def review(pictures: Sequence[Captioned], naming: Naming | None) -> Review:
    """naming: how the captions were made of names; None for those of a table."""
    last = len(pictures) - 1
    count = min(NUM_SAMPLES, len(pictures))
    numbers = [round(step * last / max(1, count - 1)) for step in range(count)]
    samples = [(pictures[number].name, pictures[number].captions[0]) for number in numbers]
    counts = Counter(text for picture in pictures for text in picture.captions)
    commonest = counts.most_common(NUM_COMMONEST)
    doubts = [
        *_few(pictures),
        *([] if naming is None else _of_names(pictures, naming)),
        *_repeated(pictures, counts, naming),
        *_lengths(pictures),
    ]
    if not any(doubt.kind == "bare" for doubt in doubts):
        doubts += _languages(pictures)
    return Review(len(pictures), samples, commonest, doubts)


def _few(pictures: Sequence[Captioned]) -> list[Doubt]:
    if len(pictures) > 1:
        return []
    message = both(
        "只有 1 张图片：训练和召回率都要拿图片互相比较，至少要有 2 张；请把更多图片放进文件夹",
        "only 1 picture: training and recall compare pictures with each other and need at least 2; add pictures",
    )
    return [Doubt("few", 1, pictures[0].name, message)]


def _of_names(pictures: Sequence[Captioned], naming: Naming) -> list[Doubt]:
    """What cameras, copies and counters put into the captions."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for picture in pictures:
        left = cleaned_caption(picture.stems)
        if not left.text:
            found["bare"].append((picture.captions[0], ""))
        elif not naming.clean and left.text != caption(picture.stems, clean=False):
            for kind in left.kinds:
                found[kind].append((picture.captions[0], left.text))
    what: dict[Kind, str] = {
        "camera": both("相机、截图或聊天软件起的名字", "a name given by a camera, a screenshot or a chat app"),
        "date": both("日期", "a date"),
        "copy": both("“副本”之类的字样", "a copy mark"),
        "counter": both("编号", "a counter"),
    }
    doubts = []
    for kind, words in what.items():
        if cases := found[kind]:
            before, after = map(short, cases[0])
            in_chinese = f"{len(cases)} 张图片的文本里有{words}，例如“{before}”；加 --clean-names 就得到“{after}”"
            contain = f"{counted(len(cases), 'caption')} {'contains' if len(cases) == 1 else 'contain'}"
            in_english = f"{contain} {words}, such as {before!r}; --clean-names turns that into {after!r}"
            doubts.append(Doubt(kind, len(cases), cases[0][0], both(in_chinese, in_english)))
    if bare := found["bare"]:
        count, example = len(bare), short(bare[0][0])
        in_chinese = f"{count} 张图片的名字没有说明内容，例如“{example}”；"
        in_english = f"{counted(count, 'name')} of pictures say nothing about the content, such as {example!r}; "
        if naming.clean:
            in_chinese += "清理后什么都不剩，因此保持原样；"
            in_english += "cleaning would leave nothing, so they stay as they are; "
        if naming.text_from != "folder" and any("/" in picture.name for picture in pictures):
            in_chinese += "请改名，或用文件夹的名字（--text-from folder），或改用表格（--table）"
            in_english += "rename them, use the names of the folders (--text-from folder), or give a table (--table)"
        else:
            in_chinese += "请改名，或改用表格（--table）"
            in_english += "rename them, or give a table (--table)"
        doubts.append(Doubt("bare", count, bare[0][0], both(in_chinese, in_english)))
    return doubts


def _repeated(pictures: Sequence[Captioned], counts: "Counter[str]", naming: Naming | None) -> list[Doubt]:
    """Captions that many pictures have: others count as wrong in training, and as found in recall."""
    repeated = [one for one in pictures if any(counts[text] > 1 for text in one.captions)]
    if not counts or not repeated:
        return []
    text, most = counts.most_common(1)[0]
    if len(repeated) < REPEATED_SHARE * len(pictures) and most < MOST_REPEATED:
        return []
    count, total = len(repeated), len(pictures)
    in_chinese = f"{total} 张图片里有 {count} 张与别的图片文本相同，最多的是“{short(text)}”（{most} 张）；"
    in_english = f"{count} of {total} pictures share their caption with another, most often {short(text)!r} ({most}); "
    folders = {PurePosixPath(one.name).parent for one in repeated if text in one.captions}
    if naming is not None and naming.text_from == "folder":
        in_chinese += "加上文件名就能区分：--text-from both"
        in_english += "--text-from both adds the file names"
    elif naming is not None and naming.text_from == "name" and 2 * len(folders) > most:
        in_chinese += "它们在不同的文件夹里，加上文件夹的名字就能区分：--text-from both"
        in_english += "they are in different folders: --text-from both puts the folder's name first"
    else:
        in_chinese += "训练时请用 cn-clip train --multi-positive，否则它们会互相被当作错误答案"
        in_english += "train with cn-clip train --multi-positive, or each counts as a wrong answer for the others"
    return [Doubt("repeated", count, text, both(in_chinese, in_english))]


def _lengths(pictures: Sequence[Captioned]) -> list[Doubt]:
    """A text is cut to what the model reads; one character is at most one token."""
    most = CONTEXT_LENGTH - 2
    candidates = [(one.name, text) for one in pictures for text in one.captions if len(text) > most]
    # Of a text without end, its start decides.
    too_long = [(name, text) for name, text in candidates if len(encode([text[: 20 * most]], 20 * most)[0]) - 2 > most]
    too_long = too_long or [one for one in candidates if len(one[1]) > 20 * most]
    if not too_long:
        return []
    name, text = max(too_long, key=lambda one: len(one[1]))
    count, length = len(too_long), len(text)
    message = both(
        f"{count} 条文本太长：模型只读前 {most} 个词元（约 {most} 个汉字），后面的会被截掉；最长的有 {length:,} 个字符"
        f"（{short(name)}）；请把要紧的写在前面",
        f"{counted(count, 'caption')} of more than the {most} tokens (about {most} Chinese characters) that the "
        f"model reads; the rest is cut off (the longest has {length:,} characters, {short(name)}); put what matters "
        "first",
    )
    return [Doubt("long", count, name, message)]


def _languages(pictures: Sequence[Captioned]) -> list[Doubt]:
    """The text tower was trained on Chinese."""
    firsts = [picture.captions[0] for picture in pictures]
    without = [text for text in firsts if max(text) < _HAN_BEGINS]
    if 2 * len(without) <= len(pictures):
        return []
    count, total, example = len(without), len(pictures), without[0]
    message = both(
        f"{total} 张图片里有 {count} 张的文本没有汉字（例如 {short(example)}）；模型是用中文训练的，请尽量用中文描述",
        f"{count} of {total} captions have no Chinese characters (such as {short(example)}); the model was trained on "
        "Chinese, so describe the pictures in Chinese where you can",
    )
    return [Doubt("no Chinese", count, example, message)]
