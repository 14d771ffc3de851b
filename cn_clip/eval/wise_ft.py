"""Mixes zero-shot and fine-tuned weights (WiSE-FT) and measures recall along the line.

cn-clip wise-ft --zeroshot ViT-B-16 --finetuned epoch3.pt --val-data lmdb/valid --output best.pt
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from cn_clip import command, settings, terminal
from cn_clip.errors import ConfigError
from cn_clip.language import both
from cn_clip.option_types import ContextLength, Device, Json, NumWorkers
from cn_clip.settings import Range
from cn_clip.zoo import CONTEXT_LENGTH

if TYPE_CHECKING:
    from cn_clip.evaluation.retrieval import Point

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
    alpha: Annotated[float | None, Range(least=0, most=1)] = None
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
    num_workers: NumWorkers = None
    device: Device = "auto"
    json: Json = False

    def __post_init__(self) -> None:
        for name in ("zeroshot", "finetuned"):
            if getattr(self, name) is None:
                raise ConfigError(f"--{name}: expected a checkpoint file, or a model's name such as ViT-B-16")
        if self.alpha is not None and self.output is None:
            raise ConfigError("--alpha: chooses the mixture to write; add --output")
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


def run(options: Options) -> None:
    """Evaluates, prints the table and writes the mixture; raises CheckpointError when the two models do not match."""
    from cn_clip.evaluation import retrieval

    say = command.Speaker(quiet=options.json)
    zeroshot, finetuned = options.zeroshot or "", options.finetuned or ""
    ends = retrieval.open_ends(
        zeroshot, finetuned, vision=options.vision_model, text=options.text_model, output=options.output
    )
    points: list[Point] = []
    if options.val_data is not None:
        points = retrieval.recall_along(
            ends,
            options.line(),
            options.val_data,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            precision="fp32" if options.precision == "amp" else options.precision,
            device=options.device,
            context_length=options.context_length,
        )
    # Of equals the nearest to the zero-shot model.
    best = max(points, key=lambda point: point.recall.mean, default=None)
    if best is not None:
        say("\n".join(table(points, best)))
    chosen = options.alpha if best is None or options.alpha is not None else best.alpha
    if options.output is not None and chosen is not None:
        retrieval.write_mixture(options.output, ends, chosen, names={"zeroshot": zeroshot, "finetuned": finetuned})
        say(f"alpha {chosen:g} -> {options.output}")
    written = {"output": options.output, "alpha": chosen if options.output else None}
    say.result({"points": [p.values() for p in points], "best_alpha": best.alpha if best else None, **written})


def table(points: "Sequence[Point]", best: "Point") -> list[str]:
    """Lines for the terminal, in percent; the best mean is marked."""
    ks = list(best.recall.text_to_image.at)
    ways = (both("文→图", "text→image"), both("图→文", "image→text"))
    head = ["alpha", *(f"{way} R@{k}" for way in ways for k in ks), both("平均", "mean"), ""]
    rows = [head]
    for point in points:
        shares = [*point.recall.text_to_image.at.values(), *point.recall.image_to_text.at.values(), point.recall.mean]
        mark = both("最佳", "best") if point is best else ""
        rows.append([f"{point.alpha:g}", *(f"{100 * share:.2f}" for share in shares), mark])
    return terminal.align(rows, right=frozenset(range(len(head) - 1)))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
