"""How close an exported tower is to the float32 model: cosines and best matches on real pictures and captions."""

# N samples, D embedding

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cn_clip import emoji_pack
from cn_clip.clip import tokenizer
from cn_clip.clip.backends.base import ExportedBackend, Kind, Rows, Tower
from cn_clip.clip.pictures import open_picture
from cn_clip.clip.transforms import ImageTransform
from cn_clip.errors import CheckpointError

if TYPE_CHECKING:
    from cn_clip.clip.model import CLIP

NUM_SAMPLES = 32
# The smallest cosine to float32 that each form must reach.
TOLERANCES = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.99, "int8.openvino": 0.99}


@dataclass(frozen=True)
class Report:
    """Cosines between the rows of a file and of float32; agreement: the share of samples with the same best match."""

    path: str
    form: str
    smallest: float
    mean: float
    num_samples: int
    agreement: float | None = None

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f", top-1 {100 * self.agreement:.1f} %"
        return (
            f"{self.path}: 与 float32 的余弦 / cosine to float32: min {self.smallest:.6f}, mean {self.mean:.6f}"
            f"{agreement} ({self.num_samples} samples)"
        )


def samples(kind: Kind, resolution: int | None) -> Any:
    """Real inputs of a tower: pixels of embedded pictures, or token ids of their names and tags."""
    chosen = emoji_pack.load("noto")[:: 1600 // NUM_SAMPLES][:NUM_SAMPLES]
    if kind == "text":
        texts = ["，".join([one.name, *one.tags]) if number % 2 else one.name for number, one in enumerate(chosen)]
        rows = tokenizer.encode(texts)
        return tokenizer.pad(rows, max(map(len, rows)))
    assert resolution is not None
    transform = ImageTransform(resolution)
    return np.stack([transform.array(open_picture(one.picture, name=one.name)) for one in chosen])


def compare_with_model(model: "CLIP", kind: Kind, path: Path) -> Report:
    """A float32 file against the model it was made from."""
    from cn_clip.clip.backends.pytorch import TorchBackend

    backend = TorchBackend(model)
    inputs = samples(kind, model.resolution)
    expected = backend.encode_pixels(inputs) if kind == "image" else backend.encode_tokens(inputs)
    return _judged(path, "fp32", expected, _rows(_open(path, kind, "fp32"), kind, inputs))


def compare_files(base: Path, path: Path, kind: Kind, form: str) -> Report:
    """A file of lower precision against the float32 file it was made from."""
    tower = _open(base, kind, "fp32")
    inputs = samples(kind, tower.facts.resolution)
    return _judged(path, form, _rows(tower, kind, inputs), _rows(_open(path, kind, form), kind, inputs))


def _open(path: Path, kind: Kind, form: str) -> Tower:
    if form == "int8.openvino":
        from cn_clip.clip.backends.open_vino import OpenVinoTower

        return OpenVinoTower(path, kind, precision="int8")
    from cn_clip.clip.backends.onnx_runtime import OnnxTower

    return OnnxTower(path, kind, device="cpu")


def _rows(tower: Tower, kind: Kind, inputs: Any) -> Rows:
    if kind == "image":
        return ExportedBackend(tower, None).encode_pixels(inputs)
    return ExportedBackend(None, tower).encode_tokens(inputs)


def _judged(path: Path, form: str, expected: Rows, found: Rows) -> Report:
    cosines = (expected * found).sum(axis=1)
    report = Report(str(path), form, float(cosines.min()), float(cosines.mean()), len(cosines))
    if not report.smallest >= TOLERANCES[form]:  # also when it is NaN
        raise CheckpointError(
            f"{path}: differs from float32 by more than {form} may: smallest cosine {report.smallest:.6f}, "
            f"tolerance {TOLERANCES[form]}"
        )
    return report
