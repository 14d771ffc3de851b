"""Inputs of the recordings in golden/pipeline; numpy and Pillow only, so that the reference's interpreter runs it too.

Weights of RN50@RBT3-chinese whose features point in all directions, so that neighbours have clear ranks:
features of random weights nearly coincide. Shifting the last bias of either tower by the mean feature of some pictures
and texts spreads them; the shifted biases are kept in golden/pipeline/centre.npz.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import deterministic
import numpy as np
from PIL import Image

GOLDEN = Path(__file__).parent / "golden" / "pipeline"
IMAGE_BIAS = "visual.attnpool.c_proj.bias"
TEXT_BIAS = "bert.encoder.layer.2.output.LayerNorm.bias"
VISION, TEXT = "RN50", "RBT3-chinese"
# Datasets of the recording: name -> (pictures, every how many of the picture and text features are kept).
PARTS = {"first": (100, 5, 25), "all": (1000, 25, 62)}


def state_dict(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """All tensors of the model, given names and shapes; float32, representable in float16."""
    centre = np.load(GOLDEN / "centre.npz")
    shifted = {name: centre[name].astype(np.float32) for name in (IMAGE_BIAS, TEXT_BIAS)}
    return {**deterministic.state_dict(shapes), **shifted}


ZEROSHOT_LABELS = ["海浪", "沙丘", "云"]
ZEROSHOT_TEMPLATES = ["一张{}的照片。", "{}", "我喜欢“{}”!"]


def write_zeroshot(folder: Path) -> None:
    """Three classes of four made-up pictures in `test/`, `label_cn.txt`, and an `index.json` that turns them round."""
    for number in range(12):
        path = folder / "test" / f"{number // 4:03d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(deterministic.picture_bytes(number)).save(path)
    (folder / "label_cn.txt").write_text("\n".join(ZEROSHOT_LABELS) + "\n", encoding="utf-8")
    (folder / "index.json").write_text(json.dumps(list(range(12))[::-1]))
