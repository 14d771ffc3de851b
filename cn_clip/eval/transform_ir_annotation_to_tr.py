"""Turns an annotation (the pictures of each sentence) round: the sentences of each picture, in NAME.tr.jsonl.

python cn_clip/eval/transform_ir_annotation_to_tr.py --input VALID_texts.jsonl
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip import command
from cn_clip.errors import DataError
from cn_clip.files import atomic_write, refuse_inputs
from cn_clip.jsonl import dumps
from cn_clip.option_types import Json


@dataclass(frozen=True)
class Options:
    """Writes NAME.tr.jsonl beside NAME.jsonl: one line a picture, in the order of first mention."""

    input: str
    """The jsonl annotation with the image_ids of each text_id"""
    json: Json = False


def run(options: Options) -> None:
    """Reads, writes and says so; raises as `turn_round`."""
    output, num_texts, num_images = turn_round(options.input)
    say = command.Speaker(quiet=options.json)
    say("Done!")
    say.result({"output": output, "num_texts": num_texts, "num_images": num_images})


def turn_round(annotation: str) -> tuple[str, int, int]:
    """(the file written, texts read, pictures written).

    Raises DataError with file and line, before anything is written, for a faulty line.
    """
    from cn_clip.data.records import plain_id
    from cn_clip.eval.evaluation import read_relevant

    texts_of: dict[int | str, list[int | str]] = {}
    num_texts = 0
    for text_id, image_ids in read_relevant(annotation, query="text"):
        num_texts += 1
        for image_id in image_ids:
            texts_of.setdefault(plain_id(image_id), []).append(plain_id(text_id))
    if not num_texts:
        raise DataError("the file has no lines; expected one JSON object a line", at=annotation)
    output = annotation.removesuffix(".jsonl") + ".tr.jsonl"
    refuse_inputs("--input: the output", output, [annotation])
    with atomic_write(output) as stream:
        for image_id, text_ids in texts_of.items():
            stream.write(dumps({"image_id": image_id, "text_ids": text_ids}) + "\n")
    return output, num_texts, len(texts_of)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with its status."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
