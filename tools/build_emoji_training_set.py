"""Builds the dataset that the bundled model learns from: many vendors' emoji, Chinese captions, one vendor left out.

python tools/build_emoji_training_set.py --output FOLDER [--packs CACHE] [--vendors noto,fluent-3d] [--held-out twemoji]
"""

import base64
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from emoji_everyday import BEFORE, BEHIND, everyday_words
from emoji_packs import (
    GROUPS,
    NAMES,
    PACKS,
    SIDE,
    chinese_by_key,
    drawings,
    english_names,
    fetch,
    join_key,
    normal_name,
    on_white,
)

from cn_clip import command
from cn_clip.clip.templates import load_templates
from cn_clip.data.records import text_line
from cn_clip.errors import ConfigError
from cn_clip.files import atomic_write

if TYPE_CHECKING:
    from PIL import Image

# OpenMoji is left out of the weights: its licence asks that what is made of it is shared under the same licence.
VENDORS = "noto,noto-2017,fluent-3d,fluent-flat,fluent-modern,fluent-high-contrast,emojione2,fxemoji,streamline"
PHRASES = ("{}", "{}的图片", "一张{}", "我想要{}", "找{}", "有{}的画面", "{}！")
# Drawings whose mirror image means something else, or writes letters the wrong way round.
DIRECTED = re.compile(r"[左右东西南北]|点|箭头|\d|[A-Za-z]|符号|日文|音符|文字")
# What is told from its like by its colour keeps it, and has no use for drawings without one.
COLOURED = re.compile(r"[色红橙黄绿青蓝紫粉棕黑白金银]")
COLOURLESS_VENDORS = ("fluent-high-contrast",)
# The variations of a vendor are drawn from the stream of this name where it is another than the vendor's.
SEED_NAMES = {"noto-2017": "noto-blob"}


@dataclass(frozen=True)
class Options:
    """Writes {train,valid}_imgs.tsv and {train,valid}_texts.jsonl; needs resvg-py, and opencc for --synonyms."""

    output: Path
    """Folder of the dataset; made when absent"""
    packs: Path = Path("~/.cache/cn_clip/emoji-packs")
    """Folder that keeps the npm packages; what is missing is downloaded"""
    vendors: str = VENDORS
    """Vendors to learn from, comma-separated"""
    held_out: str = "twemoji"
    """Vendor of the valid split"""
    copies: int = 12
    """Pictures made of each drawing: itself, the others varied"""
    captions: int = 2
    """Captions of each of these pictures"""
    seed: int = 0
    """Seed of variations and captions"""
    everyday: bool = False
    """Captions as people speak: everyday words as tags too, and other words around them"""

    def __post_init__(self) -> None:
        for name in (*self.vendors.split(","), self.held_out):
            if name not in PACKS:
                raise ConfigError(f"unknown vendor {name!r}; expected some of {', '.join(PACKS)}")
        if self.held_out in self.vendors.split(","):
            raise ConfigError(f"--held-out {self.held_out}: is one of --vendors too; leave it out of one of them")
        if self.copies < 1 or self.captions < 1:
            raise ConfigError("--copies, --captions: expected at least 1")


@dataclass(frozen=True)
class Meaning:
    """What one emoji is called."""

    name: str
    tags: tuple[str, ...]
    group: str

    @property
    def is_directed(self) -> bool:
        """Whether its drawings must not be mirrored."""
        return self.group == "符号" or bool(DIRECTED.search(self.name + "".join(self.tags)))

    @property
    def is_coloured(self) -> bool:
        """Whether its name says a colour."""
        return bool(COLOURED.search(self.name))


def meanings(names: Path, datasource: Path, *, everyday: bool) -> dict[str, Meaning]:
    """The Chinese names and tags by join key of all emoji but flags, in Unicode's order.

    The tags of the traditional-Chinese records are added in simplified characters.
    """
    from opencc import OpenCC

    simplify = OpenCC("tw2sp").convert
    simplified, traditional = chinese_by_key(names), chinese_by_key(names, "zh-hant")
    found = {}
    sources = json.loads((datasource / "emoji.json").read_text(encoding="utf-8"))
    for source in sorted(sources, key=lambda source: int(source["sort_order"])):
        key = join_key(source["unified"])
        record = simplified.get(key)
        if source["category"] not in GROUPS or not record or not record.get("label"):
            continue
        other = traditional.get(key, {})
        name = normal_name(record["label"])
        more = [simplify(text) for text in [other.get("label", ""), *other.get("tags", ())]]
        tags = dict.fromkeys(normal_name(tag) for tag in [*record.get("tags", ()), *more])
        if everyday:
            tags |= dict.fromkeys(everyday_words([name, *tags]))
        found[key] = Meaning(name, tuple(tag for tag in tags if tag and tag != name), GROUPS[source["category"]])
    return found


def caption(meaning: Meaning, choice: random.Random) -> str:
    """A sentence somebody might look for the picture with: its name, tags, both, or a phrase about it."""
    templates = [*load_templates("emoji"), *PHRASES]
    draw = choice.random()
    if draw < 0.5 or not meaning.tags:
        return meaning.name
    if draw < 0.62:
        return choice.choice(templates).format(meaning.name)
    if draw < 0.76:
        return choice.choice(["", "，", " "]).join([meaning.name, choice.choice(meaning.tags)])
    if draw < 0.84:
        return choice.choice(templates).format(choice.choice(meaning.tags))
    return choice.choice(["", "、", " "]).join(choice.sample(meaning.tags, min(2, len(meaning.tags))))


def spoken(meaning: Meaning, choice: random.Random) -> str:
    """The name, a caption as above, or one or two of the emoji's words with others around them, as people speak."""
    draw = choice.random()
    if draw < 0.35:
        return meaning.name
    if draw < 0.5:
        return caption(meaning, choice)
    words = (meaning.name, *meaning.tags)
    core = choice.choice(["", "", " ", "，", "的"]).join(
        choice.sample(words, min(len(words), choice.choice([1, 1, 2])))
    )
    before = choice.choice(BEFORE) if choice.random() < 0.6 else ""
    behind = choice.choice(BEHIND) if choice.random() < 0.4 else ""
    return before + core + behind


def varied(picture: "Image.Image", meaning: Meaning, choice: random.Random) -> "Image.Image":
    """The drawing of another shape and colour, as another hand might draw it, meaning still the same."""
    picture = recoloured(reshaped(picture, choice), choice, keep_colour=meaning.is_coloured)
    if not meaning.is_directed and choice.random() < 0.5:
        from PIL import Image

        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture


def reshaped(picture: "Image.Image", choice: random.Random) -> "Image.Image":
    """The drawing turned, scaled, stretched, sheared and moved a little."""
    from PIL import Image

    scale, angle = choice.uniform(0.8, 1.25), choice.uniform(-15, 15)
    picture = picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")
    stretch, shear = choice.uniform(0.9, 1.1), choice.uniform(-0.12, 0.12)
    half = SIDE / 2
    across, along = half + choice.uniform(-4, 4), half + choice.uniform(-4, 4)
    a, b, e = scale * stretch, shear, scale / stretch
    matrix = (a, b, across - a * half - b * half, 0, e, along - e * half)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor="white")


def recoloured(picture: "Image.Image", choice: random.Random, *, keep_colour: bool) -> "Image.Image":
    """The drawing in other hues, stronger or weaker colours, darker or lighter (white stays white), or blurred."""
    from PIL import Image, ImageEnhance, ImageFilter

    if not keep_colour and choice.random() < 0.5:
        hue, saturation, value = picture.convert("HSV").split()
        shift = choice.randint(-18, 18)
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    grey = not keep_colour and choice.random() < 0.08
    picture = ImageEnhance.Color(picture).enhance(0 if grey else choice.uniform(0.6, 1.6))
    if choice.random() < 0.5:
        power = choice.uniform(0.6, 1.6)
        picture = picture.point([round(255 * (level / 255) ** power) for level in range(256)] * 3)
    if choice.random() < 0.15:
        picture = picture.filter(ImageFilter.GaussianBlur(choice.uniform(0.4, 1.2)))
    return picture


def webp(picture: "Image.Image") -> bytes:
    """The picture as a WebP file of high quality."""
    stream = BytesIO()
    picture.save(stream, "WEBP", quality=90, method=0)
    return stream.getvalue()


@dataclass
class Split:
    """Pictures and captions being gathered; equal captions share one text id."""

    pictures: list[bytes] = field(default_factory=list)
    texts: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, picture: bytes, captions: Sequence[str]) -> None:
        """Takes a picture; its id is its number, from 1."""
        self.pictures.append(picture)
        for text in dict.fromkeys(captions):
            self.texts[text].append(len(self.pictures))

    def write(self, folder: Path, split: str) -> None:
        """Writes the two files of the split."""
        with atomic_write(folder / f"{split}_imgs.tsv") as stream:
            stream.writelines(
                f"{number}\t{base64.b64encode(picture).decode()}\n" for number, picture in enumerate(self.pictures, 1)
            )
        with atomic_write(folder / f"{split}_texts.jsonl") as stream:
            for text_id, (text, image_ids) in enumerate(self.texts.items(), start=1):
                stream.write(text_line(text_id, text, image_ids))


def vendor_drawings(
    vendor: str, packs: Path, known: dict[str, Meaning], english: dict[str, str]
) -> Iterator[tuple[Meaning, "Image.Image"]]:
    """Each drawing of the vendor whose emoji has a meaning."""
    from tqdm import tqdm

    pack = PACKS[vendor]
    found = [(known[key], data) for key, data in drawings(pack, fetch(pack, packs), english) if key in known]
    for meaning, data in tqdm(found, desc=vendor):
        if not (meaning.is_coloured and vendor in COLOURLESS_VENDORS):
            yield meaning, on_white(data)


def training_split(options: Options, packs: Path, known: dict[str, Meaning], english: dict[str, str]) -> Split:
    """All drawings of the vendors to learn from, each in `copies` pictures."""
    split = Split()
    describe = spoken if options.everyday else caption
    for vendor in options.vendors.split(","):
        choice = random.Random(f"{options.seed} {SEED_NAMES.get(vendor, vendor)}")
        for meaning, drawing in vendor_drawings(vendor, packs, known, english):
            for copy in range(options.copies):
                picture = varied(drawing, meaning, choice) if copy else drawing
                split.add(webp(picture), [describe(meaning, choice) for _ in range(options.captions)])
        print(f"{vendor}: {len(split.pictures)} pictures so far")
    return split


def held_out_split(options: Options, packs: Path, known: dict[str, Meaning], english: dict[str, str]) -> Split:
    """The held-out vendor's drawings with their names; of equal drawings the one with the shortest name."""
    best: dict[bytes, tuple[Meaning, Image.Image]] = {}
    for meaning, drawing in vendor_drawings(options.held_out, packs, known, english):
        kept = best.setdefault(drawing.tobytes(), (meaning, drawing))
        if len(meaning.name) < len(kept[0].name):
            best[drawing.tobytes()] = (meaning, drawing)
    split = Split()
    for meaning, drawing in best.values():
        split.add(webp(drawing), [meaning.name])
    return split


def run(options: Options) -> int:
    """Writes the two splits and says how large they are."""
    packs = options.packs.expanduser()
    names, datasource = fetch(NAMES, packs), fetch(PACKS["noto"], packs)
    known, english = meanings(names, datasource, everyday=options.everyday), english_names(names, datasource)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, make in {"valid": held_out_split, "train": training_split}.items():
        split = make(options, packs, known, english)
        split.write(options.output, name)
        pairs = sum(map(len, split.texts.values()))
        print(f"{name}: {len(split.pictures)} pictures, {len(split.texts)} texts, {pairs} pairs")
    return 0


def main(args: Sequence[str] | None = None) -> None:
    """Runs the builder on the command line's options."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
