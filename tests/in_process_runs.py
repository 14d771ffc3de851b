"""Training of the small model on twelve emoji pictures inside the process of a test; for several test files."""

from pathlib import Path
from typing import Any

import torch
from dataset_files import tsv_line

from cn_clip.data.lmdb_store import Pair, SplitWriter
from cn_clip.demo import emoji
from cn_clip.training import building
from cn_clip.training.params import Options
from cn_clip.training.trainer import Trainer

NUM_PAIRS = 12
BATCH = 4
RATE = 1e-3
TOWERS: dict[str, Any] = {"vision_model": "ViT-Tiny-64", "text_model": "BERT-Tiny-chinese"}


def emoji_split(
    folder: Path, *, corrupt: int | None = None, same_text: bool = False, same_picture: bool = False
) -> Path:
    """An LMDB of twelve pictures, each with its name. corrupt: a picture that is none, by its place."""
    first = emoji.load()[0].number
    with SplitWriter(folder) as writer:
        for place, one in enumerate(emoji.load()[:NUM_PAIRS]):
            data = b"no picture" if place == corrupt else emoji.png(one)
            writer.put_image(one.number, tsv_line(one.number, data).split(b"\t")[1].strip())
            number = first if same_picture else one.number
            writer.put_pair(Pair(number, one.number, "表情" if same_text else one.name))
    return folder


def options(split: Path, logs: Path, **settings: Any) -> Options:
    """Small, quick and alone, unless the settings say something else."""
    alone: dict[str, Any] = {"num_workers": 0, "valid_num_workers": 0, "device": "cpu", "num_threads": 1}
    quick: dict[str, Any] = {"batch_size": BATCH, "valid_batch_size": BATCH, "warmup": 0, "lr": RATE, "log_interval": 1}
    data = {"train_data": str(split), "val_data": str(split), "logs": str(logs), "name": "x"}
    return Options(**{**data, **TOWERS, "precision": "fp32", **alone, **quick, **settings})


def run(split: Path, logs: Path, **settings: Any) -> str:
    """Trains as the command does and returns the log of this run alone; runs of one second share a file."""
    chosen = options(split, logs, **settings)
    before = {path: path.stat().st_size for path in (logs / chosen.name).glob("out_*.log")}
    building.run(chosen)
    latest = max((logs / chosen.name).glob("out_*.log"))
    return latest.read_bytes()[before.get(latest, 0) :].decode()


def build(split: Path, logs: Path, device: torch.device = torch.device("cpu"), **settings: Any) -> Trainer:  # noqa: B008
    """What the command builds before it trains."""
    return building.build_trainer(options(split, logs, device=device.type, **settings), device, logs)


def checkpoint(logs: Path, name: str = "x", file: str = "epoch_latest.pt") -> dict[str, Any]:
    """What a run has written."""
    content: dict[str, Any] = torch.load(logs / name / "checkpoints" / file, weights_only=True)
    return content
