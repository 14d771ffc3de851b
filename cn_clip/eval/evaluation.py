"""Recall at 1, 5 and 10 of a prediction file against the annotation, written as result JSON.

python cn_clip/eval/evaluation.py STANDARD.jsonl PREDICTIONS.jsonl RESULT.json
"""

import json
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import tyro

from cn_clip import command
from cn_clip.data.records import RecordId
from cn_clip.errors import DataError
from cn_clip.jsonl import atomic_write, dumps, read_objects, refuse_inputs

NUM_PREDICTIONS = 10

Ranking: TypeAlias = dict[RecordId, list[RecordId]]
Direction: TypeAlias = Literal["text", "image"]


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
    query: Direction = "text"
    """What was looked up: text (texts find pictures) or image (pictures find texts)"""
    json: bool = False
    """Print the result as one JSON object instead of lines of text"""


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
        result = _failure(str(error))
        ending = f"The evaluation failed: {error}"
    with atomic_write(options.output) as stream:
        stream.write(dumps(result))
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
        raise DataError(f"{standard}: the file has no lines; expected the relevant ids of one query a line")
    _tell_nothing_in_common(standard, submit, relevant, predicted, _WORDS[query])
    recall = recall_at_k([predicted[query_id] for query_id in relevant], list(relevant.values()))
    score = recall.mean * 100
    percent = {f"r{k}": value * 100 for k, value in recall.at.items()}
    return {"success": True, "score": score, "scoreJson": {"score": score, "mean_recall": score, **percent}}


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


def _failure(message: str) -> dict[str, Any]:
    return {"errorDetail": message, "errorMsg": message, "score": 0, "scoreJson": {}, "success": False}


def _readable(scores: dict[str, float]) -> str:
    return f"R@1 {scores['r1']:.2f}  R@5 {scores['r5']:.2f}  R@10 {scores['r10']:.2f}  MR {scores['mean_recall']:.2f}"


def read_annotation(path: str, *, query: Direction = "text") -> Ranking:
    """Query id -> relevant ids, in file order; the last line of an id counts. Raises DataError with file and line."""
    return dict(read_relevant(path, query=query))


def read_relevant(path: str, *, query: Direction = "text") -> Iterator[tuple[RecordId, list[RecordId]]]:
    """Yields (query id, relevant ids) of each line of an annotation; raises DataError with file and line."""
    words = _WORDS[query]
    for number, record in read_objects(path):
        for field in (words.query_id, words.found_ids):
            if field not in record:
                raise DataError(f"{path}:{number}: no field {field}, only {sorted(record)}")
        query_id, found = record[words.query_id], record[words.found_ids]
        if not _is_id(query_id, (int, str)):
            raise DataError(f"{path}:{number} {words.query_id}: expected an integer or a string, got {query_id!r}")
        if not isinstance(found, list) or not all(_is_id(found_id, (int, str)) for found_id in found):
            raise DataError(f"{path}:{number} {words.found_ids}: expected a list of integers or strings, got {found!r}")
        yield query_id, found


def read_predictions(path: str, relevant: Ranking, *, query: Direction = "text") -> Ranking:
    """Query id -> the 10 ids predicted, best first; ids may be strings only where the annotation has strings.

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
        predicted[query_id] = _found_ids(record[words.found_ids], query_id, words, found_types)
    _check_complete(relevant, predicted, words)
    return predicted


def _types(ids: Iterable[RecordId]) -> tuple[type, ...]:
    return (int, str) if any(isinstance(one, str) for one in ids) else (int,)


def _is_id(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def _lines(path: str) -> Iterable[str]:
    """Every line, blank ones too, without white space around; bytes that are no UTF-8 are written as escapes."""
    try:
        with open(path, "rb") as stream:
            for line in stream:
                yield line.decode("utf-8", errors="backslashreplace").strip()
    except FileNotFoundError as error:
        raise DataError("The submission file is not found!") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from error


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


def _found_ids(found: Any, query_id: RecordId, words: _Words, types: tuple[type, ...]) -> list[RecordId]:
    if not isinstance(found, list):
        raise DataError(
            f"The {words.found_ids} field of {words.query_id} {query_id} is not a list, please check your schema"
        )
    subject = f"{words.query} {query_id} has"
    if len(found) != NUM_PREDICTIONS:
        raise DataError(
            f"{subject} wrong number of predicted {words.found_ids}! Require {NUM_PREDICTIONS}, "
            f"but {len(found)} founded."
        )
    for rank, found_id in enumerate(found, start=1):
        if not _is_id(found_id, types):
            raise DataError(
                f"{subject} an invalid predicted {words.found_id} {found_id} at rank {rank}, "
                "it should be an integer (not string), please check your schema"
            )
    if len(set(found)) != NUM_PREDICTIONS:
        raise DataError(f"{subject} duplicate topk {words.found_noun} in your prediction. Pleace check again!")
    return found


def _check_complete(relevant: Ranking, predicted: Collection[RecordId], words: _Words) -> None:
    missing: Collection[RecordId] = set(relevant) - set(predicted)
    if not missing:
        return
    # Integers keep the order of the set, which is that of Chinese-CLIP; strings have another order in each process.
    if any(isinstance(query_id, str) for query_id in missing):
        missing = [query_id for query_id in relevant if query_id in missing]
    listed = ", ".join(str(query_id) for query_id in missing)
    raise DataError(
        f"The following {words.query_id}s have no prediction in your submission, please check again: {listed}"
    )


def main(args: Sequence[str] | None = None) -> None:
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()
