"""Checks of a dataset against its rules, one place for the builder (which stops) and the checker (which lists)."""

import itertools
import os
from collections.abc import Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cn_clip.data.pictures import PictureCheck, check_picture
from cn_clip.data.records import (
    Fault,
    ImageRecord,
    RecordId,
    TextRecord,
    decode_base64,
    read_image_records,
    read_text_records,
)
from cn_clip.errors import DataError

_WINDOW_RECORDS = 64


def images_path(data_dir: str | os.PathLike[str], split: str) -> Path:
    """Where the pictures of a split are."""
    return Path(data_dir) / f"{split}_imgs.tsv"


def texts_path(data_dir: str | os.PathLike[str], split: str) -> Path:
    """Where the sentences of a split are."""
    return Path(data_dir) / f"{split}_texts.jsonl"


def checked_images(
    path: str | os.PathLike[str], *, check: PictureCheck = "decode", num_workers: int = 0
) -> Iterator[ImageRecord | Fault]:
    """The records of a `*_imgs.tsv` in order, a Fault in place of each that breaks a rule.

    Rules: id, tab and UTF-8; the id is new; the base64 is whole; the picture passes `check` (see check_picture).
    num_workers: threads that decode; 0 decodes in this one. At most 64 lines are in memory at a time.
    """
    lines: dict[RecordId, int] = {}
    for item in _checked_pictures(path, read_image_records(path), check, num_workers):
        first = lines.setdefault(item.image_id, item.line) if isinstance(item, ImageRecord) else None
        if isinstance(item, ImageRecord) and first != item.line:
            message = f"duplicate image id {item.image_id!r}, first in line {first}; expected each picture once"
            yield Fault(str(path), item.line, message, item.image_id)
        else:
            yield item


def _checked_pictures(
    path: str | os.PathLike[str], items: Iterable[ImageRecord | Fault], check: PictureCheck, num_workers: int
) -> Iterator[ImageRecord | Fault]:
    def look(item: ImageRecord | Fault) -> ImageRecord | Fault:
        return item if isinstance(item, Fault) else _checked_picture(path, item, check)

    if num_workers <= 0:
        yield from map(look, items)
        return
    iterator = iter(items)
    with ThreadPoolExecutor(num_workers) as pool:  # threads: the decoders of PIL release the interpreter
        while window := list(itertools.islice(iterator, _WINDOW_RECORDS)):
            yield from pool.map(look, window)


def _checked_picture(path: str | os.PathLike[str], record: ImageRecord, check: PictureCheck) -> ImageRecord | Fault:
    try:
        check_picture(decode_base64(record.base64), check)
    except DataError as error:
        return Fault(str(path), record.line, f"image id {record.image_id!r}: {error}", record.image_id)
    return record


def checked_texts(
    path: str | os.PathLike[str], image_ids: Container[RecordId], *, images_file: str | os.PathLike[str]
) -> Iterator[TextRecord | Fault]:
    """The records of a `*_texts.jsonl` in order, a Fault in place of, or before, each that breaks a rule.

    Rules: the fields and their types; the text id is new; each picture named is in `image_ids` and named once. After
    a Fault about one picture comes the record with the other pictures.
    """
    lines: dict[RecordId, int] = {}
    for item in read_text_records(path):
        if isinstance(item, Fault):
            yield item
            continue
        first = lines.setdefault(item.text_id, item.line)
        if first != item.line:
            message = f"duplicate text id {item.text_id!r}, first in line {first}; expected each text id once"
            yield Fault(str(path), item.line, message, item.text_id)
            continue
        yield from _checked_names(path, item, image_ids, images_file)


def _checked_names(
    path: str | os.PathLike[str],
    record: TextRecord,
    known: Container[RecordId],
    images_file: str | os.PathLike[str],
) -> Iterator[TextRecord | Fault]:
    kept: dict[RecordId, None] = {}
    where = f"text id {record.text_id!r}: image_ids"
    for image_id in record.image_ids:
        if image_id in kept:
            message = f"{where} names picture {image_id!r} twice; expected each picture once"
            yield Fault(str(path), record.line, message, record.text_id)
        elif image_id not in known:
            message = (
                f"{where} names picture {image_id!r}, which is not in {images_file}; add it there or remove it here"
            )
            yield Fault(str(path), record.line, message, record.text_id)
        else:
            kept[image_id] = None
    yield TextRecord(record.text_id, record.text, tuple(kept), record.line)
