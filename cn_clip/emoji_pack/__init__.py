"""The embedded pictures: emoji of two vendors with Chinese names and tags, for the demo, export checks and tests."""

import json
import zipfile
from dataclasses import dataclass
from functools import cache
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Literal, TypeAlias

Vendor: TypeAlias = Literal["noto", "twemoji"]


@dataclass(frozen=True)
class Emoji:
    """One picture, 64 x 64 pixels on white. `picture` holds the bytes of a WebP file; `group` is Chinese."""

    file: str
    emoji: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    picture: bytes

    @property
    def number(self) -> int:
        """The picture's id in the datasets, from 1."""
        return int(Path(self.file).stem)


@cache
def _read(vendor: Vendor) -> tuple[Emoji, ...]:
    data = resources.files("cn_clip.emoji_pack").joinpath(f"{vendor}_emoji.zip").read_bytes()
    with zipfile.ZipFile(BytesIO(data)) as archive:
        records = [json.loads(line) for line in archive.read("emoji.jsonl").splitlines()]
        return tuple(
            Emoji(**{**record, "tags": tuple(record["tags"])}, picture=archive.read(record["file"]))
            for record in records
        )


def load(vendor: Vendor = "noto") -> list[Emoji]:
    """The embedded pictures in Unicode's order: 1,631 of Noto or 1,610 of Twemoji, which Emoji-Tiny has not seen.

    Names are unique, and so are the pictures.
    """
    return list(_read(vendor))
