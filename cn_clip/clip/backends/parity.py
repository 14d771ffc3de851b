"""How close an exported tower is to the float32 model: cosines and best matches on real pictures and captions."""

# N samples, D embedding

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cn_clip import emoji_pack
from cn_clip.clip import tokenizer
from cn_clip.clip.backends.base import Backend, ExportedBackend, Inputs, Rows, Tower
from cn_clip.clip.backends.names import KINDS, Kind
from cn_clip.clip.backends.onnx_runtime import OnnxTower
from cn_clip.clip.backends.open_vino import OpenVinoTower
from cn_clip.clip.pictures import open_picture
from cn_clip.clip.tokenizer import ChineseTexts
from cn_clip.clip.transforms import ImageTransform
from cn_clip.errors import CheckpointError, NotFiniteError
from cn_clip.language import both, counted
from cn_clip.progress import working

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_SAMPLES = 32
BATCH_SIZE = 16
# The smallest cosine to float32 that each form must reach.
TOLERANCES = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.99, "int8.openvino": 0.99}


@dataclass(frozen=True)
class Samples:
    """Pictures and as many captions, that of a picture at its position. context_length: longest caption in tokens.

    prepared: how a model of another family has its inputs; default: as Chinese-CLIP.
    """

    pictures: "Sequence[Image]"
    captions: Sequence[str]
    context_length: int = tokenizer.CONTEXT_LENGTH
    prepared: Inputs | None = None

    def inputs(self, kind: Kind, resolution: int) -> Any:
        """What a tower takes: pixels (N, 3, R, R) or blocks of them, or token ids (N, L)."""
        if kind == "image":
            transform = self.prepared.pictures if self.prepared else ImageTransform(resolution)
            return np.stack([transform.array(picture) for picture in self.pictures])
        texts = self.prepared.texts if self.prepared else ChineseTexts(self.context_length)
        return texts.pad(texts.rows(self.captions))


@dataclass(frozen=True)
class Reference:
    """What exported towers are compared with: inputs, and their rows (N, D) in float32, of one kind or of both."""

    inputs: Mapping[Kind, Any]
    rows: Mapping[Kind, Rows]


@dataclass(frozen=True)
class Share:
    """How much of a tower is in int8: products with weights, of how many, and their part of the multiplications."""

    num_int8: int
    num_products: int
    work: float

    def __str__(self) -> str:
        counts = both(
            f"{self.num_products} 个乘法中 {self.num_int8} 个用 int8",
            f"{self.num_int8} of {self.num_products} products in int8",
        )
        if self.work >= 0.5:
            return counts
        work = f"{100 * self.work:.0f} %"
        return both(
            f"{counts}，占计算量的 {work}：大部分仍是 float32，快不了多少",
            f"{counts}, {work} of the work: most of it stays float32, so little is gained",
        )


@dataclass(frozen=True)
class Merging:
    """What merging tokens costs: cosines to the rows without it, and the share of equal best captions."""

    merge_tokens: int
    smallest: float
    mean: float
    agreement: float

    def __str__(self) -> str:
        ends = f"{self.smallest:.6f}", f"{self.mean:.6f}"
        return both(
            f"每层合并 {self.merge_tokens} 个 token，与不合并的余弦：最小 {ends[0]}，平均 {ends[1]}，"
            f"首选一致 {100 * self.agreement:.1f} %",
            f"merging {self.merge_tokens} tokens a layer: cosine to not merging: min {ends[0]}, mean {ends[1]}, "
            f"same top-1 {100 * self.agreement:.1f} %",
        )


@dataclass(frozen=True)
class Report:
    """Cosines of the rows of a file to those of float32.

    agreement: the share of pictures whose best caption among the samples is the same, where rows of the other tower
    were at hand. left_out, share: of an int8 form, products that lose too much in it, and what it holds. merging: of a
    float32 form that merges tokens; its cosines are to PyTorch, which merges them too.
    """

    path: Path
    form: str
    smallest: float
    mean: float
    num_samples: int
    agreement: float | None = None
    left_out: tuple[str, ...] = ()
    share: Share | None = None
    merging: Merging | None = None

    def __str__(self) -> str:
        agreement = "" if self.agreement is None else f"{100 * self.agreement:.1f} %"
        same = both(f"，首选一致 {agreement}", f", same top-1 {agreement}") if agreement else ""
        share = "" if self.share is None else both(f"，{self.share}", f", {self.share}")
        merging = "" if self.merging is None else both(f"；{self.merging}", f"; {self.merging}")
        return both(
            f"{self.path.name}: 与 float32 的余弦：最小 {self.smallest:.6f}，平均 {self.mean:.6f}{same}"
            f"（{self.num_samples} 个样本{share}）{merging}",
            f"{self.path.name}: cosine to float32: min {self.smallest:.6f}, mean {self.mean:.6f}{same} "
            f"({counted(self.num_samples, 'sample')}{share}){merging}",
        )


def embedded_samples(context_length: int = tokenizer.CONTEXT_LENGTH) -> Samples:
    """Embedded pictures with their names, or names and tags, as captions."""
    emoji = emoji_pack.load("noto")
    chosen = emoji[:: len(emoji) // NUM_SAMPLES][:NUM_SAMPLES]
    return Samples(
        [open_picture(one.picture, name=one.name) for one in chosen],
        ["，".join([one.name, *one.tags]) if number % 2 else one.name for number, one in enumerate(chosen)],
        context_length,
    )


def reference(backend: Backend, samples: Samples, kinds: Iterable[Kind] = KINDS) -> Reference:
    """The rows of float32 towers."""
    with working(both("计算 float32 的参照", "computing the reference in float32")):
        inputs = {kind: samples.inputs(kind, backend.resolution if kind == "image" else 0) for kind in kinds}
        return Reference(inputs, {kind: rows_by(backend, kind, inputs[kind]) for kind in inputs})


def file_reference(bases: Mapping[Kind, Path], samples: Samples) -> Reference:
    """The rows of float32 files; raises CheckpointError for one that cannot be opened."""
    towers = {kind: open_form(path, kind, "fp32") for kind, path in bases.items()}
    return reference(ExportedBackend(towers.get("image"), towers.get("text")), samples, towers)


def compare(
    expected: Reference,
    path: Path,
    kind: Kind,
    form: str,
    *,
    tolerance: float | None = None,
    left_out: Iterable[str] = (),
    share: Share | None = None,
) -> Report:
    """How close a file is; raises CheckpointError when its smallest cosine is below the tolerance of its form."""
    with working(both(f"与 float32 对照（{kind}, {form}）", f"comparing with float32 ({kind}, {form})")):
        rows = rows_of(open_form(path, kind, form), kind, expected)
    cosines_N = (rows * expected.rows[kind]).sum(axis=1)
    agreement = None
    if len(expected.rows) == len(KINDS):
        pairs = (expected.rows, {**expected.rows, kind: rows})
        best, found = ((both["image"] @ both["text"].T).argmax(axis=1) for both in pairs)
        agreement = float((best == found).mean())
    ends = float(cosines_N.min()), float(cosines_N.mean())
    report = Report(path, form, *ends, len(rows), agreement, tuple(left_out), share)
    least = TOLERANCES[form] if tolerance is None else tolerance
    if not report.smallest >= least:  # also when it is NaN
        raise CheckpointError(
            f"differs from float32 by more than {form} may: smallest cosine {report.smallest:.6f}, "
            f"tolerance {least}; use a higher precision for this model",
            at=path.name,
        )
    return report


def merging(whole: Reference, merged: Reference, merge_tokens: int) -> Merging:
    """What merging costs, by the rows of both towers without and with it."""
    cosines_N = (whole.rows["image"] * merged.rows["image"]).sum(axis=1)
    best, found = ((one.rows["image"] @ one.rows["text"].T).argmax(axis=1) for one in (whole, merged))
    return Merging(merge_tokens, float(cosines_N.min()), float(cosines_N.mean()), float((best == found).mean()))


def cosines(expected: Reference, path: Path, kind: Kind, form: str) -> NDArray[np.float32]:
    """Of each sample's row to its row in float32, (N,)."""
    rows = rows_of(open_form(path, kind, form), kind, expected)
    found: NDArray[np.float32] = (rows * expected.rows[kind]).sum(axis=1)
    return found


def open_form(path: Path, kind: Kind, form: str) -> Tower:
    """An exported file on this processor, in what it was made for."""
    if form == "int8.openvino":
        return OpenVinoTower(path, kind, precision="int8")
    return OnnxTower(path, kind, device="cpu")


def backend_of(tower: Tower, kind: Kind) -> ExportedBackend:
    """A backend of one tower."""
    return ExportedBackend(tower, None) if kind == "image" else ExportedBackend(None, tower)


def rows_of(tower: Tower, kind: Kind, expected: Reference) -> Rows:
    """What a tower gives for the inputs of a reference; NaN where it gives a row that is not finite."""
    try:
        return rows_by(backend_of(tower, kind), kind, expected.inputs[kind])
    except NotFiniteError:  # no closer to float32 than any row can be
        return np.full_like(expected.rows[kind], np.nan)


def smallest_cosine(backend: Backend, kind: Kind, expected: Reference) -> float:
    """Of the rows of a backend to those of a reference; -1 where a row is not finite."""
    try:
        rows = rows_by(backend, kind, expected.inputs[kind])
    except NotFiniteError:
        return -1.0
    return float((rows * expected.rows[kind]).sum(axis=1).min())


def rows_by(backend: Backend, kind: Kind, inputs: Any) -> Rows:
    """The rows of a backend for inputs of any number."""
    encode = backend.encode_pixels if kind == "image" else backend.encode_tokens
    return np.concatenate([encode(inputs[start : start + BATCH_SIZE]) for start in range(0, len(inputs), BATCH_SIZE)])
