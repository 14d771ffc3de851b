"""Annotations (the relevant ids of each query), predictions (the ids found), and the recall of these."""

import errno
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from cn_clip.data.records import RecordId, plain_id
from cn_clip.errors import DataError, Where
from cn_clip.features.rows import IdField
from cn_clip.files import atomic_write, refuse_inputs
from cn_clip.jsonl import dumps, numbered_lines, read_objects
from cn_clip.language import both
from cn_clip.retrieval.recall import recall_at_k

NUM_PREDICTIONS = 10

Ranking: TypeAlias = dict[RecordId, list[RecordId]]
# What is looked up: texts find pictures, or pictures find texts.
Direction: TypeAlias = Literal["text", "image"]


@dataclass(frozen=True)
class Fields:
    """The field names of one direction, and the words of its error messages that tools look for."""

    query_id: IdField
    found_id: IdField
    query: str
    found_noun: str

    @property
    def found_ids(self) -> str:
        """The field with a list of ids."""
        return f"{self.found_id}s"


FIELDS: dict[Direction, Fields] = {
    "text": Fields("text_id", "image_id", "Text_id", "images"),
    "image": Fields("image_id", "text_id", "Image_id", "texts"),
}


# --- the recall of predictions ----------------------------------------------------------------------------------------


def evaluate(standard: str, submit: str, *, query: Direction = "text") -> dict[str, Any]:
    """The result object of two files, see `score`.

    Raises DataError with the first fault, in the order and the words of Chinese-CLIP where it has words.
    """
    relevant = read_annotation(standard, query=query)
    predicted = read_predictions(submit, relevant, query=query)
    if not relevant:
        raise DataError("the file has no lines; expected the relevant ids of one query a line", at=standard)
    return score(relevant, predicted, query=query, standard=standard, submit=submit)


def score(
    relevant: Ranking, predicted: Ranking, *, query: Direction, standard: object, submit: object
) -> dict[str, Any]:
    """The result object: `success`, `score` and `scoreJson`, in percent, unrounded; every query has a prediction.

    Every query of the annotation counts, also one without relevant ids (which nothing can find). If nothing relevant
    is predicted for any query, a note on stderr says so, and calls both sides `standard` and `submit`.

    Relevant {1: [7], 2: [8, 9], 3: []}, predicted {1: [7, …], 2: [5, 9, …], 3: [5, …]}: a query counts once, by its
    first hit, so r1 is 1/3 and r5 and r10 are 2/3 of 100; their mean, `score`, is 55.6.
    """
    # Ids of one form, so that `"7"` in one file is 7 in the other.
    relevant, predicted = (
        {plain_id(query_id): list(map(plain_id, found)) for query_id, found in ranking.items()}
        for ranking in (relevant, predicted)
    )
    expected, found = (
        dict.fromkeys(one for ids in ranking.values() for one in ids) for ranking in (relevant, predicted)
    )
    if expected and expected.keys().isdisjoint(found):
        print(
            both(
                f"提示：{standard} 里的 {len(expected)} 个 {FIELDS[query].found_ids} 一个也没有出现在 {submit} 的结果里"
                f"（例如标注里有 {next(iter(expected))!r}，结果里有 {next(iter(found))!r}），所以得分是 0.00；"
                "两个文件是同一个 split、同一个检索方向吗？",
                f"note: {submit}: none of the {len(expected)} {FIELDS[query].found_ids} of {standard} is predicted "
                f"for any query (one of them is {next(iter(expected))!r}, one predicted is {next(iter(found))!r}), so "
                "the score is 0.00; are both files of the same split and direction?",
            ),
            file=sys.stderr,
        )
    recall = recall_at_k([predicted[query_id] for query_id in relevant], list(relevant.values()))
    return _success(*recall.at.values())


def _success(r1: float, r5: float, r10: float) -> dict[str, Any]:
    mean = (r1 + r5 + r10) / 3 * 100
    percent = {"r1": r1 * 100, "r5": r5 * 100, "r10": r10 * 100}
    return {"success": True, "score": mean, "scoreJson": {"score": mean, "mean_recall": mean, **percent}}


def failure(detail: str, message: str) -> dict[str, Any]:
    """The result object of an evaluation that failed."""
    return {"errorDetail": detail, "errorMsg": message, "score": 0, "scoreJson": {}, "success": False}


# --- annotations ------------------------------------------------------------------------------------------------------


def read_annotation(path: str, *, query: Direction = "text") -> Ranking:
    """Query id -> relevant ids as written, in file order; the last line of an id counts.

    Raises DataError with file and line.
    """
    return dict(read_relevant(path, query=query))


def read_relevant(path: str, *, query: Direction = "text") -> Iterator[tuple[RecordId, list[RecordId]]]:
    """Yields (query id, relevant ids) as each line of an annotation has them; raises DataError with file and line."""
    fields = FIELDS[query]
    for number, record in read_objects(path):
        where = Where(path, line=number)
        for field in (fields.query_id, fields.found_ids):
            if field not in record:
                raise DataError(f"no field {field}, only {sorted(record)}", at=where)
        query_id, found = record[fields.query_id], record[fields.found_ids]
        if not _is_id(query_id, (int, str)):
            raise DataError(f"expected an integer or a string, got {query_id!r}", at=where.of(fields.query_id))
        if not isinstance(found, list) or not all(_is_id(found_id, (int, str)) for found_id in found):
            raise DataError(f"expected a list of integers or strings, got {found!r}", at=where.of(fields.found_ids))
        yield query_id, found


def _is_id(value: object, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


class Turned(NamedTuple):
    """An annotation turned round: the file written, the texts read, and the texts of each picture."""

    output: str
    num_texts: int
    texts_of: Ranking


def turn_round(annotation: str) -> Turned:
    """Writes NAME.tr.jsonl beside NAME.jsonl: one line a picture, in the order of first mention.

    Raises DataError with file and line, before anything is written, for a faulty line.
    """
    texts_of: Ranking = {}
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
            stream.write(line_of("image", image_id, text_ids))
    return Turned(output, num_texts, texts_of)


def line_of(query: Direction, query_id: RecordId, found: list[RecordId]) -> str:
    """A line of an annotation or of a prediction file, line end included."""
    return dumps({FIELDS[query].query_id: query_id, FIELDS[query].found_ids: found}) + "\n"


# --- predictions ------------------------------------------------------------------------------------------------------


def read_predictions(
    path: str, relevant: Ranking, *, query: Direction = "text", num_predictions: int = NUM_PREDICTIONS
) -> Ranking:
    """Query id -> the 10 ids predicted as written, best first; strings only where the annotation has strings.

    Raises DataError in the words of Chinese-CLIP for the first faulty line, then for queries without prediction.
    """
    query_types = _types(relevant)
    found_types = _types(found_id for found in relevant.values() for found_id in found)
    if not os.path.exists(path):
        raise DataError("The submission file is not found!")
    predicted: Ranking = {}
    fields = FIELDS[query]
    for _, data in numbered_lines(path, with_blank=True):
        line = data.decode("utf-8", errors="backslashreplace").strip()
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"Cannot parse this line into json object: {line}") from error
        if not isinstance(record, dict) or fields.query_id not in record:
            raise DataError(f"There exists one line not containing {fields.query_id}: {line}")
        query_id: RecordId = record[fields.query_id]
        if not _is_id(query_id, query_types):
            raise DataError(
                f"Found an invalid {fields.query_id} {query_id}, it should be an integer (not string), "
                "please check your schema"
            )
        if fields.found_ids not in record:
            raise DataError(f"There exists one line not containing the predicted {fields.found_ids}: {line}")
        found = record[fields.found_ids]
        _check_found(found, query_id, fields, found_types, num_predictions)
        predicted[query_id] = found
    check_complete(relevant, predicted, query=query)
    return predicted


def _types(ids: Iterable[RecordId]) -> tuple[type, ...]:
    return (int, str) if any(isinstance(one, str) for one in ids) else (int,)


def _check_found(
    found: object, query_id: RecordId, fields: Fields, types: tuple[type, ...], num_predictions: int
) -> None:
    if not isinstance(found, list):
        raise DataError(
            f"The {fields.found_ids} field of {fields.query_id} {query_id} is not a list, please check your schema"
        )
    subject = f"{fields.query} {query_id} has"
    if len(found) != num_predictions:
        raise DataError(
            f"{subject} wrong number of predicted {fields.found_ids}! Require {num_predictions}, "
            f"but {len(found)} founded."
        )
    for rank, found_id in enumerate(found, start=1):
        if not _is_id(found_id, types):
            raise DataError(
                f"{subject} an invalid predicted {fields.found_id} {found_id} at rank {rank}, "
                "it should be an integer (not string), please check your schema"
            )
    if len(set(map(plain_id, found))) != num_predictions:
        raise DataError(f"{subject} duplicate topk {fields.found_noun} in your prediction. Pleace check again!")


def check_complete(relevant: Collection[RecordId], predicted: Collection[RecordId], *, query: Direction) -> None:
    """Raises DataError in the words of Chinese-CLIP for queries of the annotation without prediction."""
    missing: Collection[RecordId] = set(map(plain_id, relevant)) - set(map(plain_id, predicted))
    if not missing:
        return
    # Integers keep the order of the set, which is that of Chinese-CLIP; strings have another order in each process.
    if any(isinstance(query_id, str) for query_id in missing):
        missing = [query_id for query_id in map(plain_id, relevant) if query_id in missing]
    listed = ", ".join(str(query_id) for query_id in missing)
    raise DataError(
        f"The following {FIELDS[query].query_id}s have no prediction in your submission, please check again: {listed}"
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
    dump_2_json(failure(detail, showMsg), out_p)
