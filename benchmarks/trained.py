"""What lower precision costs a trained model: cosines, best matches and recall beside float32 in PyTorch."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from cn_clip import command, emoji_pack, ranks, zoo  # noqa: E402
from cn_clip.clip import Encoder  # noqa: E402
from cn_clip.clip.backends.base import Rows  # noqa: E402
from cn_clip.clip.backends.names import BackendName  # noqa: E402
from cn_clip.clip.backends.opening import settle_precision  # noqa: E402
from cn_clip.data.records import decode_base64  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402
from cn_clip.retrieval.recall import recall_from_features  # noqa: E402

ALL_MODES: tuple[tuple[BackendName, str], ...] = (
    ("torch", "fp32"),
    ("torch", "bf16"),
    ("onnx", "fp32"),
    ("onnx", "int8"),
    ("openvino", "fp32"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)


def is_computed_here(backend: BackendName, precision: str) -> bool:
    """Whether this processor has the precision: bf16 that PyTorch would emulate is not one."""
    if (backend, precision) == ("torch", "bf16") and not ranks.cpu_has_bf16():
        return False
    try:
        settle_precision(backend, precision)
    except ConfigError:
        return False
    return True


MODES = tuple(mode for mode in ALL_MODES if is_computed_here(*mode))


def measure(model: str, data: Path, say: command.Speaker) -> list[dict[str, Any]]:
    """One row a backend and precision: recall in percent, its change, cosines, shares of equal best matches.

    `Emoji-Tiny` is measured on the Twemoji drawings it has not seen, a file on the valid split in `data`.
    """
    bundled = zoo.named(model) is not None
    pictures, texts, pairs = twemoji() if bundled else split(data)
    name = f"{model if bundled else Path(model).name} ({len(pictures):,} pictures, {len(texts):,} texts)"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        found = {mode: features(model, *mode, root, pictures, texts) for mode in MODES}
    exact_images, exact_texts = found[MODES[0]]
    exact_best = (exact_texts @ exact_images.T).argmax(axis=1)
    for (backend, precision), (images_ND, texts_TD) in found.items():
        shares = [100 * share for way in recall_from_features(images_ND, texts_TD, pairs) for share in way.at.values()]
        first = rows[0]["recall"] if rows else shares
        row = {
            "model": name,
            "mode": f"{backend} {precision}",
            "recall": shares,
            "recall_change": max((one - other for one, other in zip(shares, first, strict=True)), key=abs),
            "image_cosine_min": float((images_ND * exact_images).sum(axis=1).min()),
            "text_cosine_min": float((texts_TD * exact_texts).sum(axis=1).min()),
            "top1_agreement": float(((texts_TD @ images_ND.T).argmax(axis=1) == exact_best).mean()),
        }
        say(f"  {name} {row['mode']}: recall {', '.join(f'{share:.1f}' for share in shares)}")
        rows.append(row)
    return rows


def features(
    model: str, backend: BackendName, precision: str, root: str, pictures: list[bytes], texts: list[str]
) -> tuple[Rows, Rows]:
    device = None if backend == "openvino" else "cpu"
    encoder = Encoder(model, backend=backend, precision=precision, device=device, download_root=root)
    return encoder.encode_images(pictures), encoder.encode_texts(texts)


def twemoji() -> tuple[list[bytes], list[str], Any]:
    found = emoji_pack.load("twemoji")
    pairs = np.array([(number, number) for number in range(len(found))])
    return [one.picture for one in found], [one.name for one in found], pairs


def split(data: Path, name: str = "valid") -> tuple[list[bytes], list[str], Any]:
    """Pictures, texts, and (picture, text) pairs by number, of the files `name`_imgs.tsv and `name`_texts.jsonl."""
    lines = (data / f"{name}_imgs.tsv").read_text(encoding="utf-8").splitlines()
    ids = [int(line.split("\t")[0]) for line in lines]
    pictures = [decode_base64(line.split("\t")[1].encode()) for line in lines]
    records = [json.loads(line) for line in (data / f"{name}_texts.jsonl").read_text(encoding="utf-8").splitlines()]
    number_of = {image_id: number for number, image_id in enumerate(ids)}
    pairs = [(number_of[one], number) for number, record in enumerate(records) for one in record["image_ids"]]
    return pictures, [record["text"] for record in records], np.array(pairs)
