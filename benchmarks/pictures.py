"""Where the time goes from the bytes in an LMDB to pixels, and what decoding JPEGs at a fraction of their size changes:

python benchmarks/pictures.py --pictures FOLDER

With --shrink also what storing pictures smaller (cn-clip dataset build --shrink) changes in their features.
"""

import base64
import io
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import PIL  # noqa: E402
from PIL import Image, features  # noqa: E402

from cn_clip import command, terminal  # noqa: E402
from cn_clip.clip.encoder import Encoder  # noqa: E402
from cn_clip.clip.pictures import decode  # noqa: E402
from cn_clip.clip.transforms import STD, Decode, ImageTransform  # noqa: E402
from cn_clip.data.lmdb_store import IMAGES, ImageStore, SplitWriter  # noqa: E402
from cn_clip.data.pictures import LmdbPictures, batches, shrunk  # noqa: E402
from cn_clip.data.records import ImageRecord, decode_base64, read_image_records  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402

MODEL = "Emoji-Tiny"
BATCH_SIZE = 32
SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Options:
    """Microseconds of one core for each stage of a picture, decoded whole and faster, and how the results differ."""

    pictures: Path | None = None
    """A folder of JPEG files, looked through at any depth, or a *_imgs.tsv; left out, pictures are made up."""
    limit: int = 64
    """How many pictures to take, evenly spread over the folder, or to make up."""
    size: tuple[int, int] = (1600, 1200)
    """Width and height of pictures that are made up."""
    resolution: int = 224
    """Pixels a side that the pictures are scaled to."""
    runs: int = 5
    """How often each measurement is made; medians are reported."""
    decode: Decode = "fast"
    """What is set beside exact: fast, or auto as indexes have it."""
    enlarge: bool = False
    """Take the pictures at --size, as a phone's camera would have written them, with its grain."""
    shrink: int | None = None
    """Compare with pictures stored with a shorter side of so many pixels, too."""
    threads: int = 2
    """How many decoding threads to set beside one."""
    json: bool = False
    """Print one JSON object instead of the tables."""

    def __post_init__(self) -> None:
        for name in ("limit", "resolution", "runs", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: expected at least 1, got {getattr(self, name)}")


def run(options: Options) -> None:
    files = jpegs(options.pictures, options.limit) if options.pictures else made_up(options.limit, options.size)
    if options.enlarge:
        files = [enlarged(data, options.size, np.random.default_rng(number)) for number, data in enumerate(files)]
    decodes: tuple[Decode, Decode] = ("exact", options.decode)
    with tempfile.TemporaryDirectory() as folder:
        with SplitWriter(Path(folder) / "split") as writer:
            for number, data in enumerate(files):
                writer.put_image(number, base64.b64encode(data))
        images = Path(folder) / "split" / IMAGES
        stages = {how: measure_stages(images, ImageTransform(options.resolution, how), options) for how in decodes}
        whole = {how: measure_whole(images, ImageTransform(options.resolution, how), options) for how in decodes}
        answer = {
            "machine": machine(),
            "pictures": describe(files),
            "resolution": options.resolution,
            "runs": options.runs,
            "stages_us": stages,
            "whole_us": {how: whole[how]["cpu_us"] for how in decodes},
            "fast_speedup": whole["exact"]["cpu_us"] / whole[options.decode]["cpu_us"],
            "threads": options.threads,
            "thread_speedup": {how: whole[how]["thread_speedup"] for how in decodes},
            "difference": pixel_difference(images, options.resolution, decodes)
            | feature_difference(files, options.decode),
            "shrunk": None if options.shrink is None else shrunk_difference(files, options.shrink),
        }
    say = command.Speaker(quiet=options.json)
    say(report(answer))
    say.result(answer)


def jpegs(folder: Path, limit: int) -> list[bytes]:
    """The bytes of files spread evenly over the folder or tsv; raises ConfigError when it holds no JPEG."""
    if folder.is_file():
        records = [one for one in read_image_records(folder) if isinstance(one, ImageRecord)]
        count = min(limit, len(records))
        return [decode_base64(records[len(records) * number // count].base64) for number in range(count)]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError(f"{folder}: holds no file ending in {' or '.join(SUFFIXES)}")
    count = min(limit, len(found))
    return [found[len(found) * number // count].read_bytes() for number in range(count)]


def made_up(count: int, size: tuple[int, int]) -> list[bytes]:
    """JPEGs of coloured clouds, edges and grain, about as hard to compress as photos."""
    return [clouds(np.random.default_rng(number), size) for number in range(count)]


def clouds(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = Image.fromarray(rng.integers(0, 256, (75, 100, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
    grain = rng.normal(0, 4, (size[1], size[0], 1))
    pixels = 0.75 * np.asarray(coarse) + 0.25 * np.asarray(fine) + grain
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def enlarged(data: bytes, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    """The picture at a phone's size, with the grain of its sensor."""
    with Image.open(io.BytesIO(data)) as image:
        large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    grain = rng.standard_normal((size[1], size[0], 1), dtype=np.float32) * 6
    stream = io.BytesIO()
    Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def measure_stages(images: Path, transform: ImageTransform, options: Options) -> dict[str, float]:
    """Microseconds of this thread's CPU time a picture, by stage."""
    store = ImageStore(images)
    size = (transform.resolution, transform.resolution)
    out = np.empty((3, *size), dtype=np.float32)
    steps: dict[str, Callable[[Any], Any]] = {
        "LMDB": store.base64,
        "base64": decode_base64,
        "decode": lambda data: decode(data, transform.draft_size),
        "resize": lambda image: image.resize(size, Image.Resampling.BICUBIC) if image.size != size else image,
        "normalise": lambda image: transform.array(image, out),
    }
    totals: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.runs):
        seconds = dict.fromkeys(steps, 0.0)
        for image_id in store.ids:
            value: Any = image_id
            for name, step in steps.items():
                started = time.thread_time()
                value = step(value)
                seconds[name] += time.thread_time() - started
        for name in steps:
            totals[name].append(seconds[name] / len(store) * 1e6)
    return {name: median(values) for name, values in totals.items()}


def measure_whole(images: Path, transform: ImageTransform, options: Options) -> dict[str, float]:
    """The path of the commands, in batches: CPU time a picture, and how much faster several threads are than one."""
    source = LmdbPictures(images)

    def seconds(num_threads: int, clock: Callable[[], float]) -> float:
        started = clock()
        for _ in batches(source, transform, BATCH_SIZE, num_threads):
            pass
        return clock() - started

    cpu = median(seconds(0, time.process_time) for _ in range(options.runs))
    one, several = (median(seconds(n, time.perf_counter) for _ in range(options.runs)) for n in (1, options.threads))
    return {"cpu_us": cpu / len(source) * 1e6, "thread_speedup": one / several}


def pixel_difference(images: Path, resolution: int, decodes: tuple[Decode, Decode]) -> dict[str, float]:
    """Between exact and faster pixels, in levels of 255."""
    largest, means = 0.0, []
    for exact, fast in zip(*(pixels(images, resolution, how) for how in decodes), strict=True):
        levels = np.abs(exact - fast) * np.array(STD)[:, None, None] * 255
        largest = max(largest, float(levels.max()))
        means += levels.mean(axis=(1, 2, 3)).tolist()
    return {"largest_levels": largest, "mean_levels": float(np.mean(means))}


def pixels(images: Path, resolution: int, how: Decode) -> Iterator[Any]:
    return (batch for _, batch in batches(LmdbPictures(images), ImageTransform(resolution, how), BATCH_SIZE, 0))


def feature_difference(files: list[bytes], how: Decode, others: list[bytes] | None = None) -> dict[str, float | str]:
    """Cosines between the features of each picture and of the other file of it, or of the same one decoded otherwise.

    They are of the embedded model at its own resolution, 64.
    """
    exact = Encoder(MODEL, device="cpu").encode_images(files)
    cosines = (exact * Encoder(MODEL, device="cpu", decode=how).encode_images(others or files)).sum(axis=1)
    return {"model": MODEL, "smallest_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}


def shrunk_difference(files: list[bytes], shrink: int) -> dict[str, Any]:
    """What is left of the bytes, and the cosines between features before and after."""
    smaller = [shrunk(data, shrink) for data in files]
    kept = sum(map(len, smaller)) / sum(map(len, files))
    return {"side": shrink, "kept_bytes": kept, **feature_difference(files, "exact", smaller)}


def describe(files: list[bytes]) -> dict[str, Any]:
    """How many, how large."""
    sizes = [Image.open(io.BytesIO(data)).size for data in files]
    width, height = (median(side) for side in zip(*sizes, strict=True))
    return {"count": len(files), "median_size": [width, height], "mean_kb": sum(map(len, files)) / len(files) / 1e3}


def machine() -> str:
    jpeg = features.version_feature("libjpeg_turbo")
    versions = f"Pillow {PIL.__version__} (libjpeg-turbo {jpeg}), NumPy {np.__version__}"
    return f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def report(answer: dict[str, Any]) -> str:
    """The tables for people."""
    stages, whole, difference, described = (answer[k] for k in ("stages_us", "whole_us", "difference", "pictures"))
    decodes = list(stages)
    rows = [["stage, us a picture", *decodes]]
    rows += [[name, *(f"{stages[how][name]:.0f}" for how in decodes)] for name in stages["exact"]]
    rows += [["sum", *(f"{sum(stages[how].values()):.0f}" for how in decodes)]]
    rows += [["all, in batches", *(f"{whole[how]:.0f}" for how in decodes)]]
    rows += [[f"{answer['threads']} threads : 1, wall", *(f"{answer['thread_speedup'][how]:.2f} x" for how in decodes)]]
    width, height = described["median_size"]
    return "\n".join(
        [
            answer["machine"],
            f"{described['count']} JPEGs, median {width:.0f} x {height:.0f}, mean {described['mean_kb']:.0f} kB, "
            f"to {answer['resolution']} pixels; CPU time, medians of {answer['runs']} runs",
            *terminal.align(rows, right=frozenset({1, 2})),
            f"{decodes[1]} is {answer['fast_speedup']:.2f} times as fast as exact",
            f"pixels differ by {difference['mean_levels']:.2f} levels of 255 on average, by "
            f"{difference['largest_levels']:.0f} at most",
            f"{difference['model']}: cosine of {decodes[1]} to exact features {difference['mean_cosine']:.5f} on "
            f"average, {difference['smallest_cosine']:.5f} at least",
            *([] if (small := answer["shrunk"]) is None else [shrunk_line(small)]),
        ]
    )


def shrunk_line(small: dict[str, Any]) -> str:
    return (
        f"--shrink {small['side']} keeps {small['kept_bytes']:.0%} of the bytes; cosine to the features before "
        f"{small['mean_cosine']:.5f} on average, {small['smallest_cosine']:.5f} at least"
    )


if __name__ == "__main__":
    command.execute(run, Options)
