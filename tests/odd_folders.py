"""Folders and tables as people have them, and what `dataset from-folder` makes of each: `python tests/odd_folders.py`.

Prints the options, the captions, and what the command says; `CN_CLIP_LANG` chooses the language.
"""

import contextlib
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openpyxl
from PIL import Image

from cn_clip import terminal
from cn_clip.errors import CnClipError
from cn_clip.preprocess.dataset_from_folder import Options, run


def fill(folder: Path, *names: str, same: Mapping[str, str] | None = None) -> None:
    """Pictures of these names, each of its own colour; same: copies, by their names, of others."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (37 * number % 256, 40 + number, 200 - 3 * number)).save(
            path, "PNG" if path.suffix == ".png" else "JPEG"
        )
    for copy, first in (same or {}).items():
        (folder / copy).write_bytes((folder / first).read_bytes())


def copies(folder: Path) -> None:
    fill(folder, "狼.jpg", "熊猫.jpg", same={"狼 - 副本.jpg": "狼.jpg", "狼 - Copy (2).jpg": "狼.jpg"})


def counters(folder: Path) -> None:
    fill(folder, "仓鼠.jpg", "仓鼠2.jpg", "仓鼠 (3).jpg", "iPhone 15.jpg", "第3.jpg")


def cameras(folder: Path) -> None:
    fill(folder, "IMG_2002_大猩猩.jpg", "DSC_0012.jpg", "微信图片_20240102123456.jpg", "mmexport1700000000000.jpg")


def products(folder: Path) -> None:
    fill(folder, *(f"{colour}托特包/{side}.jpg" for colour in "红橙黄绿蓝" for side in ("正面", "背面")))


def album(folder: Path) -> None:
    fill(folder, *(f"{place}/IMG_{number:04}.jpg" for place in ("西湖", "长城") for number in range(1, 4)))


def downloads(folder: Path) -> None:
    fill(folder, "下载 (1).jpg", "u=1234,5678&fm=26.jpg", "3f2a9c0011aabbcc.jpg", "柴犬.jpg")


def one_picture(folder: Path) -> None:
    fill(folder, "橘猫.jpg")


def emoji_names(folder: Path) -> None:
    fill(folder, "😀.png", "🦒.png")


def number_names(folder: Path) -> None:
    fill(folder, "0001.jpg", "0002.jpg")


def no_header(folder: Path) -> None:
    fill(folder, "a.jpg", "b.jpg")
    (folder / "t.csv").write_text("a.jpg,一只橘猫\nb.jpg,两只柴犬\n", encoding="utf-8")


def rows_of_three(folder: Path) -> None:
    fill(folder, "a.jpg", "b.jpg")
    (folder / "t.csv").write_text("a.jpg,一只橘猫,动物\nb.jpg,两只柴犬,动物\n", encoding="utf-8")


def chinese_excel(folder: Path) -> None:
    """As Excel saves a CSV in China."""
    fill(folder, "a.jpg", "b.jpg")
    (folder / "t.csv").write_bytes("image;text\r\na.jpg;一只橘猫，在睡觉\r\nb.jpg;两只柴犬\r\n".encode("gb18030"))


def workbook(folder: Path) -> None:
    fill(folder, "a.jpg", "b.jpg")
    book = openpyxl.Workbook()
    for row in (("image", "text"), ("a.jpg", "一只橘猫"), (None, None), ("b.jpg", "两只柴犬")):
        book.active.append(row)
    book.save(folder / "t.xlsx")


def long_caption(folder: Path) -> None:
    fill(folder, "a.jpg", "b.jpg")
    (folder / "t.csv").write_text(f"image,text\na.jpg,{'很' * 9999}长\nb.jpg,两只柴犬\n", encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """A folder, made by `make`, and options of the command."""

    make: Callable[[Path], None]
    options: dict[str, Any] = field(default_factory=dict)
    table: str | None = None

    @property
    def name(self) -> str:
        """The folder and the options, as people would type them."""
        flags = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in self.options.items()
        ]
        return " ".join([self.make.__name__, *([f"--table {self.table}"] if self.table else []), *flags])


CLEAN = {"clean_names": True}
CASES = (
    Case(copies),
    Case(copies, CLEAN),
    Case(counters),
    Case(counters, CLEAN),
    Case(cameras),
    Case(cameras, CLEAN),
    Case(products),
    Case(products, {"text_from": "both"}),
    Case(products, {"text_from": "folder"}),
    Case(album, CLEAN),
    Case(album, {**CLEAN, "text_from": "both"}),
    Case(downloads, CLEAN),
    Case(one_picture),
    Case(emoji_names),
    Case(number_names),
    Case(no_header, table="t.csv"),
    Case(rows_of_three, table="t.csv"),
    Case(chinese_excel, table="t.csv"),
    Case(workbook, table="t.xlsx"),
    Case(long_caption, table="t.csv"),
)


@dataclass(frozen=True)
class Outcome:
    """captions: of all splits, with the number of pictures; told: what the command said; error: or why not."""

    captions: list[tuple[str, int]]
    told: list[str]
    error: str | None = None
    files: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """Of what was told, without samples and counts."""
        return [line for line in self.told if line.startswith(("注意：", "warning: ")) or ".csv:" in line]


def outcome(case: Case, place: Path) -> Outcome:
    """What the command makes of a case, below an empty folder."""
    folder, output = place / "in", place / "out"
    folder.mkdir()
    case.make(folder)
    given = {"table": str(folder / case.table)} if case.table else {}
    said = io.StringIO()
    error = None
    handler = logging.StreamHandler(said)
    logging.getLogger("cn_clip").addHandler(handler)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            run(Options(str(output), str(folder), splits="train,valid", split_ratio="0.8,0.2", **given, **case.options))
        except CnClipError as caught:
            error = terminal.told(caught).replace(str(place), "")
        finally:
            logging.getLogger("cn_clip").removeHandler(handler)
    files = sorted(output.glob("*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    captions: dict[str, int] = {}
    for record in records:
        captions[record["text"]] = captions.get(record["text"], 0) + len(record["image_ids"])
    told = [line.replace(f"{folder}/", "") for line in said.getvalue().splitlines() if "pictures/s" not in line]
    return Outcome(sorted(captions.items()), told, error, tuple(path.name for path in sorted(output.glob("*_*"))))


def main() -> None:
    """Prints all cases."""
    for number, case in enumerate(CASES, start=1):
        with tempfile.TemporaryDirectory() as place:
            found = outcome(case, Path(place))
        print(f"\n{number}. {case.name}")
        texts = [text if len(text) <= 40 else f"{text[:40]}… ({len(text)})" for text, _ in found.captions]
        counts = [count for _, count in found.captions]
        listed = ", ".join(f"{text} ×{count}" if count > 1 else text for text, count in zip(texts, counts, strict=True))
        print(f"   captions: {listed or '-'}")
        for line in found.warnings:
            print(f"   {line}")
        if found.error:
            print(f"   error: {found.error}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
