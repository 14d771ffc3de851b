"""What merging tokens in the ViT towers gains and costs: processor time in turns, cosines, recall of a trained model.

Speed, of random weights, which take as long as trained ones:
    python benchmarks/token_merging.py --random ViT-B-16 --counts 0 8 12
Loss, of your own weights, on a split's tsv and jsonl files, or without --data on the embedded pictures:
    python benchmarks/token_merging.py --model MODEL --data FOLDER --counts 0 4 8 12
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import numpy as np  # noqa: E402
import trained  # noqa: E402

from cn_clip import command, emoji_pack, terminal  # noqa: E402
from cn_clip.clip import Encoder  # noqa: E402
from cn_clip.clip.backends.opening import open_backend  # noqa: E402
from cn_clip.clip.pictures import open_picture  # noqa: E402
from cn_clip.clip.transforms import ImageTransform  # noqa: E402
from cn_clip.deploy.model_arch import ArchName, vision_name  # noqa: E402
from cn_clip.deploy.towers import write_random  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402
from cn_clip.retrieval.recall import recall_from_features  # noqa: E402

MODES = tuple(f"{backend}:{precision}" for backend, precision in trained.MODES)


@dataclass(frozen=True)
class Options:
    """Give --random for speed, or --model for what it costs."""

    random: ArchName | None = None
    """An architecture"""
    model: str | None = None
    """Weights"""
    data: str | None = None
    """Folder with valid_imgs.tsv and valid_texts.jsonl; default: the embedded pictures of both vendors"""
    counts: tuple[int, ...] = (0, 4, 8, 12)
    """Tokens merged in each layer; the first is what the others are compared with"""
    modes: tuple[str, ...] = MODES
    """Backends and precisions, as torch:fp32"""
    batch_size: int = 4
    """Pictures of a timed batch"""
    rounds: int = 5
    """Batches of each count, in turns"""
    limit: int | None = None
    """Only so many of the embedded pictures of each vendor"""
    num_threads: int | None = None
    """Threads of the backend; default: one a core"""
    root: str = "token_merging"
    """Where random weights and exports are kept"""
    json: bool = False

    def __post_init__(self) -> None:
        if (self.random is None) == (self.model is None):
            raise ConfigError("give either --random, such as ViT-B-16, or --model")


def run(options: Options) -> None:
    """Prints one row a mode and count."""
    say = command.Speaker(quiet=options.json)
    rows: list[dict[str, Any]] = []
    for mode in options.modes:
        backend, _, precision = mode.partition(":")
        rows += (speeds if options.random else losses)(options, backend, precision)
    names = list(rows[0])
    lines = [[shown(row[name]) for name in names] for row in rows]
    for line in terminal.align([names, *lines], right=frozenset(range(1, len(names)))):
        say(line)
    say.result({"rows": rows})


def shown(value: object) -> str:
    """A cell."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def speeds(options: Options, backend: Any, precision: str) -> list[dict[str, Any]]:
    """Processor time of a batch of pictures, median, and how many times as fast it is as with the first count."""
    arch = vision_name(options.random or "ViT-B-16")
    weights = Path(options.root, f"{arch}.pt")
    write_random(weights, arch, "BERT-Tiny-chinese")
    towers = {"vision": arch, "text": "BERT-Tiny-chinese", "num_threads": options.num_threads}
    calls: dict[int, Callable[[], object]] = {}
    for count in options.counts:
        opened = open_backend(
            weights,
            backend=backend,
            precision=precision,
            device="cpu",
            download_root=options.root,
            kinds=["image"],
            merge_tokens=count,
            **towers,  # type: ignore[arg-type]
        )
        pixels = sample_pixels(opened.resolution, options.batch_size)
        calls[count] = lambda opened=opened, pixels=pixels: opened.encode_pixels(pixels)  # type: ignore[misc]
        calls[count]()
    seconds = {count: list[float]() for count in calls}
    for _ in range(options.rounds):
        for count, call in calls.items():
            start = time.process_time()
            call()
            seconds[count].append(time.process_time() - start)
    first = seconds[options.counts[0]]
    return [
        {
            "mode": f"{arch} {backend} {precision}",
            "merged": count,
            "ms a picture": 1e3 * float(np.median(found)) / options.batch_size,
            "times as fast": float(np.median(np.divide(first, found))),
        }
        for count, found in seconds.items()
    ]


def sample_pixels(resolution: int, count: int) -> Any:
    """Embedded pictures as pixels."""
    transform = ImageTransform(resolution)
    chosen = emoji_pack.load("noto")[:: 1600 // count][:count]
    return np.stack([transform.array(open_picture(one.picture, name=one.name)) for one in chosen])


def losses(options: Options, backend: Any, precision: str) -> list[dict[str, Any]]:
    """Recall of texts that find pictures, in percent, and cosines of pictures to those of the first count."""
    assert options.model is not None
    sets = (
        {"valid": trained.split(Path(options.data))}
        if options.data
        else {one: drawings(one, options.limit) for one in VENDORS}
    )
    rows = []
    for name, (pictures, texts, pairs) in sets.items():
        first = None
        for count in options.counts:
            encoder = Encoder(
                options.model,
                backend=backend,
                precision=precision,
                device="cpu",
                download_root=options.root,
                num_threads=options.num_threads,
                merge_tokens=count,
            )
            images_ND, texts_TD = encoder.encode_images(pictures), encoder.encode_texts(texts)
            first = images_ND if first is None else first
            found = recall_from_features(images_ND, texts_TD, pairs)[0].at
            cosines_N = (images_ND * first).sum(axis=1)
            rows.append(
                {"mode": f"{name} {backend} {precision}", "merged": count}
                | {f"R@{k}": 100 * share for k, share in found.items()}
                | {"cosine min": float(cosines_N.min()), "mean": float(cosines_N.mean())}
            )
    return rows


VENDORS: tuple[emoji_pack.Vendor, ...] = ("noto", "twemoji")


def drawings(vendor: emoji_pack.Vendor, limit: int | None) -> tuple[list[bytes], list[str], Any]:
    """Pictures, their names, and which belong together."""
    found = emoji_pack.load(vendor)[:limit]
    return [one.picture for one in found], [one.name for one in found], np.array([(n, n) for n in range(len(found))])


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
