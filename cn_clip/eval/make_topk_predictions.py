"""Ranks pictures for each sentence, or sentences for each picture, from feature files.

python cn_clip/eval/make_topk_predictions.py --image-feats IMG.jsonl --text-feats TXT.jsonl --output PREDICTIONS.jsonl
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import tyro

from cn_clip import command, ranks, settings
from cn_clip.files import refuse_inputs
from cn_clip.option_types import Json
from cn_clip.settings import Range

Query: TypeAlias = Annotated[
    Literal["text", "image"],
    tyro.conf.arg(help="What is looked up: text (texts find pictures) or image (pictures find texts)"),
]


@dataclass(frozen=True)
class Options:
    """Exact top-k search by inner product, one line of ids for each query; by default: texts find pictures."""

    image_feats: str
    """The feature file of the pictures: jsonl, npz or Parquet"""
    text_feats: str
    """The feature file of the sentences, in any of these formats"""
    output: str
    """The prediction file to write"""
    top_k: Annotated[int, tyro.conf.arg(name="k", aliases=("--top-k",)), Range(least=1)] = 10
    """How many to find for each query"""
    eval_batch_size: Annotated[int, Range(least=1)] = 32768
    """How many vectors of the searched side are compared at a time; bounds memory, does not change the result"""
    query: Query = "text"
    device: str = "auto"
    """Where to multiply: auto, cpu, cuda, cuda:N or mps"""
    json: Json = False

    def __post_init__(self) -> None:
        settings.check(self)


def run(options: Options) -> None:
    """Searches and writes the prediction file; raises DataError for faulty or unlike feature files."""
    from cn_clip.evaluation import retrieval

    say = command.Speaker(quiet=options.json)
    say.params(options)
    device = ranks.choose_device(options.device)
    refuse_inputs("--output", options.output, [options.image_feats, options.text_feats])
    facts = retrieval.write_predictions(
        options.output,
        {"image": options.image_feats, "text": options.text_feats},
        options.query,
        options.top_k,
        block=options.eval_batch_size,
        device=device,
        say=say,
    )
    say(f"Top-{options.top_k} predictions are saved in {options.output}")
    say("Done!")
    say.result({"output": options.output, "query": options.query, **facts})


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with its status."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
