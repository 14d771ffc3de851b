"""The texts of a split, as they are read from its file."""

import os

from cn_clip.data.records import RecordId, text_fields
from cn_clip.errors import DataError, Where
from cn_clip.jsonl import json_object, numbered_lines


def read_texts(path: str | os.PathLike[str]) -> list[tuple[RecordId, str]]:
    """(text id, text as written) of each line of a texts jsonl, in order; image_ids are not looked at.

    Numbers as text are turned into strings. Raises DataError with file and line; an empty file is an error.
    """
    texts = [_read_text(line, Where(path, line=number)) for number, line in numbered_lines(path)]
    if not texts:
        raise DataError('the file is empty; expected lines of {"text_id": ..., "text": ...}', at=path)
    return texts


def _read_text(line: bytes, where: Where) -> tuple[RecordId, str]:
    try:
        return text_fields(json_object(line))
    except DataError as error:
        raise DataError(error, at=where) from error
