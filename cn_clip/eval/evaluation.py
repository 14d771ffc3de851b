"""Recall at 1, 5 and 10 of a prediction file against the annotation, written as result JSON.

python cn_clip/eval/evaluation.py STANDARD.jsonl PREDICTIONS.jsonl RESULT.json
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import tyro

from cn_clip import command, drop_in
from cn_clip.errors import DataError
from cn_clip.files import refuse_inputs
from cn_clip.option_types import Json

Query: TypeAlias = Annotated[
    Literal["text", "image"],
    tyro.conf.arg(help="What was looked up: text (texts find pictures) or image (pictures find texts)"),
]

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options:
    """Checks predictions and computes recall, by default: texts find pictures.

    A fault gives the error JSON and exit status 1.
    """

    standard: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="STANDARD")]
    """The annotation: jsonl with the relevant ids of each query"""
    submit: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PREDICTIONS")]
    """The predictions: jsonl with exactly 10 ids for each query, best first"""
    output: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RESULT")]
    """The result JSON to write"""
    query: Query = "text"
    json: Json = False


def run(options: Options) -> int:
    """Writes the result or the error JSON; returns 1 for an error."""
    from cn_clip.evaluation import annotations

    refuse_inputs("RESULT", options.output, [options.standard, options.submit])
    say = command.Speaker(quiet=options.json)
    say(f"Read standard from {options.standard}")
    say(f"Read user submit file from {options.submit}")
    try:
        result = annotations.evaluate(options.standard, options.submit, query=options.query)
        shown = {"R@1": "r1", "R@5": "r5", "R@10": "r10", "MR": "mean_recall"}
        figures = "  ".join(f"{title} {result['scoreJson'][name]:.2f}" for title, name in shown.items())
        ending = f"The evaluation finished successfully.\n{figures}"
    except DataError as error:
        result = annotations.failure(str(error), str(error))
        ending = f"The evaluation failed: {error}"
    annotations.dump_2_json(result, options.output)
    say(ending)
    say.result(result)
    return 0 if result["success"] else 1


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with its status."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
