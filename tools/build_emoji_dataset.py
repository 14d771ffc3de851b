"""Builds an embedded emoji dataset from two npm packages; the same input gives the same bytes.

python tools/build_emoji_dataset.py [--vendor noto] [--packs CACHE | --pictures FOLDER --names FOLDER] [--output FILE]
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from emoji_packs import GROUPS, NAMES, PACKS, chinese_by_key, fetch, join_key, normal_name, on_white

from cn_clip import command
from cn_clip.errors import ConfigError, DataError
from cn_clip.files import atomic_write

_TEXTS = Path(__file__).parent / "emoji_dataset"
TEXTS = {"noto": _TEXTS, "twemoji": _TEXTS / "twemoji"}
OUTPUT = Path(__file__).parents[1] / "cn_clip" / "emoji_pack"


@dataclass(frozen=True)
class Options:
    """Settings of the builder; without the two folders the packages are fetched with `npm pack`."""

    vendor: Literal["noto", "twemoji"] = "noto"
    """whose drawings"""
    packs: Path = Path("~/.cache/cn_clip/emoji-packs")
    """folder that keeps the npm packages; what is missing is downloaded"""
    pictures: Path | None = None
    """unpacked npm package of the vendor's pictures (holds emoji.json)"""
    names: Path | None = None
    """unpacked npm package emojibase-data 17.0.0 (holds zh/data.json)"""
    output: Path | None = None
    """the archive to write; default: the one in cn_clip/demo"""

    def __post_init__(self) -> None:
        if (self.pictures is None) != (self.names is None):
            raise ConfigError("--pictures and --names: expected both folders or none")


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


def lossless(path: Path) -> tuple[bytes, bytes]:
    """The picture laid on white: (lossless WebP, RGB pixels)."""
    picture = on_white(path.read_bytes())
    stream = BytesIO()
    picture.save(stream, "WEBP", lossless=True, quality=100, method=6)
    return stream.getvalue(), picture.tobytes()


def entries(pictures: Path, names: Path, vendor: str) -> Iterator[Entry]:
    """All emoji that have a picture of the vendor, a Chinese name and one of the GROUPS, in Unicode's order."""
    from tqdm import tqdm

    chinese = chinese_by_key(names)
    sources = json.loads((pictures / "emoji.json").read_text(encoding="utf-8"))
    for source in tqdm(sorted(sources, key=lambda source: int(source["sort_order"])), desc="emoji"):
        record = chinese.get(join_key(source["unified"]))
        if source["category"] not in GROUPS or not source[f"has_img_{vendor}"] or not record or not record.get("label"):
            continue
        name = normal_name(record["label"])
        tags = tuple(tag for tag in record.get("tags", ()) if tag not in (name, record["label"]))
        picture, pixels = lossless(pictures / "img" / vendor / "64" / source["image"])
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


def legal_texts(pictures: Path, names: Path, vendor: str) -> dict[str, bytes]:
    """The notice and the licences, by file name."""
    texts = {path.name: path.read_bytes() for path in TEXTS[vendor].iterdir() if path.is_file()}
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


def run(options: Options) -> int:
    """Writes the archive and says what is in it."""
    packs, pack = options.packs.expanduser(), PACKS[options.vendor]
    pictures, names = options.pictures or fetch(pack, packs), options.names or fetch(NAMES, packs)
    output = options.output or OUTPUT / f"{options.vendor}_emoji.zip"
    found = list(entries(pictures, names, pack.where))
    kept = distinct(found)
    data = archive(kept, legal_texts(pictures, names, options.vendor))
    with atomic_write(output, "wb") as stream:
        stream.write(data)
    for entry in found:
        if entry not in kept:
            print(f"left out, same picture as another: {entry.name}")
    print(f"{output}: {len(kept)} pictures, {len(data)} bytes")
    return 0


def main(args: Sequence[str] | None = None) -> None:
    """Runs the builder on the command line's options."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
