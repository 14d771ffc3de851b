"""Builds the embedded emoji dataset from two npm packages; the same input gives the same bytes.

python tools/build_emoji_dataset.py [--pictures FOLDER --names FOLDER] [--output cn_clip/demo/noto_emoji.zip]
"""

import json
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from cn_clip import command
from cn_clip.errors import ConfigError, DataError
from cn_clip.jsonl import atomic_write

TEXTS = Path(__file__).parent / "emoji_dataset"
OUTPUT = Path(__file__).parents[1] / "cn_clip" / "demo" / "noto_emoji.zip"
PICTURES_PACKAGE = "emoji-datasource-google@16.0.0"
NAMES_PACKAGE = "emojibase-data@17.0.0"
# emojibase's own Chinese group names mix traditional and simplified characters.
GROUPS = {
    "Smileys & Emotion": "笑脸与情感",
    "People & Body": "人物与身体",
    "Animals & Nature": "动物与自然",
    "Food & Drink": "食物与饮料",
    "Travel & Places": "旅行与地点",
    "Activities": "活动",
    "Objects": "物品",
    "Symbols": "符号",
}


@dataclass(frozen=True)
class Options:
    """Settings of the builder; without the two folders the packages are fetched with `npm pack`."""

    pictures: Path | None = None
    """unpacked npm package emoji-datasource-google 16.0.0 (holds emoji.json)"""
    names: Path | None = None
    """unpacked npm package emojibase-data 17.0.0 (holds zh/data.json)"""
    output: Path = OUTPUT
    """the archive to write"""


@dataclass(frozen=True)
class Entry:
    """One picture with its texts; `pixels` are RGB rows, kept to find equal pictures."""

    emoji: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    picture: bytes
    pixels: bytes

    def record(self, file: str) -> dict[str, Any]:
        """The line of emoji.jsonl."""
        texts = {"file": file, "emoji": self.emoji, "name": self.name, "tags": list(self.tags)}
        return {**texts, "group": self.group, "subgroup": self.subgroup}


def join_key(codes: str) -> str:
    """Code points without the variation selector FE0F, which the two packages write at different places."""
    return "-".join(code for code in codes.upper().split("-") if code != "FE0F")


def chinese_by_key(folder: Path) -> dict[str, dict[str, Any]]:
    """The Chinese records of emojibase by `join_key`; raises DataError when two share one."""
    records: dict[str, dict[str, Any]] = {}
    for record in json.loads((folder / "zh" / "data.json").read_text(encoding="utf-8")):
        if records.setdefault(join_key(record["hexcode"]), record) is not record:
            raise DataError(f"{folder}/zh/data.json: {record['hexcode']} stands twice")
    return records


def on_white(path: Path) -> tuple[bytes, bytes]:
    """The picture laid on white: (lossless WebP, RGB pixels)."""
    from PIL import Image

    drawing = Image.open(path).convert("RGBA")
    canvas = Image.new("RGBA", drawing.size, "white")
    canvas.alpha_composite(drawing)
    picture = canvas.convert("RGB")
    stream = BytesIO()
    picture.save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue(), picture.tobytes()


def normal_name(label: str) -> str:
    """ "按键: 1" -> "按键：1", "O 型血" -> "O型血": Chinese names hold no spaces."""
    return label.replace(": ", "：").replace(" ", "")


def entries(pictures: Path, names: Path) -> Iterator[Entry]:
    """All emoji that have a Noto picture, a Chinese name and one of the GROUPS, in Unicode's order."""
    from tqdm import tqdm

    chinese = chinese_by_key(names)
    sources = json.loads((pictures / "emoji.json").read_text(encoding="utf-8"))
    for source in tqdm(sorted(sources, key=lambda source: int(source["sort_order"])), desc="emoji"):
        record = chinese.get(join_key(source["unified"]))
        if source["category"] not in GROUPS or not source["has_img_google"] or not record or not record.get("label"):
            continue
        name = normal_name(record["label"])
        tags = tuple(tag for tag in record.get("tags", ()) if tag not in (name, record["label"]))
        picture, pixels = on_white(pictures / "img" / "google" / "64" / source["image"])
        group = GROUPS[source["category"]]
        yield Entry(record["emoji"], name, tags, group, source["subcategory"], picture, pixels)


def distinct(found: Sequence[Entry]) -> list[Entry]:
    """One entry a picture, the one with the shortest name; raises DataError when two names are equal.

    A text query has one right answer only when no other name has the same picture.
    """
    best: dict[bytes, Entry] = {}
    for entry in found:
        kept = best.setdefault(entry.pixels, entry)
        if len(entry.name) < len(kept.name):
            best[entry.pixels] = entry
    kept_entries = [entry for entry in found if best[entry.pixels] is entry]
    if len({entry.name for entry in kept_entries}) < len(kept_entries):
        raise DataError("two pictures have the same name; give one of them another")
    return kept_entries


def legal_texts(pictures: Path, names: Path) -> dict[str, bytes]:
    """The notice and the four licences, by file name."""
    texts = {path.name: path.read_bytes() for path in TEXTS.iterdir()}
    texts["LICENSE-emoji-datasource.txt"] = (pictures / "LICENSE").read_bytes()
    texts["LICENSE-emojibase-data.txt"] = (names / "LICENSE").read_bytes()
    return texts


def archive(kept: Sequence[Entry], texts: dict[str, bytes]) -> bytes:
    """The zip file's bytes: fixed times and order, pictures stored as they are."""
    members = dict(sorted(texts.items()))
    files = [f"{number:04d}.webp" for number in range(1, len(kept) + 1)]
    lines = [json.dumps(entry.record(file), ensure_ascii=False) for file, entry in zip(files, kept, strict=True)]
    members["emoji.jsonl"] = ("\n".join(lines) + "\n").encode()
    members.update({file: entry.picture for file, entry in zip(files, kept, strict=True)})
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            method = zipfile.ZIP_STORED if name.endswith(".webp") else zipfile.ZIP_DEFLATED
            target.writestr(info, data, compress_type=method, compresslevel=9)
    return stream.getvalue()


def fetch(package: str, folder: Path) -> Path:
    """Downloads an npm package into `folder` and unpacks it; returns the unpacked folder."""
    done = subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"npm pack {package} failed: {done.stderr.strip()}; give --pictures and --names instead")
    target = folder / package.partition("@")[0]
    with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as tar:
        tar.extractall(target, filter="data")
    return target / "package"


def run(options: Options) -> int:
    """Writes the archive and says what is in it."""
    if (options.pictures is None) != (options.names is None):
        raise ConfigError("--pictures and --names: expected both folders or none")
    with tempfile.TemporaryDirectory() as name:
        if options.pictures is None:
            folder = Path(name)
            options = replace(options, pictures=fetch(PICTURES_PACKAGE, folder), names=fetch(NAMES_PACKAGE, folder))
        assert options.pictures is not None
        assert options.names is not None
        found = list(entries(options.pictures, options.names))
        kept = distinct(found)
        data = archive(kept, legal_texts(options.pictures, options.names))
    with atomic_write(options.output, "wb") as stream:
        stream.write(data)
    for entry in found:
        if entry not in kept:
            print(f"left out, same picture as another: {entry.name}")
    print(f"{options.output}: {len(kept)} pictures, {len(data)} bytes")
    return 0


def main(args: Sequence[str] | None = None) -> None:
    """Runs the builder on the command line's options."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
