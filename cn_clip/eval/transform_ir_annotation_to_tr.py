"""Turns an annotation (the pictures of each sentence) round: the sentences of each picture, in NAME.tr.jsonl.

python cn_clip/eval/transform_ir_annotation_to_tr.py --input VALID_texts.jsonl
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip import command
from cn_clip.option_types import Json


@dataclass(frozen=True)
class Options:
    """Writes NAME.tr.jsonl beside NAME.jsonl: one line a picture, in the order of first mention."""

    input: str
    """The jsonl annotation with the image_ids of each text_id"""
    json: Json = False


def run(options: Options) -> None:
    """Reads, writes and says so; raises DataError with file and line for a faulty line."""
    from cn_clip.evaluation import annotations

    turned = annotations.turn_round(options.input)
    say = command.Speaker(quiet=options.json)
    say("Done!")
    say.result({"output": turned.output, "num_texts": turned.num_texts, "num_images": len(turned.texts_of)})


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with its status."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
