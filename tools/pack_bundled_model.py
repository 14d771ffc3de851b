"""Makes the bundled model's file of a training checkpoint: half precision, with licence, origin and results inside.

python tools/pack_bundled_model.py --checkpoint experiments/emoji-tiny/checkpoints/epoch_latest.pt --seed 123
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import command, zoo

if TYPE_CHECKING:
    from cn_clip.retrieval.recall import RecallBothWays

ENTRY = zoo.BUNDLED["Emoji-Tiny"]
LARGEST = 25_000_000  # bytes
ABOUT = {
    "licence": "MIT for the weights; the pictures learned from: Apache-2.0, MIT and CC BY 4.0, see MODEL_CARD.md",
    "data": "noto noto-2017 fluent-3d fluent-flat fluent-modern fluent-high-contrast emojione2 fxemoji streamline",
    "not_seen": "twemoji openmoji",
}


@dataclass(frozen=True)
class Options:
    """Writes the file, measures it on the embedded Twemoji drawings and notes the result in it."""

    checkpoint: Path
    """Training checkpoint"""
    seed: int
    """Seed of the training run, noted in the file"""
    output: Path = ENTRY.path
    """The file to write"""


def measure(path: Path) -> "RecallBothWays":
    """Recall of a weight file among the embedded Twemoji drawings by their names, both ways."""
    from cn_clip.clip import Encoder
    from cn_clip.demo import emoji
    from cn_clip.retrieval.recall import recall_from_features

    encoder, found = Encoder(path, device="cpu"), emoji.load("twemoji")
    images, texts = encoder.encode_images([one.picture for one in found]), encoder.encode_texts([e.name for e in found])
    return recall_from_features(images, texts, [(number, number) for number in range(len(found))])


def percent(recalls: "RecallBothWays") -> dict[str, dict[str, float]]:
    """{"text_to_image": {"r1": ..., ...}, ...}, in percent with two decimals."""
    named = recalls._asdict().items()
    return {way: {f"r{k}": round(100 * share, 2) for k, share in recall.at.items()} for way, recall in named}


def run(options: Options) -> int:
    """Writes the file with what was measured on a trial of it; one that is too large is not written."""
    from cn_clip import __version__
    from cn_clip.clip.weights.checkpoint import read_checkpoint
    from cn_clip.clip.weights.forms import in_precision
    from cn_clip.clip.weights.writing import write_safetensors
    from cn_clip.errors import CheckpointError

    checkpoint = read_checkpoint(options.checkpoint)
    tensors = in_precision(checkpoint, "fp16")
    about = {**ABOUT, "name": "Emoji-Tiny", "vision_model": ENTRY.vision, "text_model": ENTRY.text, "format": "pt"}
    about |= {"cn_clip": __version__, "seed": str(options.seed), "step": str(checkpoint.step)}
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / options.output.name
        write_safetensors(trial, tensors, about)
        results, size = percent(measure(trial)), trial.stat().st_size
    if size > LARGEST:
        raise CheckpointError(f"{options.checkpoint}: {size} bytes in half precision, expected at most {LARGEST}")
    write_safetensors(options.output, tensors, {**about, "twemoji": json.dumps(results)})
    print(f"{options.output}: {size} bytes, on unseen Twemoji drawings {results}")
    return 0


def main(args: Sequence[str] | None = None) -> None:
    """Runs the packer on the command line's options."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
