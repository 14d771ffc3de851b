"""Vectors with their ids, and what holds for them in every kind of feature file."""

# N rows, D embedding

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cn_clip.data.records import RecordId
from cn_clip.errors import DataError, Where

IdField: TypeAlias = Literal["image_id", "text_id"]
FloatArray: TypeAlias = NDArray[np.float32]
# Consecutive rows (B, D) in the order of their ids.
Blocks: TypeAlias = Iterable[FloatArray]


class Features(NamedTuple):
    """Ids in the order of the file, and their vectors: float32, finite, one row an id."""

    ids: list[RecordId]
    vectors: FloatArray


class Block(NamedTuple):
    """Consecutive rows of a file, as `Features`. columns: what lies beside the vectors, by name, None without a value.

    The column `thumbnail` holds bytes, the others what JSON holds.
    """

    ids: list[RecordId]
    vectors: FloatArray
    columns: Mapping[str, Sequence[Any]]


def check_unique(
    ids: Sequence[RecordId],
    path: str | os.PathLike[str],
    field: IdField,
    *,
    numbers: Sequence[int] | None = None,
    unit: str = "row",
) -> None:
    """Raises DataError naming both rows of an id that comes twice; numbers: of the rows, default from 1."""
    if len(set(ids)) == len(ids):
        return
    first: dict[RecordId, int] = {}
    for item_id, number in zip(ids, numbers or range(1, len(ids) + 1), strict=True):
        if item_id in first:
            line, part = (number, None) if unit == "line" else (None, f"{unit} {number}")
            where = Where(path, line=line, part=part, field=field, id=item_id)
            raise DataError(f"{item_id!r} is already on {unit} {first[item_id]}", at=where)
        first[item_id] = number


def first_not_finite(vectors_ND: FloatArray) -> int | None:
    """The position of the first row that holds NaN or infinity, None when there is none."""
    finite = np.isfinite(vectors_ND).all(axis=1)
    return None if finite.all() else int(np.argmin(finite))
