"""The texts of a split: how they are read, and how they are adapted to the vocabulary."""

import os
from collections.abc import Callable

from cn_clip.clip.inputs import ChineseTexts, TextTransform
from cn_clip.data.records import RecordId, canonical_id
from cn_clip.errors import DataError
from cn_clip.jsonl import json_object, numbered_lines


def preprocess_text(text: str) -> str:
    """Lower-cased, curly double quotes straightened: how Chinese-CLIP adapts text to its vocabulary."""
    return text.lower().replace("\N{LEFT DOUBLE QUOTATION MARK}", '"').replace("\N{RIGHT DOUBLE QUOTATION MARK}", '"')


def preparation(texts: TextTransform) -> Callable[[str], str]:
    """What a text goes through before a tokenizer: `preprocess_text` for Chinese-CLIP's, nothing for others'."""
    return preprocess_text if isinstance(texts, ChineseTexts) else str


def read_texts(path: str | os.PathLike[str]) -> list[tuple[RecordId, str]]:
    """(text id, text as written) of each line of a texts jsonl, in order; image_ids are not looked at.

    Numbers as text are turned into strings. Raises DataError with file and line; an empty file is an error.
    """
    texts = [_read_text(line, f"{path}:{number}") for number, line in numbered_lines(path)]
    if not texts:
        raise DataError(f'{path}: the file is empty; expected lines of {{"text_id": ..., "text": ...}}')
    return texts


def _read_text(line: bytes, where: str) -> tuple[RecordId, str]:
    try:
        record = json_object(line)
        for name in ("text_id", "text"):
            if name not in record:
                raise DataError(f"the field {name!r} is missing; expected text_id and text")
        text_id, text = canonical_id(record["text_id"]), record["text"]
        if isinstance(text, bool) or not isinstance(text, (str, int, float)):
            raise DataError(f"text of text_id {text_id!r}: expected a string, got {type(text).__name__}")
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return text_id, str(text)
