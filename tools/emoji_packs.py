"""The emoji packages the tools draw from: where they come from, their licences, and how a drawing is found in each."""

import base64
import hashlib
import json
import re
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cn_clip.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SIDE = 64  # pixels
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
class Pack:
    """One npm package of a fixed version. `integrity` is the registry's SHA-512 of the archive, base64."""

    package: str
    version: str
    integrity: str
    licence: str
    kind: Literal["datasource", "code points", "iconify", "names"]
    where: str = ""
    """datasource: the vendor's folder; code points: a pattern of the files' paths, group 1 the code points"""

    @property
    def archive(self) -> str:
        """The file name `npm pack` gives it."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


NAMES = Pack(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
    "names",
)
PACKS = {
    "noto": Pack(
        "emoji-datasource-google",
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "Apache-2.0",
        "datasource",
        "google",
    ),
    "twemoji": Pack(
        "emoji-datasource-twitter",
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "CC-BY-4.0",
        "datasource",
        "twitter",
    ),
    "noto-2017": Pack(
        "emoji-datasource-google",
        "4.0.4",
        "sha512-5sz0aIeNJfta2F4E+PNdOc6bqHWt29vOYtFGBXWZQnrxuSQlLpddd04y9K+P6mHiTYZkMe8z5y0lDeYaODBKmA==",
        "Apache-2.0",
        "datasource",
        "google",
    ),
    "fluent-3d": Pack(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
        "code points",
        r"assets/([0-9a-f-]+)\.webp",
    ),
    "fluent-flat": Pack(
        "@lobehub/fluent-emoji-flat",
        "1.1.0",
        "sha512-lPYCg8+N56MIj+iOgeBeH6AF0tneXxJCvgi41rOTjAWpA5rU2WUcmU1fiIXouEe8GrSTarWCYLY2ML+rdLRHsg==",
        "MIT",
        "code points",
        r"assets/([0-9a-f-]+)\.svg",
    ),
    "fluent-modern": Pack(
        "@lobehub/fluent-emoji-modern",
        "1.0.0",
        "sha512-YdZEgLC/vh29uDEl440q3W2vN50FdUFarQoKUHH9Clzx61/wW6mImLJywVBMKQPa3+GL59j3NvOlTLhH4rxleA==",
        "MIT",
        "code points",
        r"assets/([0-9a-f-]+)\.svg",
    ),
    "fluent-high-contrast": Pack(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "MIT",
        "iconify",
    ),
    "emojione2": Pack(
        "emojione",
        "2.2.7",
        "sha512-Gbf8qysc34+TFUS5HPwOUY62v8gjLuPmfVTWUR/zirULSYUe/D3MrvYo0W5Y2gScF1YI7EBe5t81IbD8q144Ag==",
        "CC-BY-4.0",
        "code points",
        r"assets/png/([0-9a-f-]+)\.png",
    ),
    "fxemoji": Pack(
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "iconify",
    ),
    "streamline": Pack(
        "@iconify-json/streamline-emojis",
        "1.2.4",
        "sha512-iNr9T9XuZVTyQPJO8ZlLxBzPkpi7qMl+z1l0C31vpEMqhPMelth3n7CeWQYtixdetDPdI81yeG4ROqjWpYJE6A==",
        "CC-BY-4.0",
        "iconify",
    ),
    "openmoji": Pack(
        "openmoji",
        "17.0.0",
        "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
        "CC-BY-SA-4.0",
        "code points",
        r"color/svg/([0-9A-F-]+)\.svg",
    ),
}


def fetch(pack: Pack, cache: Path) -> Path:
    """The unpacked package in `cache`, downloaded with `npm pack` when it is not there yet.

    Raises DataError when the download fails or the archive is not the one with the pack's checksum.
    """
    target = cache / pack.archive.removesuffix(".tgz")
    if (target / "package").is_dir():
        return target / "package"
    archive = cache / pack.archive
    if not archive.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{pack.package}@{pack.version}", "--silent"]
        done = subprocess.run(command, cwd=cache, capture_output=True, text=True, encoding="utf-8")
        if done.returncode or not archive.is_file():
            raise DataError(f"{' '.join(command)} failed: {done.stderr.strip()}; put {pack.archive} into {cache}")
    digest = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if digest != pack.integrity:
        raise DataError(f"{archive}: expected {pack.integrity}, got {digest}; delete it and try again")
    partial = target.with_suffix(".partial")
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    partial.rename(target)
    return target / "package"


def join_key(codes: str) -> str:
    """Code points without the variation selector FE0F, which the packages write at different places."""
    return "-".join(code for code in codes.upper().split("-") if code != "FE0F")


def chinese_by_key(names: Path, language: str = "zh") -> dict[str, dict[str, Any]]:
    """The records of emojibase in one language by `join_key`; raises DataError when two share one."""
    path = names / language / "data.json"
    records: dict[str, dict[str, Any]] = {}
    for record in json.loads(path.read_text(encoding="utf-8")):
        if records.setdefault(join_key(record["hexcode"]), record) is not record:
            raise DataError(f"{path}: {record['hexcode']} stands twice")
    return records


def normal_name(label: str) -> str:
    """ "按键: 1" -> "按键：1", "O 型血" -> "O型血": Chinese names hold no spaces."""
    return label.replace(": ", "：").replace(" ", "")


def on_white(data: bytes) -> "Image.Image":
    """A drawing (SVG or any picture file) laid on white, RGB, SIDE pixels a side."""
    from PIL import Image

    if data.lstrip()[:5] in (b"<svg ", b"<?xml"):
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SIDE, height=SIDE))
    drawing = Image.open(BytesIO(data)).convert("RGBA")
    if drawing.size != (SIDE, SIDE):
        scale = SIDE / max(drawing.size)
        size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
        drawing = drawing.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    canvas.alpha_composite(drawing, ((SIDE - drawing.width) // 2, (SIDE - drawing.height) // 2))
    return canvas.convert("RGB")


def drawings(pack: Pack, folder: Path, english: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    """(join key, file bytes) of each drawing in an unpacked package; a key may come more than once.

    english: squeezed English names to join keys (`english_names`), for packages that name drawings in words.
    """
    if pack.kind == "datasource":
        for record in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
            if record[f"has_img_{pack.where}"]:
                path = folder / "img" / pack.where / str(SIDE) / record["image"]
                yield join_key(record["unified"]), path.read_bytes()
    elif pack.kind == "code points":
        for path in sorted(folder.rglob("*")):
            found = re.fullmatch(pack.where, path.relative_to(folder).as_posix())
            if found:
                yield join_key(found[1]), path.read_bytes()
    else:
        yield from _iconify(folder, english)


def _iconify(folder: Path, english: dict[str, str]) -> Iterator[tuple[str, bytes]]:
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    codes = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    keys = {name: join_key(code) for code, name in codes.items()}
    for name, icon in icons["icons"].items():
        key = keys.get(name) or english.get(squeezed(re.sub(r"-\d+$", "", name)))
        if key:
            width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
            body = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            yield key, body.replace("currentColor", "#000000").encode()


def squeezed(name: str) -> str:
    """Letters and digits alone, in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def english_names(names: Path, datasource: Path) -> dict[str, str]:
    """Squeezed English names (emojibase's labels, then Unicode's and the short names) to join keys."""
    pairs: list[tuple[str, str]] = [(record["label"], key) for key, record in chinese_by_key(names, "en").items()]
    records = json.loads((datasource / "emoji.json").read_text(encoding="utf-8"))
    pairs += [(record["name"], join_key(record["unified"])) for record in records if record["name"]]
    pairs += [(short, join_key(record["unified"])) for record in records for short in record["short_names"]]
    return _first_of_each((squeezed(name), key) for name, key in pairs)


def _first_of_each(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, key in pairs:
        found.setdefault(name, key)
    return found
