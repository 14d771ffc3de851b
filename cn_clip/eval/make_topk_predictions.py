"""Ranks pictures for each sentence, or sentences for each picture, from feature files.

python cn_clip/eval/make_topk_predictions.py --image-feats IMG.jsonl --text-feats TXT.jsonl --output PREDICTIONS.jsonl
"""

import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Annotated, Literal, TypeAlias

import tyro

from cn_clip import command
from cn_clip.errors import ConfigError, DataError
from cn_clip.files import atomic_write, refuse_inputs
from cn_clip.jsonl import dumps
from cn_clip.option_types import Json

if TYPE_CHECKING:
    import torch

    from cn_clip.features.files import Features

Side: TypeAlias = Literal["text", "image"]
Query: TypeAlias = Annotated[
    Side, tyro.conf.arg(help="What is looked up: text (texts find pictures) or image (pictures find texts)")
]

_QUERIES_A_STEP = 1024
OTHER: dict[Side, Side] = {"text": "image", "image": "text"}
ID_FIELDS: dict[Side, Literal["text_id", "image_id"]] = {"text": "text_id", "image": "image_id"}


@dataclass(frozen=True)
class Options:
    """Exact top-k search by inner product, one line of ids for each query; by default: texts find pictures."""

    image_feats: str
    """The feature file of the pictures: jsonl, npz or Parquet"""
    text_feats: str
    """The feature file of the sentences, in any of these formats"""
    output: str
    """The prediction file to write"""
    top_k: Annotated[int, tyro.conf.arg(name="k", aliases=("--top-k",))] = 10
    """How many to find for each query"""
    eval_batch_size: int = 32768
    """How many vectors of the searched side are compared at a time; bounds memory, does not change the result"""
    query: Query = "text"
    device: str = "auto"
    """Where to multiply: auto, cpu, cuda, cuda:N or mps"""
    json: Json = False

    def __post_init__(self) -> None:
        for flag, value in (("--k", self.top_k), ("--eval-batch-size", self.eval_batch_size)):
            if value < 1:
                raise ConfigError(f"{flag}: expected at least 1, got {value}")


def run(options: Options) -> None:
    """Searches and writes the prediction file; raises DataError for faulty or unlike feature files."""
    from cn_clip.features.files import read_features
    from cn_clip.ranks import choose_device

    say = command.Speaker(quiet=options.json)
    say.params(options)
    device = choose_device(options.device)
    searched, paths = OTHER[options.query], {"image": options.image_feats, "text": options.text_feats}
    refuse_inputs("--output", options.output, [options.image_feats, options.text_feats])
    with atomic_write(options.output) as stream:
        started = time.perf_counter()
        say(f"Begin to load {searched} features...")
        gallery = read_features(paths[searched], ID_FIELDS[searched], progress=True)
        say(f"Finished loading {searched} features.")
        say(f"Begin to compute top-{options.top_k} predictions for {options.query}s...")
        queries = read_features(paths[options.query], ID_FIELDS[options.query], progress=True)
        _check_alike(queries, gallery, options)
        loaded = time.perf_counter()
        write_predictions(
            stream, options.query, queries, gallery, options.top_k, block=options.eval_batch_size, device=device
        )
    say(f"Top-{options.top_k} predictions are saved in {options.output}")
    say("Done!")
    counts = {"num_queries": len(queries.ids), "num_searched": len(gallery.ids), "top_k": options.top_k}
    seconds = {"load_seconds": loaded - started, "search_seconds": time.perf_counter() - loaded}
    say.result({"output": options.output, "query": options.query, **counts, **seconds})


def _check_alike(queries: "Features", gallery: "Features", options: Options) -> None:
    wide, other = queries.vectors.shape[1], gallery.vectors.shape[1]
    if wide != other:
        raise DataError(
            f"{options.image_feats} and {options.text_feats}: the {options.query} features have {wide} numbers, "
            f"the others {other}; extract both with the same model"
        )


def write_predictions(
    stream: IO[str],
    query: Side,
    queries: "Features",
    gallery: "Features",
    k: int,
    *,
    block: int,
    device: "torch.device",
) -> None:
    """Writes a line for each query: its id, and the ids of the k vectors of the gallery with the largest products.

    Best first; equal ones in the order of the gallery. block: vectors of the gallery that are compared at a time.
    """
    from tqdm import tqdm

    from cn_clip.retrieval.flat import top_k

    found_field = f"{ID_FIELDS[OTHER[query]]}s"
    with tqdm(total=len(queries.ids), desc="search", unit="query") as bar:
        for start in range(0, len(queries.ids), _QUERIES_A_STEP):
            step = slice(start, start + _QUERIES_A_STEP)
            found = top_k(queries.vectors[step], gallery.vectors, k, gallery_block=block, device=device)
            for query_id, row in zip(queries.ids[step], found.indices.tolist(), strict=True):
                line = {ID_FIELDS[query]: query_id, found_field: [gallery.ids[index] for index in row]}
                stream.write(dumps(line) + "\n")
            bar.update(len(found.indices))


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with its status."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
