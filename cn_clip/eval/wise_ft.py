"""Mixes zero-shot and fine-tuned weights (WiSE-FT) and measures recall along the line.

cn-clip wise-ft --zeroshot ViT-B-16 --finetuned epoch3.pt --val-data lmdb/valid --output best.pt
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from cn_clip import command, settings, terminal
from cn_clip.errors import ConfigError
from cn_clip.option_types import ContextLength, Device, Json, NumWorkers
from cn_clip.settings import Range
from cn_clip.zoo import CONTEXT_LENGTH

if TYPE_CHECKING:
    from torch import Tensor

    from cn_clip.clip.encoder import Encoder
    from cn_clip.clip.model import CLIP
    from cn_clip.clip.weights.checkpoint import Checkpoint
    from cn_clip.data.lmdb_store import Split
    from cn_clip.data.pictures import LmdbPictures
    from cn_clip.retrieval.recall import RecallBothWays

TENTHS = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"


# What does nothing when there is nothing to evaluate on.
RULES = [
    settings.needs(name, "val_data", refused=True)
    for name in ("alphas", "batch_size", "context_length", "num_workers", "precision")
]


@dataclass(frozen=True)
class Options:
    """Evaluates (1 - alpha) * zero-shot + alpha * fine-tuned weights for each alpha, and can write one of them.

    Fine-tuned models lose on data unlike that of the fine-tuning; a mixture often keeps the gain without the loss.
    Source: arXiv:2109.01903.
    """

    zeroshot: command.Required = None
    """The checkpoint fine-tuning started from, or the name of a published model: alpha 0"""
    finetuned: command.Required = None
    """The fine-tuned checkpoint, of the same architecture: alpha 1; adapters (LoRA) are merged"""
    val_data: command.Required = None
    """LMDB folder of the split to evaluate on; not needed with --alpha and --output"""
    alphas: str = TENTHS
    """Shares of the fine-tuned weights to evaluate, with commas between"""
    output: str | None = None
    """Checkpoint to write: the mixture of the best mean recall, or of --alpha"""
    alpha: float | None = None
    """Write this mixture instead of the best one"""
    vision_model: str | None = None
    """Picture tower; default: what the checkpoints hold"""
    text_model: str | None = None
    """Text tower; default: what the checkpoints hold"""
    batch_size: Annotated[int, Range(least=1)] = 64
    """Pictures, or texts, in a batch"""
    context_length: ContextLength = CONTEXT_LENGTH
    precision: Literal["amp", "auto", "fp16", "fp32", "bf16"] = "amp"
    """Arithmetic; amp is float32 here, as in the other evaluations. auto: the fastest close to it (cosine 0.999) that
    the device has"""
    num_workers: NumWorkers = 4
    device: Device = "auto"
    json: Json = False

    def __post_init__(self) -> None:
        for name in ("zeroshot", "finetuned"):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name}: expected a checkpoint file, or a model's name such as ViT-B-16")
        if self.alpha is not None and self.output is None:
            raise ConfigError("--alpha: chooses the mixture to write; add --output")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"--alpha: expected a value from 0 to 1, got {self.alpha}")
        if self.val_data is None and self.alpha is None:
            raise ConfigError("--val-data: expected the LMDB folder of a split, such as datasets/MUGE/lmdb/valid")
        settings.check(self, RULES)
        self.line()

    def line(self) -> list[float]:
        """The values of --alphas, sorted, each once; raises ConfigError for one outside [0, 1]."""
        try:
            values = sorted({float(value) for value in self.alphas.split(",")})
        except ValueError as error:
            raise ConfigError(f"--alphas: expected numbers with commas between, got {self.alphas!r}") from error
        if not all(0 <= value <= 1 for value in values):
            raise ConfigError(f"--alphas: expected values from 0 to 1, got {self.alphas!r}")
        return values


@dataclass(frozen=True)
class Point:
    """Recall of one mixture, in [0, 1]."""

    alpha: float
    recall: "RecallBothWays"

    def values(self) -> dict[str, float]:
        """One name each, for JSON; `mean_recall` is that of both directions."""
        return {"alpha": self.alpha, **self.recall.values(), "mean_recall": self.recall.mean}


def run(options: Options) -> None:
    """Evaluates, prints the table and writes the mixture; raises CheckpointError when the two models do not match."""
    from cn_clip.clip.weights.writing import refuse_inputs, write_checkpoint
    from cn_clip.files import replaceable

    say = command.Speaker(quiet=options.json)
    if options.output is not None:
        refuse_inputs(options.output, [options.zeroshot or "", options.finetuned or ""])
        replaceable(options.output)
    zeroshot, finetuned, model = open_both(options)
    points = [] if options.val_data is None else evaluate(options, model, zeroshot, finetuned)
    # Of equals the nearest to the zero-shot model.
    best = max(points, key=lambda point: point.recall.mean, default=None)
    if best is not None:
        say("\n".join(table(points, best)))
    chosen = options.alpha if best is None or options.alpha is not None else best.alpha
    if options.output is not None and chosen is not None:
        tensors = interpolate(zeroshot.state_dict, finetuned.state_dict, chosen)
        ends = {"zeroshot": str(options.zeroshot), "finetuned": str(options.finetuned)}
        write_checkpoint(options.output, tensors, finetuned, wise_ft={"alpha": chosen, **ends})
        say(f"alpha {chosen:g} -> {options.output}")
    written = {"output": options.output, "alpha": chosen if options.output else None}
    say.result({"points": [p.values() for p in points], "best_alpha": best.alpha if best else None, **written})


def open_both(options: Options) -> "tuple[Checkpoint, Checkpoint, CLIP]":
    """Both checkpoints with the tensors of their models, which are the same by name and shape, and a model for them.

    Raises CheckpointError naming the first tensor that differs, or holds NaN or infinity.
    """
    from cn_clip.clip.loading import open_model
    from cn_clip.clip.weights.writing import check_finite, check_same_tensors

    opened = []
    for name in (options.zeroshot, options.finetuned):
        assert name is not None
        model, checkpoint = open_model(name, vision=options.vision_model, text=options.text_model)
        opened.append(replace(checkpoint, state_dict=dict(model.state_dict())))
        check_finite(opened[-1])
    zeroshot, finetuned = opened
    check_same_tensors(zeroshot, finetuned)
    return zeroshot, finetuned, model


def interpolate(zeroshot: "dict[str, Tensor]", finetuned: "dict[str, Tensor]", alpha: float) -> "dict[str, Tensor]":
    """(1 - alpha) * zeroshot + alpha * finetuned, exact at 0 and 1; whole numbers are those of the fine-tuned model."""
    return {
        name: zeroshot[name].lerp(value, alpha) if value.is_floating_point() else value
        for name, value in finetuned.items()
    }


def evaluate(options: Options, model: "CLIP", zeroshot: "Checkpoint", finetuned: "Checkpoint") -> list[Point]:
    """Recall of both directions at each alpha, on the whole split."""
    from tqdm import tqdm

    from cn_clip.clip.encoder import Encoder
    from cn_clip.data.lmdb_store import IMAGES, PAIRS, PairStore, read_split
    from cn_clip.data.pictures import LmdbPictures

    precision = "fp32" if options.precision == "amp" else options.precision
    pictures = LmdbPictures(f"{options.val_data}/{IMAGES}")
    split = read_split(PairStore(f"{options.val_data}/{PAIRS}"), pictures.ids)
    points, alphas = [], options.line()
    with tqdm(total=len(alphas) * len(pictures), unit="picture", disable=None) as bar:
        for alpha in alphas:
            model.load_state_dict(interpolate(zeroshot.state_dict, finetuned.state_dict, alpha), assign=True)
            encoder = Encoder(model, device=options.device, precision=precision, context_length=options.context_length)
            points.append(Point(alpha, _recall(options, encoder, pictures, split, bar.update)))
    return points


def _recall(
    options: Options,
    encoder: "Encoder",
    pictures: "LmdbPictures",
    split: "Split",
    advance: "Callable[[int], object]",
) -> "RecallBothWays":
    import numpy as np

    from cn_clip.data.pictures import batches
    from cn_clip.retrieval.recall import recall_from_features

    rows = []
    for ids, pixels in batches(pictures, encoder.transform, options.batch_size, options.num_workers):
        rows.append(encoder.backend.encode_pixels(pixels))
        advance(len(ids))
    texts_TD = encoder.encode_texts(split.texts, batch_size=options.batch_size)
    return recall_from_features(np.concatenate(rows), texts_TD, split.pairs)


def table(points: Sequence[Point], best: Point) -> list[str]:
    """Lines for the terminal, in percent; the best mean is marked."""
    ks = list(best.recall.text_to_image.at)
    head = ["alpha", *(f"文→图 R@{k}" for k in ks), *(f"图→文 R@{k}" for k in ks), "平均 / mean", ""]
    rows = [head]
    for point in points:
        shares = [*point.recall.text_to_image.at.values(), *point.recall.image_to_text.at.values(), point.recall.mean]
        mark = "最佳 / best" if point is best else ""
        rows.append([f"{point.alpha:g}", *(f"{100 * share:.2f}" for share in shares), mark])
    return terminal.align(rows, right=frozenset(range(len(head) - 1)))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
