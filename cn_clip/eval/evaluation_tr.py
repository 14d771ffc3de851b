"""Recall of sentences found by pictures: evaluation with the other direction as default.

python cn_clip/eval/evaluation_tr.py STANDARD.tr.jsonl PREDICTIONS.jsonl RESULT.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cn_clip import command
from cn_clip.eval import evaluation


def __getattr__(name: str) -> Any:
    """Chinese-CLIP's names, with the other direction as default."""
    value = getattr(evaluation, name)
    return partial(value, query="image") if name in ("compute_score", "read_reference", "read_submission") else value


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
