"""The feature JSONL: one vector a line with its id; `files` reads and writes it with the functions here."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import orjson

from cn_clip.data.records import RecordId, plain_id
from cn_clip.errors import DataError, Where
from cn_clip.features.rows import Features, FloatArray, IdField, check_unique
from cn_clip.files import atomic_write
from cn_clip.jsonl import dumps, numbered_lines, parse_object

_NUMBERS = {int, float}


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
                raise DataError(f"a batch has {len(ids)} ids and {len(vectors)} vectors", at=path)
            for item_id, vector in zip(ids, vectors.astype(np.float32, copy=False), strict=True):
                stream.write(dumps({field: item_id, "feature": vector.tolist()}) + "\n")
            num_lines += len(ids)
    return num_lines


def read_lines(path: str | os.PathLike[str], field: IdField, *, progress: bool = False) -> Features:
    """Reads every line but blank ones; ids are as `plain_id` gives them, JSON numbers are rounded to float32.

    Raises DataError with file and line for a line that is no JSON object, lacks `field` or "feature", has an id that
    is neither int nor str or came before, or a vector that is empty, not of numbers, not finite or of another length
    than the first; and for a missing or empty file.
    """
    from tqdm import tqdm

    numbers: list[int] = []
    ids: list[RecordId] = []
    rows: list[FloatArray] = []
    with tqdm(disable=not progress, desc=os.path.basename(path), unit="row") as bar:
        for number, line in numbered_lines(path):
            where = Where(path, line=number)
            item_id, vector = _read_line(line, field, where)
            if rows and len(vector) != len(rows[0]):
                raise DataError(
                    f"has {len(vector)} numbers, the lines before have {len(rows[0])}", at=where.of("feature")
                )
            if not np.isfinite(vector).all():
                raise DataError("holds NaN or infinity; expected finite float32 numbers", at=where.of("feature"))
            numbers.append(number)
            ids.append(item_id)
            rows.append(vector)
            bar.update()
    if not rows:
        raise DataError(f"the file has no lines; expected one JSON object with {field} and feature a line", at=path)
    check_unique(ids, path, field, numbers=numbers, unit="line")
    return Features(ids, np.stack(rows))


def _read_line(line: bytes, field: IdField, where: Where) -> tuple[RecordId, FloatArray]:
    try:
        record = orjson.loads(line)
        item_id, values = record[field], record["feature"]
        if type(item_id) in (int, str) and set(map(type, values)) <= _NUMBERS and values:
            with np.errstate(over="ignore"):
                return plain_id(item_id), np.array(values, dtype=np.float32)
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    # What is no such line, and what orjson does not take: NaN, integers beyond 64 bits. `json` says what is wrong.
    record = parse_object(line, where)
    return _id_of(record, field, where), _vector_of(record, where)


def _id_of(record: dict[str, Any], field: IdField, where: Where) -> RecordId:
    if field not in record:
        raise DataError(f"no field {field}, only {sorted(record)}; is this the file of the other modality?", at=where)
    value = record[field]
    if type(value) is int or type(value) is str:
        return plain_id(value)
    raise DataError(f"expected an integer or a string, got {value!r}", at=where.of(field))


def _vector_of(record: dict[str, Any], where: Where) -> FloatArray:
    if "feature" not in record:
        raise DataError(f"no field feature, only {sorted(record)}; expected a list of numbers", at=where)
    values = record["feature"]
    if not isinstance(values, list) or not values:
        raise DataError(f"expected a list of numbers, got {str(values)[:40]!r}", at=where.of("feature"))
    for position, value in enumerate(values):
        if type(value) not in (int, float):
            raise DataError(f"expected numbers, got {value!r} at position {position}", at=where.of("feature"))
    try:
        with np.errstate(over="ignore"):
            return np.array(values, dtype=np.float32)
    except OverflowError as error:
        raise DataError("a number is too large for float32", at=where.of("feature")) from error
