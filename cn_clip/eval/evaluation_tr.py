"""Recall of sentences found by pictures: evaluation with the other direction as default.

python cn_clip/eval/evaluation_tr.py STANDARD.tr.jsonl PREDICTIONS.jsonl RESULT.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from cn_clip import command
from cn_clip.eval import evaluation
from cn_clip.eval.evaluation import NUM_K, dump_2_json, report_error_msg, report_score

__all__ = [
    "NUM_K",
    "compute_score",
    "dump_2_json",
    "read_reference",
    "read_submission",
    "report_error_msg",
    "report_score",
]

compute_score = partial(evaluation.compute_score, query="image")
read_reference = partial(evaluation.read_reference, query="image")
read_submission = partial(evaluation.read_submission, query="image")


@dataclass(frozen=True)
class Options(evaluation.Options):
    """Checks predictions and computes recall, by default: pictures find texts.

    A fault gives the error JSON and exit status 1.
    """

    query: evaluation.Query = "image"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with its status."""
    command.execute(evaluation.run, Options, args)


if __name__ == "__main__":
    main()
