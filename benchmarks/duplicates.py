"""How many changed copies of photos `cn-clip index duplicates` finds, and how many other photos it takes for copies.

python benchmarks/duplicates.py --pictures valid_imgs.tsv --limit 500
"""

import base64
import contextlib
import io
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image, ImageEnhance  # noqa: E402

from cn_clip import cli, command  # noqa: E402
from cn_clip.index.copies import Copies  # noqa: E402
from cn_clip.retrieval.manifest import Manifest, ModelInfo  # noqa: E402
from cn_clip.retrieval.store import open_index  # noqa: E402
from cn_clip.retrieval.writer import NewItem, open_writer  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Prints the recall of each kind of copy, the wrong pairs, and the time for 20,000 random vectors."""

    pictures: str
    """A file of lines ID<tab>BASE64, as the datasets of Chinese-CLIP have them."""
    limit: int = 500
    """Photos."""
    model: str = "Emoji-Tiny"
    """The model of the index."""
    thumbnail_sizes: tuple[int, ...] = (512, 160)
    """Of the two folders; copies have the second."""
    items: int = 20_000
    """Items of the index that is timed."""


def saved(image: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    """The bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def cut(image: Image.Image, share: float) -> bytes:
    """Without that share of its width and height, half of it at each edge."""
    across, down = round(image.width * share / 2), round(image.height * share / 2)
    return saved(image.crop((across, down, image.width - across, image.height - down)), quality=90)


def scaled(image: Image.Image, share: float) -> bytes:
    """With that share of its width and height."""
    return saved(image.resize((round(image.width * share), round(image.height * share))), quality=85)


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG 30": lambda image: saved(image, quality=30),
    "JPEG 10": lambda image: saved(image, quality=10),
    "WebP 50": lambda image: saved(image, "WEBP", quality=50),
    "1/2": lambda image: scaled(image, 0.5),
    "1/4": lambda image: scaled(image, 0.25),
    "brighter 20 %": lambda image: saved(ImageEnhance.Brightness(image).enhance(1.2)),
    "grey": lambda image: saved(image.convert("L")),
    "cut 5 %": lambda image: cut(image, 0.05),
    "cut 10 %": lambda image: cut(image, 0.10),
    "mirrored": lambda image: saved(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}


def run(options: Options) -> None:
    """Measures."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        photos = root / "photos"
        with open(options.pictures, encoding="utf-8") as lines:
            for number, line in zip(range(options.limit), lines, strict=False):
                with Image.open(io.BytesIO(base64.b64decode(line.split("\t")[1]))) as image:
                    kinds = {"original": lambda one: saved(one, quality=92), **COPIES}
                    for kind, change in kinds.items():
                        path = photos / kind.replace("/", "-") / f"{number}.jpg"
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(change(image.convert("RGB")))
        with contextlib.redirect_stdout(sys.stderr):
            for kind, size in zip(("original", None), options.thumbnail_sizes, strict=True):
                for folder in [photos / kind] if kind else sorted(set(photos.iterdir()) - {photos / "original"}):
                    args = ["--id-prefix", f"{folder.name}/", "--thumbnail-size", str(size)]
                    verb = ["build", str(folder), "--output"] if kind else ["add"]
                    more = ["--model", options.model] if kind else args[:2]
                    source = [] if kind else [str(folder)]
                    cli.main(["index", *verb, str(root / "i"), *source, *more, *args[2:]])
        index = open_index(root / "i")
        for cosine, distance in ((0.9, 12), (0.9, 20), (0.9, 24), (0.8, 20), (0.95, 20), (0.98, 20), (0.0, 20)):
            found, wrong = Counter[str](), 0
            for group in Copies(index, cosine, distance).groups():
                ids = [str(member.id) for member in group.members]
                numbers = {one.rpartition("/")[2] for one in ids}
                wrong += len(numbers) - 1
                originals = {one for one in ids if "/" not in one}
                found.update(
                    one.rpartition("/")[0] for one in ids if "/" in one and one.rpartition("/")[2] in originals
                )
            recall = ", ".join(f"{kind} {found[kind.replace('/', '-')] / options.limit:.3f}" for kind in COPIES)
            print(f"cosine {cosine}, distance {distance}: wrong {wrong} of {options.limit}; recall: {recall}")
        _time(root / "timed", options.items)


def _time(folder: Path, count: int) -> None:
    """Of vectors as near to each other as those of photos are, a twentieth of them copies."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(count, 512)).astype(np.float32) + 1.2
    vectors[: count // 20] = vectors[-(count // 20) :] + 0.05
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    noise = [random.integers(0, 255, (6, 6, 3)).astype(np.uint8) for _ in range(200)]
    thumbnails = [saved(Image.fromarray(one).resize((512, 384))) for one in noise]
    with open_writer(folder, Manifest(ModelInfo("random", "r", 512))) as writer:
        writer.commit([NewItem(number, one, {}, thumbnails[number % 200]) for number, one in enumerate(vectors)])
    started = time.perf_counter()
    groups = len(list(Copies(open_index(folder), 0.9, 20).groups()))
    print(f"{count} items: {time.perf_counter() - started:.1f} s, {groups} groups, {os.cpu_count()} cores")


if __name__ == "__main__":
    command.execute(run, Options)
