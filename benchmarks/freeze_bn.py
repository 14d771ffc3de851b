"""What the running statistics of batch normalisation do to a fine-tuning on few pictures, kept or not, on the CPU:

python benchmarks/freeze_bn.py                                                   # Emoji-Tiny, embedded pictures
python benchmarks/freeze_bn.py --data FLICKR8K_CN_FOLDER --models Emoji-Tiny RN50
"""

import base64
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from cn_clip import command, emoji_pack, zoo  # noqa: E402
from cn_clip.clip import Encoder  # noqa: E402
from cn_clip.clip.model import CLIP  # noqa: E402
from cn_clip.clip.transforms import image_transform  # noqa: E402
from cn_clip.data.lmdb_store import Pair as Numbered  # noqa: E402
from cn_clip.data.lmdb_store import SplitWriter  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402
from cn_clip.training import adapt, building, params  # noqa: E402
from cn_clip.training.monitor import METRICS, read_records  # noqa: E402

Pair = tuple[bytes, str]
# What a run is tried with: a rate at which weights stay as they are, and one with which the model learns.
STILL = 1e-12


@dataclass(frozen=True)
class Options:
    """Fine-tunes on few pictures without and with --freeze-bn; recall of unseen pictures before and after."""

    data: str | None = None
    """Folder with {train,valid}_imgs.tsv and _texts.jsonl; default: the embedded Twemoji drawings."""
    models: tuple[str, ...] = ("Emoji-Tiny",)
    """Emoji-Tiny, or RN50: random weights, statistics of 256 other pictures."""
    pictures: int = 300
    """Pictures to learn, one caption each."""
    unseen: int = 300
    """Other pictures to validate on."""
    batch_sizes: tuple[int, ...] = (8, 32)
    """Pairs in a batch."""
    rates: tuple[float, ...] = (STILL, 3e-4)
    """Learning rates."""
    augment: tuple[str, ...] = ("no", "yes")
    """Whether training pictures are varied (--use-augment)."""
    epochs: int = 3
    """Epochs of each run."""
    num_threads: int = 1
    """CPU threads."""
    json: bool = False
    """Print the numbers as one JSON object instead of a table."""

    def __post_init__(self) -> None:
        if min(self.pictures, self.unseen, self.epochs, *self.batch_sizes) < 1:
            raise ConfigError("--pictures, --unseen, --epochs, --batch-sizes: expected at least 1")
        if self.data is None and self.unseen > self.pictures:
            raise ConfigError(f"--unseen {self.unseen}: of the embedded pictures, at most --pictures")


def pairs_of(folder: Path, split: str) -> Iterator[Pair]:
    """The pictures of a split in the order of its file, each with its first caption."""
    texts: dict[str, str] = {}
    with open(folder / f"{split}_texts.jsonl", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            for image_id in row["image_ids"]:
                texts.setdefault(str(image_id), row["text"])
    with open(folder / f"{split}_imgs.tsv", encoding="utf-8") as lines:
        for line in lines:
            image_id, encoded = line.rstrip("\n").split("\t")
            yield base64.b64decode(encoded), texts[image_id]


def chosen(options: Options) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """What is learned, what is validated on, and 256 other pictures of the kind."""
    number = options.pictures
    if options.data is None:
        # In the order of the pack: one subject after the other, as narrow as the folders people have.
        drawn = [(one.picture, one.name) for one in emoji_pack.load("twemoji")]
        near, far = drawn[: 2 * number], drawn[2 * number :][:256]
        return near[::2], near[1::2][: options.unseen], far
    folder = Path(options.data)
    learned = list(islice(pairs_of(folder, "train"), number + 256))
    return learned[:number], list(islice(pairs_of(folder, "valid"), options.unseen)), learned[number:]


def write_splits(folder: Path, splits: dict[str, list[Pair]]) -> Path:
    """The LMDB of each split below `folder`, which is returned."""
    for split, pairs in splits.items():
        with SplitWriter(folder / split) as writer:
            for number, (picture, text) in enumerate(pairs, start=1):
                writer.put_image(number, base64.b64encode(picture))
                writer.put_pair(Numbered(number, number, text))
    return folder


def weights_of(model: str, others: list[Pair], folder: Path) -> tuple[str, str, str]:
    """First weights, picture tower and text tower."""
    if model in zoo.BUNDLED:
        return model, zoo.BUNDLED[model].vision, zoo.BUNDLED[model].text
    vision, text = "RN50", zoo.PUBLISHED["RN50"].text
    torch.manual_seed(0)
    network = CLIP.from_config(zoo.model_config(vision, text)).eval()
    for norm in adapt.norms(network):
        norm.momentum = None  # the mean over all batches
        norm.train()
    preprocess = image_transform(network.resolution)
    with torch.no_grad():
        for pairs in (others[start : start + 32] for start in range(0, len(others), 32)):
            network.encode_image(torch.stack([preprocess(Image.open(BytesIO(picture))) for picture, _ in pairs]))
    path = folder / "random_rn50.pt"
    torch.save({"state_dict": network.state_dict()}, path)
    return str(path), vision, text


def fine_tuned(settings: params.Options) -> dict[str, float]:
    """Trains; recall before and after in percent, and the steps."""
    building.run(settings)
    folder = Path(settings.logs) / settings.name
    records, _ = read_records(folder / METRICS)
    first, *_, last = (record for record in records if record["kind"] == "valid")
    found: dict[str, float] = {"steps": last["step"]}
    for at, record in (("before", first), ("after", last)):
        recalls = [record[f"{way}_mean_recall"] for way in ("text_to_image", "image_to_text")]
        found |= {f"r1_{at}": 100 * record["text_to_image_r1"], f"mean_{at}": 50 * sum(recalls)}
    return found


def measure(options: Options, root: Path, say: command.Speaker) -> list[dict[str, Any]]:
    """One row a run."""
    learned, unseen, others = chosen(options)
    data = write_splits(root / "lmdb", {"train": learned, "valid": unseen})
    pictures = [picture for picture, _ in unseen]
    rows: list[dict[str, Any]] = []
    for model in options.models:
        init, vision, text = weights_of(model, others, root)
        before_ND = Encoder(init, device="cpu").encode_images(pictures)
        for rate, augment, batch_size, keeps in product(
            options.rates, options.augment, options.batch_sizes, (False, True)
        ):
            settings = params.Options(
                train_data=str(data / "train"),
                val_data=str(data / "valid"),
                init=init,
                vision_model=vision,  # type: ignore[arg-type]
                text_model=text,  # type: ignore[arg-type]
                logs=str(root / "logs"),
                name=f"{model}_{rate:g}_{augment}_{batch_size}_{keeps}",
                batch_size=batch_size,
                valid_batch_size=min(32, options.unseen),
                lr=rate,
                warmup=5,
                wd=0.001,
                max_epochs=options.epochs,
                valid_epoch_interval=options.epochs,
                save_epoch_frequency=-1,
                use_augment=augment == "yes",
                freeze_bn=keeps,
                no_freeze_bn=not keeps,
                num_workers=0,
                valid_num_workers=0,
                num_threads=options.num_threads,
                device="cpu",
                precision="fp32",
            )
            row: dict[str, Any] = {"model": model, "lr": rate, "augment": augment, "batch": batch_size, "kept": keeps}
            row |= fine_tuned(settings)
            checkpoint = root / "logs" / settings.name / "checkpoints" / "epoch_latest.pt"
            after_ND = Encoder(checkpoint, device="cpu").encode_images(pictures)
            row["cosine"] = float((before_ND * after_ND).sum(axis=1).mean())
            checkpoint.unlink()
            rows.append(row)
            say.note(json.dumps(row))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | lr | augmented | batch | statistics | R@1 before → after | mean recall | cosine |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        kept = "kept" if row["kept"] else "moving"
        lines.append(
            f"| {row['model']} | {row['lr']:g} | {row['augment']} | {row['batch']} | {kept} | "
            f"{row['r1_before']:.1f} → {row['r1_after']:.1f} | {row['mean_before']:.1f} → {row['mean_after']:.1f} | "
            f"{row['cosine']:.4f} |"
        )
    return "\n".join(lines)


def run(options: Options) -> None:
    """Prints the table, or the rows as JSON."""
    say = command.Speaker(quiet=options.json)
    with tempfile.TemporaryDirectory() as root:
        rows = measure(options, Path(root), say)
    say.result({"rows": rows})
    say(table(rows))


if __name__ == "__main__":
    command.execute(run, Options)
