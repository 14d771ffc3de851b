"""The feature JSONL: one vector a line with its id; feature_files reads and writes it with the functions here."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from cn_clip.data.records import RecordId, plain_id
from cn_clip.errors import DataError
from cn_clip.features.decimal_text import parse_rows
from cn_clip.features.rows import Features, FloatArray, IdField, check_unique, first_not_finite
from cn_clip.files import atomic_write
from cn_clip.jsonl import dumps, numbered_lines, parse_object

Line = tuple[int, bytes]

# Enough numbers to hide the cost of a numpy call, few enough to stay in the processor's cache.
_LINES_A_BATCH = 32


def write_features(
    path: str | os.PathLike[str], field: IdField, batches: Iterable[tuple[Sequence[RecordId], FloatArray]]
) -> int:
    """Writes (ids, float32 vectors, one row an id) batch by batch; the file appears whole or not at all.

    Numbers are the float32 values in Python's shortest float form. Returns the number of lines.
    Raises DataError when the folder is missing or a batch has other numbers of ids and rows.
    """
    num_lines = 0
    with atomic_write(path) as stream:
        for ids, vectors in batches:
            if len(ids) != len(vectors):
                raise DataError(f"{path}: a batch has {len(ids)} ids and {len(vectors)} vectors")
            for item_id, vector in zip(ids, vectors.astype(np.float32, copy=False), strict=True):
                stream.write(dumps({field: item_id, "feature": vector.tolist()}) + "\n")
            num_lines += len(ids)
    return num_lines


def read_lines(path: str | os.PathLike[str], field: IdField, *, progress: bool = False) -> Features:
    """Reads every line but blank ones; ids are as `plain_id` gives them, numbers rounded as float32(float(text)).

    Raises DataError with file and line for a line that is no JSON object, lacks `field` or "feature", has an id that
    is neither int nor str or came before, or a vector that is empty, not of numbers, not finite or of another length
    than the first; and for a missing or empty file.
    """
    from tqdm import tqdm

    numbers: list[int] = []
    ids: list[RecordId] = []
    rows: list[FloatArray] = []
    lines = numbered_lines(path)
    with tqdm(disable=not progress, desc=os.path.basename(path), unit="row") as bar:
        while batch := list(islice(lines, _LINES_A_BATCH)):
            batch_ids, vectors = _read_batch(batch, field, path)
            _check_vectors(vectors, rows[0].shape[1] if rows else vectors.shape[1], batch, path)
            numbers += [number for number, _ in batch]
            ids += batch_ids
            rows.append(vectors)
            bar.update(len(batch))
    if not rows:
        raise DataError(f"{path}: the file has no lines; expected one JSON object with {field} and feature a line")
    check_unique(ids, path, field, numbers=numbers, unit="line")
    return Features(ids, np.concatenate(rows))


def _read_batch(batch: list[Line], field: IdField, path: str | os.PathLike[str]) -> tuple[list[RecordId], FloatArray]:
    try:
        return _read_canonical(batch, field)
    except ValueError:
        ids, vectors = zip(*_read_one_by_one(batch, field, path), strict=True)
        return list(ids), np.stack(vectors)


def _read_canonical(batch: list[Line], field: IdField) -> tuple[list[RecordId], FloatArray]:
    """Reads lines of the form this package writes; raises ValueError for all others, faulty or not."""
    ids: list[RecordId] = []
    bodies: list[bytes] = []
    for _, line in batch:
        opening = line.index(b"[")
        if not line.endswith(b"]}"):
            raise ValueError("the vector is not the last field")
        head = json.loads(line[:opening] + b"0}")
        if head.keys() != {field, "feature"} or head["feature"] != 0 or type(head[field]) not in (int, str):
            raise ValueError("other fields")
        ids.append(plain_id(head[field]))
        bodies.append(line[opening + 1 : -2])
    return ids, parse_rows(bodies)


def _read_one_by_one(
    batch: list[Line], field: IdField, path: str | os.PathLike[str]
) -> Iterator[tuple[RecordId, FloatArray]]:
    length: int | None = None
    for number, line in batch:
        where = f"{path}:{number}"
        record = parse_object(line, where)
        item_id, vector = _id_of(record, field, where), _vector_of(record, where)
        length = length or len(vector)
        _check_length(len(vector), length, where)
        yield item_id, vector


def _id_of(record: dict[str, Any], field: IdField, where: str) -> RecordId:
    if field not in record:
        raise DataError(f"{where}: no field {field}, only {sorted(record)}; is this the file of the other modality?")
    value = record[field]
    if type(value) is int or type(value) is str:
        return plain_id(value)
    raise DataError(f"{where} {field}: expected an integer or a string, got {value!r}")


def _vector_of(record: dict[str, Any], where: str) -> FloatArray:
    if "feature" not in record:
        raise DataError(f"{where}: no field feature, only {sorted(record)}; expected a list of numbers")
    values = record["feature"]
    if not isinstance(values, list) or not values:
        raise DataError(f"{where} feature: expected a list of numbers, got {str(values)[:40]!r}")
    for position, value in enumerate(values):
        if type(value) not in (int, float):
            raise DataError(f"{where} feature: expected numbers, got {value!r} at position {position}")
    try:
        with np.errstate(over="ignore"):
            return np.array(values, dtype=np.float32)
    except OverflowError as error:
        raise DataError(f"{where} feature: a number is too large for float32") from error


def _check_length(found: int, expected: int, where: str) -> None:
    if found != expected:
        raise DataError(f"{where} feature: has {found} numbers, the lines before have {expected}")


def _check_vectors(vectors: FloatArray, length: int, batch: list[Line], path: str | os.PathLike[str]) -> None:
    _check_length(vectors.shape[1], length, f"{path}:{batch[0][0]}")
    faulty = first_not_finite(vectors)
    if faulty is not None:
        number = batch[faulty][0]
        raise DataError(f"{path}:{number} feature: holds NaN or infinity; expected finite float32 numbers")
