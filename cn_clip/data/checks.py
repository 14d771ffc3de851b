"""Checks a dataset against its rules, for the builder, which stops at a fault, and the checker, which lists all."""

import itertools
import os
from base64 import b64encode
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from cn_clip.clip.pictures import opened
from cn_clip.data.lmdb_store import IMAGES, PAIRS, ImageStore, Pair, PairStore
from cn_clip.data.pictures import PictureCheck, check_picture, shrunk
from cn_clip.data.records import (
    Fault,
    ImageRecord,
    RecordId,
    TextRecord,
    decode_base64,
    read_image_records,
    read_text_records,
)
from cn_clip.digests import is_file, is_folder, is_there
from cn_clip.errors import DataError, UnreadableError
from cn_clip.files import settle
from cn_clip.language import both

_WINDOW_RECORDS = 64

ItemT = TypeVar("ItemT")
T = TypeVar("T")


def images_path(data_dir: str | os.PathLike[str], split: str) -> Path:
    """Where the pictures of a split are."""
    return Path(data_dir) / f"{split}_imgs.tsv"


def texts_path(data_dir: str | os.PathLike[str], split: str) -> Path:
    """Where the sentences of a split are."""
    return Path(data_dir) / f"{split}_texts.jsonl"


def check_folder(data_dir: str | os.PathLike[str]) -> None:
    """Raises DataError when the folder of the tsv and jsonl files does not exist."""
    settle(data_dir)
    if not is_folder(data_dir):
        raise DataError("the data_dir does not exist; give the folder of the tsv and jsonl files", at=data_dir)


def splits_in(data_dir: Path, lmdb_dir: Path) -> list[str]:
    """The splits of which there is a file or an LMDB; raises DataError when there is none."""
    found = {path.name.removesuffix("_imgs.tsv") for path in data_dir.glob("*_imgs.tsv")}
    found |= {path.name.removesuffix("_texts.jsonl") for path in data_dir.glob("*_texts.jsonl")}
    found |= {path.parent.name for path in lmdb_dir.glob(f"*/{IMAGES}") if not path.parent.name.startswith(".")}
    if not found:
        raise DataError("holds no dataset; expected files such as train_imgs.tsv and train_texts.jsonl", at=data_dir)
    return sorted(found)


def sound_records(items: Iterable[T | Fault], on_error: Literal["stop", "skip"], faults: list[Fault]) -> Iterator[T]:
    """The items that are no faults. At a fault: raises DataError ("stop"), or appends it to `faults` ("skip")."""
    for item in items:
        if not isinstance(item, Fault):
            yield item
        elif on_error == "skip":
            faults.append(item)
        else:
            raise DataError(f"{item} (nothing of it was written; `--on-error skip` skips and lists such records)")


def by_threads(work: Callable[[ItemT], T], items: Iterable[ItemT], num_threads: int) -> Iterator[T]:
    """What `work` makes of each item, in order; num_threads 0: in this thread. At most 64 are in memory at a time."""
    if not num_threads:
        yield from map(work, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(num_threads) as pool:  # threads: the decoders of PIL release the interpreter
        while window := list(itertools.islice(rest, _WINDOW_RECORDS)):
            yield from pool.map(work, window)


def checked_images(
    path: str | os.PathLike[str], *, check: PictureCheck = "decode", num_workers: int = 0, shrink: int | None = None
) -> Iterator[ImageRecord | Fault]:
    """The records of a `*_imgs.tsv` in order, a Fault instead of each that breaks a rule.

    Rules: id, tab and UTF-8; the id is new; the base64 is whole; the picture passes `check` (see check_picture).
    num_workers: threads that decode; 0 decodes in this one. At most 64 lines are in memory at a time.
    shrink: makes pictures smaller, see `pictures.shrunk`; None: they stay as they are.
    """

    def look(item: ImageRecord | Fault) -> ImageRecord | Fault:
        if isinstance(item, Fault):
            return item
        try:
            data = decode_base64(item.base64)
            small = data if shrink is None else shrunk(data, shrink)
            if small is not data:  # decoded whole, and grey of 8 bits at most
                return replace(item, base64=b64encode(small), is_shrunk=True)
            return replace(item, is_deep=check_picture(data, check))
        except DataError as error:
            return Fault(str(path), item.line, f"image id {item.image_id!r}: {error}", item.image_id)

    lines: dict[RecordId, int] = {}
    for item in by_threads(look, read_image_records(path), num_workers):
        first = lines.setdefault(item.image_id, item.line) if isinstance(item, ImageRecord) else None
        if isinstance(item, ImageRecord) and first != item.line:
            message = f"duplicate image id {item.image_id!r}, first in line {first}; expected each picture once"
            yield Fault(str(path), item.line, message, item.image_id)
        else:
            yield item


def checked_texts(
    path: str | os.PathLike[str], image_ids: Container[RecordId], *, images_file: str | os.PathLike[str]
) -> Iterator[TextRecord | Fault]:
    """The records of a `*_texts.jsonl` in order, a Fault instead of, or before, each that breaks a rule.

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
        kept: dict[RecordId, None] = {}
        for image_id in item.image_ids:
            if image_id not in kept and image_id in image_ids:
                kept[image_id] = None
                continue
            what = " twice; expected each picture once"
            if image_id not in kept:
                what = f", which is not in {images_file}; add it there or remove it here"
            message = f"text id {item.text_id!r}: image_ids names picture {image_id!r}{what}"
            yield Fault(str(path), item.line, message, item.text_id)
        yield TextRecord(item.text_id, item.text, tuple(kept), item.line)


@dataclass
class SplitCheck:
    """What a check of one split saw; `num_pairs` counts LMDB pairs and is None when the split has no LMDB.

    num_deep: pictures in grey of more than 8 bits. num_blank: texts without a character to see. num_shrunk: pictures
    that the LMDB has smaller (`--shrink`).
    """

    split: str
    num_images: int = 0
    num_texts: int = 0
    num_deep: int = 0
    num_blank: int = 0
    num_shrunk: int = 0
    num_pairs: int | None = None
    faults: list[Fault] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What is not a fault but worth knowing."""
        deep, blank, small = self.num_deep, self.num_blank, self.num_shrunk
        deep_note = both(
            f"{deep} 张图片是超过 8 位的灰度图：这里缩放到 8 位，Chinese-CLIP 则把大于 255 的都变成白色"
            "（--decode reference 与它相同）",
            f"{deep} pictures are grey of more than 8 bits: they are scaled to 8, where Chinese-CLIP clips to white "
            "what is above 255 (as does --decode reference)",
        )
        blank_note = both(
            f"{blank} 条文本是空的或只有空白：照原样参与训练和检索",
            f"{blank} texts are empty or blank: they are trained on and searched for as they are",
        )
        small_note = both(
            f"LMDB 里有 {small} 张图片比 tsv 里的小（cn-clip dataset build --shrink）",
            f"{small} pictures of the LMDB are smaller than in the tsv file (cn-clip dataset build --shrink)",
        )
        notes = ((deep_note, deep), (blank_note, blank), (small_note, small))
        return [note for note, count in notes if count]

    def as_dict(self) -> dict[str, Any]:
        """The check as JSON holds it."""
        return {
            "split": self.split,
            "images": self.num_images,
            "texts": self.num_texts,
            "pairs": self.num_pairs,
            "notes": self.notes,
            "faults": [fault.as_dict() for fault in self.faults],
        }


def check_split(
    data_dir: str | os.PathLike[str],
    split: str,
    lmdb_folder: Path,
    *,
    check: PictureCheck = "decode",
    num_workers: int = 0,
) -> SplitCheck:
    """Reads the files of a split, and its LMDB folder if there is one, to the end; lists every fault.

    An LMDB is compared with the files record by record; without the files it is checked by itself. num_images and
    num_texts count the records without fault.
    """
    result = SplitCheck(split)
    images_file, texts_file = images_path(data_dir, split), texts_path(data_dir, split)
    stores: tuple[ImageStore, PairStore] | None = None
    try:
        if is_there(lmdb_folder):
            stores = ImageStore(lmdb_folder / IMAGES), PairStore(lmdb_folder / PAIRS)
            said, held, result.num_pairs = stores[0].num_images, len(stores[0].listed), len(stores[1])
            if said != held:
                message = f"num_images says {said}, but it holds {held} pictures; build it again"
                result.faults.append(Fault(stores[0].folder, None, message))
    except DataError as error:
        stores, result.num_pairs = None, None
        result.faults.append(Fault(str(lmdb_folder), None, str(error)))
    try:
        absent = [path for path in (images_file, texts_file) if not is_file(path)]
    except UnreadableError as error:  # no word on what else there is: it would be compared with nothing
        result.faults.append(Fault(str(data_dir), None, str(error)))
        return result
    if stores and len(absent) == 2:
        _check_stores(stores, result, check)
        return result
    for path in absent:
        result.faults.append(Fault(str(path), None, "no such file; a split has _imgs.tsv and _texts.jsonl"))
    records = checked_images(images_file, check=check, num_workers=num_workers) if images_file not in absent else ()
    known = _check_images(records, stores, result)
    texts = checked_texts(texts_file, known, images_file=images_file) if texts_file not in absent else ()
    _check_texts(texts, stores, result)
    return result


def _check_images(
    items: Iterable[ImageRecord | Fault], stores: tuple[ImageStore, PairStore] | None, result: SplitCheck
) -> set[RecordId]:
    known: set[RecordId] = set()
    for item in items:
        if isinstance(item, Fault):
            result.faults.append(item)
            continue
        known.add(item.image_id)
        result.num_deep += item.is_deep
        stored = stores[0].base64(item.image_id) if stores else item.base64
        if stores and stored is not None and _is_shrunk(item.base64, stored):
            result.num_shrunk += 1
        elif stores and stored != item.base64:
            state = "is missing" if stored is None else "is not the picture of the tsv file"
            message = f"image id {item.image_id!r} (line {item.line} of the tsv file) {state}; build the LMDB again"
            result.faults.append(Fault(stores[0].folder, None, message, item.image_id))
    result.num_images = len(known)
    if stores:
        message = "has no sound line in the tsv file; build the LMDB again"
        surplus = [image_id for image_id in stores[0].listed if image_id not in known]
        result.faults.extend(Fault(stores[0].folder, None, f"image id {x!r} {message}", x) for x in surplus)
    return known


def _is_shrunk(original: bytes, stored: bytes) -> bool:
    """Whether base64 that is stored is that of the original picture, made smaller by `--shrink`."""
    if len(stored) >= len(original):
        return False
    try:
        picture = decode_base64(stored)
        return shrunk(decode_base64(original), min(opened(picture).size)) == picture
    except Exception:  # not a picture: whatever PIL raises
        return False


def _check_texts(
    items: Iterable[TextRecord | Fault], stores: tuple[ImageStore, PairStore] | None, result: SplitCheck
) -> None:
    expected: list[tuple[Pair, int]] = []
    for item in items:
        if isinstance(item, Fault):
            result.faults.append(item)
            continue
        result.num_texts += 1
        result.num_blank += not item.text.strip()
        if stores:
            expected.extend((Pair(image_id, item.text_id, item.text), item.line) for image_id in item.image_ids)
    if stores is None:
        return
    pairs = stores[1]
    if len(pairs) != len(expected):
        message = f"holds {len(pairs)} pairs, the jsonl file {len(expected)}; build the LMDB again"
        result.faults.append(Fault(pairs.folder, None, message))
    for index, (pair, line) in zip(range(len(pairs)), expected, strict=False):
        try:
            stored = pairs[index]
        except DataError as error:
            message = str(error).removeprefix(f"{pairs.folder}: ")
            result.faults.append(Fault(pairs.folder, None, message, pair.text_id))
            continue
        if stored != pair:  # one is enough: the numbers after it are shifted
            message = (
                f"pair {index} is {tuple(stored)}, line {line} of the jsonl file says {tuple(pair)}; build it again"
            )
            result.faults.append(Fault(pairs.folder, None, message, pair.text_id))
            return


def _check_stores(stores: tuple[ImageStore, PairStore], result: SplitCheck, check: PictureCheck) -> None:
    images, pairs = stores
    for image_id in images.listed:
        try:
            result.num_deep += check_picture(images.picture(image_id), check)
            result.num_images += 1
        except DataError as error:
            message = str(error).removeprefix(f"{images.folder}: image id {image_id!r}: ")
            result.faults.append(Fault(images.folder, None, f"image id {image_id!r}: {message}", image_id))
    known, texts = set(images.listed), dict[RecordId, str]()
    for index in range(len(pairs)):
        try:
            pair = pairs[index]
        except DataError as error:
            result.faults.append(Fault(pairs.folder, None, str(error).removeprefix(f"{pairs.folder}: ")))
            continue
        texts[pair.text_id] = pair.text
        if pair.image_id not in known:
            message = f"pair {index} names picture {pair.image_id!r}, which is not in {images.folder}"
            result.faults.append(Fault(pairs.folder, None, message, pair.text_id))
    result.num_texts, result.num_blank = len(texts), sum(not text.strip() for text in texts.values())
