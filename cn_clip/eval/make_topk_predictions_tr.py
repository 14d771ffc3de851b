"""Ranks sentences for each picture: make_topk_predictions with the other direction as default.

python cn_clip/eval/make_topk_predictions_tr.py --image-feats I.jsonl --text-feats T.jsonl --output PREDICTIONS.jsonl
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip import command
from cn_clip.eval import make_topk_predictions


@dataclass(frozen=True)
class Options(make_topk_predictions.Options):
    """Exact top-k search by inner product, one line of ids for each query; by default: pictures find texts."""

    query: make_topk_predictions.Query = "image"


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with its status."""
    command.execute(make_topk_predictions.run, Options, args)


if __name__ == "__main__":
    main()
