"""Checkpoints between the two packages: trained here and used there, trained there and resumed here; on the CPU.

python benchmarks/interchange.py --reference-python REFERENCE/bin/python
"""

import base64
import io
import re
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from deterministic import picture_bytes  # noqa: E402
from PIL import Image  # noqa: E402
from two_sides import Side, two_sides  # noqa: E402

from cn_clip import command  # noqa: E402
from cn_clip.clip.weights.checkpoint import read_checkpoint  # noqa: E402
from cn_clip.data.records import text_line  # noqa: E402
from cn_clip.features.files import read_features  # noqa: E402
from cn_clip.preprocess import build_lmdb_dataset  # noqa: E402

STEPS, BATCH = 2, 4
TOWERS = ["--vision-model=RN50", "--text-model=RBT3-chinese"]
FEATURE_FILES = {"valid_imgs.img_feat.jsonl": "image_id", "valid_texts.txt_feat.jsonl": "text_id"}
LOSS = re.compile(r"Global Steps: (\d+)/.* Loss: ([\d.]+)")

# Dropout draws other random numbers on the two sides; without it, the same weights and data give the same losses.
NO_DROPOUT = """
import torch
import torch.nn.functional as F
F.dropout = lambda input, *_, **__: input
_attend = F.scaled_dot_product_attention
def _without_dropout(query, key, value, attn_mask=None, dropout_p=0.0, *rest, **options):
    return _attend(query, key, value, attn_mask, 0.0, *rest, **options)
F.scaled_dot_product_attention = _without_dropout
"""
ENCODE = """
import sys
import numpy as np
import torch
from cn_clip.clip import load_from_name
path, output = sys.argv[1:]
towers = dict(vision_model_name="RN50", text_model_name="RBT3-chinese", input_resolution=224)
model, _ = load_from_name(path, device="cpu", **towers)
model.eval()
with torch.no_grad():
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows = model.encode_image(pixels), model.encode_text(torch.tensor([[101, 4344, 102, 0], [101, 4318, 1300, 102]]))
np.save(output, torch.cat(rows).float().numpy())
"""


@dataclass(frozen=True)
class Options:
    """Trains a few steps of RN50@RBT3-chinese from random weights on either side and crosses the checkpoints over."""

    reference_python: str
    """The interpreter of an environment that has cn_clip 1.6.0."""
    tolerance: float = 1e-4
    """Largest relative difference of features, and of the first loss after resuming."""
    json: bool = False
    """Print the numbers as one JSON object instead of lines."""


def run(options: Options) -> int:
    """Returns 1 when features or the first resumed loss differ by more than the tolerance."""
    say = command.Speaker(quiet=options.json)
    say(f"RN50@RBT3-chinese, fp32, batch {BATCH}, CPU, torch {torch.__version__}; dropout off on both sides")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder)
        (folder / "sitecustomize.py").write_text(NO_DROPOUT, encoding="utf-8")
        sides = two_sides(options.reference_python, PYTHONPATH=str(folder), **alone())
        results = {side.name: cross(side, sides, folder, say) for side in sides[::-1]}
    say.result(results)
    names = ("features", "first_loss", "load_from_name_of_rounded")
    worst = max(result[name] for result in results.values() for name in names)
    say(f"Largest of the compared differences: {worst:.1e} (allowed: {options.tolerance:.0e})")
    return 0 if worst <= options.tolerance else 1


def alone() -> dict[str, str]:
    """What torchrun would set for one process; only the reference asks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def write_dataset(folder: Path) -> None:
    """Made-up pictures with one sentence each, as train and valid."""
    images, texts = [], []
    for number in range(STEPS * BATCH):
        stream = io.BytesIO()
        Image.fromarray(picture_bytes(number)).save(stream, "PNG")
        images.append(f"{number}\t{base64.b64encode(stream.getvalue()).decode()}\n")
        texts.append(text_line(number, f"第{number}张图，有{'红绿蓝黄'[number % 4]}色的波纹", [number]))
    for split in ("train", "valid"):
        (folder / f"{split}_imgs.tsv").write_text("".join(images), encoding="utf-8")
        (folder / f"{split}_texts.jsonl").write_text("".join(texts), encoding="utf-8")
    with command.stdout_to_stderr(when=True):
        build_lmdb_dataset.main([f"--data_dir={folder}", "--splits=train,valid"])


def cross(author: Side, sides: tuple[Side, Side], folder: Path, say: command.Speaker) -> dict[str, Any]:
    """One side trains; both read the file, extract features and train on from it."""
    say(f"--- trained by {author.name}")
    losses = train(author, folder, f"{author.name}-start", STEPS)
    checkpoint = checkpoint_of(folder, f"{author.name}-start")
    say(f"losses {losses}")
    result: dict[str, Any] = {"losses": losses, "features": compare_features(checkpoint, sides, folder)}
    say(f"extract_features: largest relative difference {result['features']:.1e}")
    result |= compare_loading(checkpoint, sides, folder)
    say(f"load_from_name: largest relative difference {result['load_from_name']:.1e}")
    say(f"load_from_name of fp16-rounded weights: {result['load_from_name_of_rounded']:.1e}")
    resumed = {}
    for side in sides:
        name = f"{author.name}-to-{side.name}"
        resumed[side.name] = train(side, folder, name, 2 * STEPS, f"--resume={checkpoint}")
        say(f"resumed by {side.name}: losses {resumed[side.name]}")
    first, other = (losses[STEPS + 1] for losses in (resumed["reference"], resumed["ours"]))
    result |= {"resumed": resumed, "first_loss": abs(first - other) / first}
    result |= compare_training_state(*(checkpoint_of(folder, f"{author.name}-to-{side.name}") for side in sides))
    say(
        f"after resuming: first loss differs by {result['first_loss']:.1e} of itself; {STEPS} steps later weights by "
        f"{result['weights']:.1e} of their length, Adam's moments by {result['moments']:.1e} of theirs"
    )
    return result


def checkpoint_of(folder: Path, name: str) -> Path:
    return folder / "logs" / name / "checkpoints" / "epoch_latest.pt"


def train(side: Side, folder: Path, name: str, max_steps: int, *more: str) -> dict[int, float]:
    """The loss of every step of a run."""
    settings = [
        *("--train-data=lmdb/train", "--logs=logs", f"--name={name}", f"--batch-size={BATCH}", "--num-workers=0"),
        *(f"--max-steps={max_steps}", "--precision=fp32", "--log-interval=1", "--lr=1e-5", "--warmup=1"),
        *("--context-length=24", "--save-epoch-frequency=-1", *TOWERS, *more),
    ]
    side.run("training.main", settings if side.is_reference else [*settings, "--device=cpu"], folder)
    log = "".join(path.read_text(encoding="utf-8") for path in (folder / "logs" / name).glob("out_*.log"))
    if more and "optimizer state is restored" not in log:
        raise RuntimeError(f"{name}: the log does not say that the optimizer state was restored")
    return {int(step): float(loss) for step, loss in LOSS.findall(log)}


def compare_features(checkpoint: Path, sides: tuple[Side, Side], folder: Path) -> float:
    flags = ["--extract-image-feats", "--extract-text-feats", "--image-data=lmdb/valid/imgs", f"--resume={checkpoint}"]
    found = []
    for side in sides:
        own = ["--text-data=valid_texts.jsonl", "--precision=fp32", *([] if side.is_reference else ["--device=cpu"])]
        side.run("eval.extract_features", [*flags, *own, *TOWERS], folder)
        found.append([read_features(folder / name, field) for name, field in FEATURE_FILES.items()])  # type: ignore
    pairs = list(zip(*found, strict=True))
    assert all(one.ids == other.ids for one, other in pairs)
    return max(float(np.linalg.norm(one.vectors - other.vectors, axis=1).max()) for one, other in pairs)


def compare_loading(checkpoint: Path, sides: tuple[Side, Side], folder: Path) -> dict[str, float]:
    """The reference's load_from_name rounds weights to float16, ours does not: compared as they are, and rounded."""
    rounded = folder / "rounded.pt"
    running = ("running_mean", "running_var")
    state = {
        f"module.{name}": value.half().float() if value.is_floating_point() and not name.endswith(running) else value
        for name, value in read_checkpoint(checkpoint).state_dict.items()
    }
    torch.save({"epoch": 0, "step": 0, "name": "rounded", "state_dict": state}, rounded)
    differences = {}
    for name, path in (("load_from_name", checkpoint), ("load_from_name_of_rounded", rounded)):
        rows = []
        for side in sides:
            side.run_code(ENCODE, [str(path), "rows.npy"], folder)
            rows.append(np.load(folder / "rows.npy"))
        error = np.linalg.norm(rows[0] - rows[1], axis=1) / np.linalg.norm(rows[0], axis=1)
        differences[name] = float(error.max())
    return differences


def compare_training_state(theirs: Path, ours: Path) -> dict[str, float]:
    """How far weights and Adam's moments of two runs from the same file lie apart."""
    one, other = read_checkpoint(theirs), read_checkpoint(ours)
    assert one.step == other.step
    assert list(one.state_dict) == list(other.state_dict)
    assert one.optimizer is not None
    assert other.optimizer is not None
    groups = [[group["params"] for group in run.optimizer["param_groups"]] for run in (one, other)]
    assert groups[0] == groups[1]
    names = [name for name, value in one.state_dict.items() if value.is_floating_point()]
    states = one.optimizer["state"], other.optimizer["state"]
    return {
        "weights": relative([run.state_dict[name] for name in names] for run in (one, other)),
        "moments": relative([state[number]["exp_avg"] for number in states[0]] for state in states),
    }


def relative(tensors: Any) -> float:
    """Length of the difference of two lists of tensors, as a share of the first's."""
    one, other = tensors
    squares = [(float((a - b).square().sum()), float(a.square().sum())) for a, b in zip(one, other, strict=True)]
    return float((sum(square for square, _ in squares) / sum(square for _, square in squares)) ** 0.5)


if __name__ == "__main__":
    command.execute(run, Options)
