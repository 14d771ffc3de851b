"""Recall at 1, 5 and 10 of a prediction file against the annotation, written as result JSON.

python cn_clip/eval/evaluation.py STANDARD.jsonl PREDICTIONS.jsonl RESULT.json
"""

import errno
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from cn_clip import command
from cn_clip.data.records import RecordId, plain_id
from cn_clip.errors import DataError, Where
from cn_clip.files import atomic_write, refuse_inputs
from cn_clip.jsonl import dumps, numbered_lines, read_objects
from cn_clip.option_types import Json

NUM_PREDICTIONS = 10

Ranking: TypeAlias = dict[RecordId, list[RecordId]]
Direction: TypeAlias = Literal["text", "image"]
Query: TypeAlias = Annotated[
    Direction, tyro.conf.arg(help="What was looked up: text (texts find pictures) or image (pictures find texts)")
]


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


@dataclass(frozen=True)
class _Words:
    """The field names of one direction, and the words of its error messages that tools look for."""

    query_id: str
    found_ids: str
    query: str
    found_noun: str

    @property
    def found_id(self) -> str:
        return self.found_ids.removesuffix("s")


_WORDS: dict[Direction, _Words] = {
    "text": _Words("text_id", "image_ids", "Text_id", "images"),
    "image": _Words("image_id", "text_ids", "Image_id", "texts"),
}


def run(options: Options) -> int:
    """Writes the result or the error JSON; returns 1 for an error."""
    refuse_inputs("RESULT", options.output, [options.standard, options.submit])
    say = command.Speaker(quiet=options.json)
    say(f"Read standard from {options.standard}")
    say(f"Read user submit file from {options.submit}")
    try:
        result = evaluate(options.standard, options.submit, query=options.query)
        ending = f"The evaluation finished successfully.\n{_readable(result['scoreJson'])}"
    except DataError as error:
        result = _failure(str(error), str(error))
        ending = f"The evaluation failed: {error}"
    dump_2_json(result, options.output)
    say(ending)
    say.result(result)
    return 0 if result["success"] else 1


def evaluate(standard: str, submit: str, *, query: Direction = "text") -> dict[str, Any]:
    """The result object: `success`, `score` and `scoreJson`, in percent, unrounded.

    Every query of the annotation counts, also one without relevant ids (which nothing can find). Raises DataError
    with the first fault, in the order and the words of Chinese-CLIP where it has words.
    """
    from cn_clip.retrieval.recall import recall_at_k

    relevant = read_annotation(standard, query=query)
    predicted = read_predictions(submit, relevant, query=query)
    if not relevant:
        raise DataError("the file has no lines; expected the relevant ids of one query a line", at=standard)
    relevant, predicted = _plain(relevant), _plain(predicted)
    _tell_nothing_in_common(standard, submit, relevant, predicted, _WORDS[query])
    recall = recall_at_k([predicted[query_id] for query_id in relevant], list(relevant.values()))
    return _success(*recall.at.values())


def _success(r1: float, r5: float, r10: float) -> dict[str, Any]:
    score = (r1 + r5 + r10) / 3 * 100
    percent = {"r1": r1 * 100, "r5": r5 * 100, "r10": r10 * 100}
    return {"success": True, "score": score, "scoreJson": {"score": score, "mean_recall": score, **percent}}


def _plain(ranking: Ranking) -> Ranking:
    """With ids of one form, so that `"7"` in one file is 7 in the other."""
    return {plain_id(query_id): list(map(plain_id, found)) for query_id, found in ranking.items()}


def _tell_nothing_in_common(standard: str, submit: str, relevant: Ranking, predicted: Ranking, words: _Words) -> None:
    """Says on stderr why the score is 0.00 when no id of the annotation is predicted for any query."""
    expected, found = (
        dict.fromkeys(one for ids in ranking.values() for one in ids) for ranking in (relevant, predicted)
    )
    if expected and expected.keys().isdisjoint(found):
        print(
            f"提示 / note: {submit}: none of the {len(expected)} {words.found_ids} of {standard} is predicted for any "
            f"query (one of them is {next(iter(expected))!r}, one predicted is {next(iter(found))!r}), so the score is "
            "0.00; are both files of the same split and direction?",
            file=sys.stderr,
        )


def _failure(detail: str, message: str) -> dict[str, Any]:
    return {"errorDetail": detail, "errorMsg": message, "score": 0, "scoreJson": {}, "success": False}


def _readable(scores: dict[str, float]) -> str:
    return f"R@1 {scores['r1']:.2f}  R@5 {scores['r5']:.2f}  R@10 {scores['r10']:.2f}  MR {scores['mean_recall']:.2f}"


def read_annotation(path: str, *, query: Direction = "text") -> Ranking:
    """Query id -> relevant ids as written, in file order; the last line of an id counts.

    Raises DataError with file and line.
    """
    return dict(read_relevant(path, query=query))


def read_relevant(path: str, *, query: Direction = "text") -> Iterator[tuple[RecordId, list[RecordId]]]:
    """Yields (query id, relevant ids) as each line of an annotation has them; raises DataError with file and line."""
    words = _WORDS[query]
    for number, record in read_objects(path):
        for field in (words.query_id, words.found_ids):
            if field not in record:
                raise DataError(f"no field {field}, only {sorted(record)}", at=Where(path, line=number))
        query_id, found = record[words.query_id], record[words.found_ids]
        if not _is_id(query_id, (int, str)):
            raise DataError(
                f"expected an integer or a string, got {query_id!r}", at=Where(path, line=number, field=words.query_id)
            )
        if not isinstance(found, list) or not all(_is_id(found_id, (int, str)) for found_id in found):
            raise DataError(
                f"expected a list of integers or strings, got {found!r}",
                at=Where(path, line=number, field=words.found_ids),
            )
        yield query_id, found


def read_predictions(
    path: str, relevant: Ranking, *, query: Direction = "text", num_predictions: int = NUM_PREDICTIONS
) -> Ranking:
    """Query id -> the 10 ids predicted as written, best first; strings only where the annotation has strings.

    Raises DataError in the words of Chinese-CLIP for the first faulty line, then for queries without prediction.
    """
    words = _WORDS[query]
    query_types = _types(relevant)
    found_types = _types(found_id for found in relevant.values() for found_id in found)
    predicted: Ranking = {}
    for line in _lines(path):
        record = _parse(line)
        query_id = _query_id(record, line, words, query_types)
        if words.found_ids not in record:
            raise DataError(f"There exists one line not containing the predicted {words.found_ids}: {line}")
        found = record[words.found_ids]
        predicted[query_id] = _found_ids(found, query_id, words, found_types, num_predictions)
    _check_complete(relevant, predicted, words)
    return predicted


def _types(ids: Iterable[RecordId]) -> tuple[type, ...]:
    return (int, str) if any(isinstance(one, str) for one in ids) else (int,)


def _is_id(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _lines(path: str) -> Iterable[str]:
    """Every line, blank ones too, without white space around; bytes that are no UTF-8 are written as escapes."""
    if not os.path.exists(path):
        raise DataError("The submission file is not found!")
    for _, line in numbered_lines(path, with_blank=True):
        yield line.decode("utf-8", errors="backslashreplace").strip()


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"Cannot parse this line into json object: {line}") from error


def _query_id(record: Any, line: str, words: _Words, types: tuple[type, ...]) -> RecordId:
    if not isinstance(record, dict) or words.query_id not in record:
        raise DataError(f"There exists one line not containing {words.query_id}: {line}")
    query_id: RecordId = record[words.query_id]
    if not _is_id(query_id, types):
        raise DataError(
            f"Found an invalid {words.query_id} {query_id}, it should be an integer (not string), "
            "please check your schema"
        )
    return query_id


def _found_ids(
    found: Any, query_id: RecordId, words: _Words, types: tuple[type, ...], num_predictions: int
) -> list[RecordId]:
    if not isinstance(found, list):
        raise DataError(
            f"The {words.found_ids} field of {words.query_id} {query_id} is not a list, please check your schema"
        )
    subject = f"{words.query} {query_id} has"
    if len(found) != num_predictions:
        raise DataError(
            f"{subject} wrong number of predicted {words.found_ids}! Require {num_predictions}, "
            f"but {len(found)} founded."
        )
    for rank, found_id in enumerate(found, start=1):
        if not _is_id(found_id, types):
            raise DataError(
                f"{subject} an invalid predicted {words.found_id} {found_id} at rank {rank}, "
                "it should be an integer (not string), please check your schema"
            )
    if len(set(map(plain_id, found))) != num_predictions:
        raise DataError(f"{subject} duplicate topk {words.found_noun} in your prediction. Pleace check again!")
    return found


def _check_complete(relevant: Ranking, predicted: Collection[RecordId], words: _Words) -> None:
    missing: Collection[RecordId] = set(map(plain_id, relevant)) - set(map(plain_id, predicted))
    if not missing:
        return
    # Integers keep the order of the set, which is that of Chinese-CLIP; strings have another order in each process.
    if any(isinstance(query_id, str) for query_id in missing):
        missing = [query_id for query_id in map(plain_id, relevant) if query_id in missing]
    listed = ", ".join(str(query_id) for query_id in missing)
    raise DataError(
        f"The following {words.query_id}s have no prediction in your submission, please check again: {listed}"
    )


# --- the names of Chinese-CLIP ----------------------------------------------------------------------------------------

NUM_K = NUM_PREDICTIONS


def read_reference(path: str, *, query: Direction = "text") -> Ranking:
    """`read_annotation`; raises FileNotFoundError when there is no such file."""
    _require_file(path)
    return read_annotation(path, query=query)


def _require_file(path: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def read_submission(submit_path: str, reference: Ranking, k: int = 5, *, query: Direction = "text") -> Ranking:
    """`read_predictions`, of k ids for each query."""
    return read_predictions(submit_path, reference, query=query, num_predictions=k)


def compute_score(golden_file: str, predict_file: str, *, query: Direction = "text") -> list[float]:
    """[mean recall, R@1, R@5, R@10] in percent; raises what `read_reference` and `evaluate` raise."""
    _require_file(golden_file)
    scores = evaluate(golden_file, predict_file, query=query)["scoreJson"]
    return [scores[name] for name in ("mean_recall", "r1", "r5", "r10")]


def dump_2_json(info: Any, path: str) -> None:
    """Writes one JSON value, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(dumps(info))


def report_score(r1: float, r5: float, r10: float, out_p: str) -> None:
    """Writes the result JSON of three recalls in [0, 1]."""
    dump_2_json(_success(r1, r5, r10), out_p)


def report_error_msg(detail: str, showMsg: str, out_p: str) -> None:
    """Writes the error JSON."""
    dump_2_json(_failure(detail, showMsg), out_p)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command; exits with its status."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
