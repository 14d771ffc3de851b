"""Datasets made of pictures whose names, or a table, carry their Chinese text: which there are, ids, and the files."""

import contextlib
import hashlib
import itertools
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import opencc

from cn_clip.clip.picture_names import PICTURE_SUFFIXES, is_picture_file, passed_over
from cn_clip.data import tables
from cn_clip.data.building import OnFault, print_skipped
from cn_clip.data.checks import images_path, sound_records, texts_path
from cn_clip.data.names import Naming, caption, says_something, stems_of
from cn_clip.data.paths import characters, spelled, walked
from cn_clip.data.pictures import check_picture
from cn_clip.data.records import DATASET, Fault, RecordId, canonical_id, image_line, text_line
from cn_clip.digests import facts_of_bytes, is_file, is_folder, is_there
from cn_clip.errors import DataError
from cn_clip.files import written_together
from cn_clip.language import both
from cn_clip.progress import counted

IdSource: TypeAlias = Literal["auto", "number", "sequence", "name"]

MAX_COPIES_SHOWN = 3
FILE_NAMES = Naming()

logger = logging.getLogger(__name__)

_LEADING_NUMBER = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class Picture:
    """A picture file and its captions. `name` is its path below the folder, as `paths.spelled` spells it; `stems` the
    names that its caption is made of; `given_id` from a table's id column."""

    path: Path
    name: str
    captions: tuple[str, ...]
    stems: tuple[str, ...] = ()
    given_id: RecordId | None = None


def pictures_from_names(folder: Path, naming: Naming = FILE_NAMES) -> Iterator[Picture | Fault]:
    """The picture files below a folder in sorted order, hidden ones left out, captions from their names (UTF-8 or GBK).

    Folders that cannot be listed come first; other files are counted in the log.
    """
    unread: list[Fault] = []
    found: list[Path] = []
    others: list[str] = []

    def note(error: OSError) -> None:
        unread.append(Fault(str(error.filename), None, f"the folder cannot be read ({error.strerror})"))

    for below, _, names in walked(folder, note):
        for name in names:
            path = os.path.join(below, name)
            if is_picture_file(path):
                found.append(Path(path))
            else:
                others.append(name)
    if others:
        logger.warning("%s", passed_over(folder, others))
    yield from unread
    for picture in sorted(found):
        inside = picture.relative_to(folder)
        name, own, around = spelled(inside.as_posix()), characters(inside.name), characters(inside.parent.name)
        if own is None or (around is None and naming.text_from != "name"):
            yield Fault(name, None, "the file name is neither UTF-8 nor GBK, or holds controls; rename the file")
            continue
        stems = stems_of(around or "", own, naming.text_from)
        text = caption(stems, clean=naming.clean)
        if says_something(text):
            yield Picture(picture, unicodedata.normalize("NFC", name), (text,), stems)
        elif text:
            message = (
                f"its name holds no word, only {text!r}, of which the model knows nothing; rename it or give --table"
            )
            yield Fault(spelled(str(picture)), None, message)
        elif naming.text_from == "folder":
            message = "is in no folder below --folder whose name carries a text; choose --text-from name or both"
            yield Fault(spelled(str(picture)), None, message)
        else:
            message = "the file name carries no text; expected a name such as 0001妙蛙种子.png"
            yield Fault(spelled(str(picture)), None, message)


def pictures_from_table(
    table: Path, folder: Path, *, image_column: str, text_column: str, id_column: str | None
) -> Iterator[Picture | Fault]:
    """The pictures that a table names, in the order of their first rows; see `tables` for its kinds.

    Several rows of one picture are several captions. Raises DataError when the table cannot be read or lacks a
    column.
    """
    merged: dict[str, tuple[Path, dict[str, None], RecordId | None]] = {}
    owners: dict[RecordId, str] = {}
    columns = [image_column, text_column, *([id_column] if id_column else [])]

    def check(present: Sequence[str]) -> None:
        for column in columns:
            if column not in present:
                raise DataError(
                    f"has no column {column!r}; it has {', '.join(present) or 'none'}; name the right ones with "
                    "--image-column and --text-column",
                    at=table,
                )

    rows = tables.read_rows(table, (image_column, text_column), check, only=columns)
    for line, row in counted(rows, both("行", "rows"), both("读取表格", "reading the table")):
        try:
            if None in row:
                raise DataError("has more cells than the first line; put a text with commas into double quotes")
            name, text = Path(_cell(row, image_column)).as_posix(), _text_cell(row, text_column)
            path = folder / name
            if not is_file(path):
                raise DataError(f"column {image_column!r} names {str(path)!r}, which does not exist")
            given_id = canonical_id(row.get(id_column)) if id_column else None
            first = merged.setdefault(name, (path, {}, given_id))
            if first[2] != given_id:
                raise DataError(f"picture {name!r} has the id {given_id!r} here and {first[2]!r} in an earlier row")
            if given_id is not None and owners.setdefault(given_id, name) != name:
                del merged[name]
                raise DataError(f"duplicate image id {given_id!r}, first that of picture {owners[given_id]!r}")
            first[1][text] = None
        except DataError as error:
            yield Fault(str(table), line, str(error))
    for name, (path, captions, given_id) in merged.items():
        yield Picture(path, name, tuple(captions), given_id=given_id)


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, (bytes, dict, list)):
        raise DataError(f"column {column!r}: expected text, got {type(value).__name__}; give a column of file names")
    text = "" if value is None else unicodedata.normalize("NFC", str(value)).strip()
    if not text:
        raise DataError(f"column {column!r} is empty")
    return text


def _text_cell(row: dict[str, Any], column: str) -> str:
    text = _cell(row, column)
    if not says_something(text):
        raise DataError(f"column {column!r} holds no word, only {text[:20]!r}, of which the model knows nothing")
    return text


def assign_ids(pictures: list[Picture], source: IdSource) -> list[RecordId]:
    """An id per picture, in order: the given ones where there are any, else by `source`.

    number: the number that the file name starts with; sequence: 0, 1, 2, ...; name: the name; auto: numbers when
    every picture has one of its own, else the sequence. Raises DataError when numbers lack or repeat.
    """
    given = [picture.given_id for picture in pictures]
    if given and all(one is not None for one in given):
        return [one for one in given if one is not None]
    if source == "auto":
        numbers = {number for picture in pictures if (number := _leading_number(picture)) is not None}
        source = "number" if len(numbers) == len(pictures) else "sequence"
    if source == "sequence":
        return list(range(len(pictures)))
    if source == "name":
        return [canonical_id(picture.name) for picture in pictures]
    owners: dict[RecordId, Picture] = {}
    for picture in pictures:
        number = _leading_number(picture)
        if number is None:
            raise DataError("the file name starts with no number; use --ids sequence or name", at=picture.path)
        if owners.setdefault(number, picture) is not picture:
            raise DataError(f"its number {number} is also that of {owners[number].path}", at=picture.path)
    return list(owners)


def _leading_number(picture: Picture) -> int | None:
    match = _LEADING_NUMBER.match(picture.path.name)
    return int(match[0]) if match and len(match[0]) <= 18 else None  # a longer one is not a counter


# --- the files of a dataset -------------------------------------------------------------------------------------------


@dataclass
class SplitContent:
    """What goes into one split: how many pictures, and each sentence with its pictures."""

    num_images: int = 0
    texts: dict[str, list[RecordId]] = field(default_factory=dict)


@dataclass(frozen=True)
class Division:
    """How pictures become splits: the share of each, together 1, and the seed of the hash that divides them."""

    shares: Mapping[str, float]
    seed: int = 0


@dataclass(frozen=True)
class Listing:
    """The pictures of a folder or table with their ids. source: which, for errors; faults: what was skipped so far."""

    source: str
    pictures: list[tuple[RecordId, Picture]]
    faults: list[Fault]


@dataclass
class Copies:
    """Pictures of the same bytes as an earlier one. examples: (the copy, the first), some of them."""

    count: int = 0
    num_other_captions: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


def list_pictures(
    folder: str | None,
    table: str | None,
    *,
    columns: Mapping[str, Any],
    naming: Naming,
    ids: IdSource,
    simplify: bool,
    on_error: OnFault,
) -> Listing:
    """The pictures that a dataset is to be made of; what is skipped is listed on stderr if nothing is left.

    columns: of the table, the arguments of `pictures_from_table`.
    Raises DataError at the first fault unless faults are skipped, and when nothing is left.
    """
    at, faults = Path(folder) if folder is not None else Path(str(table)).parent, list[Fault]()
    if not is_folder(at):
        raise DataError("no such folder; --folder is the folder of the pictures", at=at)
    found = pictures_from_names(at, naming) if table is None else pictures_from_table(Path(table), at, **columns)
    convert = opencc.OpenCC("t2s").convert if simplify else str
    pictures = [
        replace(one, captions=tuple(dict.fromkeys(map(convert, one.captions))))
        for one in sound_records(
            counted(found, both("张图片", "pictures"), both("查找图片", "listing the pictures")), on_error, faults
        )
    ]
    source = str(table or folder)
    if not pictures:
        print_skipped(faults, source)
        endings = ", ".join(PICTURE_SUFFIXES)
        raise DataError(f"no usable picture; expected files ending in {endings} and their text", at=source)
    return Listing(source, list(zip(assign_ids(pictures, ids), pictures, strict=True)), faults)


def write_dataset(
    output: Path, listing: Listing, division: Division, *, on_error: OnFault
) -> tuple[dict[str, SplitContent], Copies]:
    """Writes {split}_imgs.tsv and {split}_texts.jsonl of all splits at once; what is skipped is listed on stderr.

    Returns the splits that are not empty; adds the faults that were skipped to those of the listing.
    Raises DataError at the first fault unless faults are skipped, and when nothing is left.
    """
    copies = Copies()
    try:
        with written_together(output / DATASET, told=output) as scratch:
            sound = sound_records(_read(listing.pictures), on_error, listing.faults)
            splits = _write_images(scratch, sound, division, copies)
            text_ids = itertools.count()  # one count for all splits: no id is used twice
            for name, split in splits.items():
                with open(texts_path(scratch, name), "w", encoding="utf-8", newline="\n") as stream:
                    stream.writelines(text_line(next(text_ids), text, found) for text, found in split.texts.items())
            if not splits:
                raise DataError("no picture of it can be read; see the list of faults", at=listing.source)
            for name in (one for one in division.shares if one not in splits):
                for path in (images_path(output, name), texts_path(output, name)):
                    if is_there(path):
                        raise DataError(
                            f"is of an earlier run, and this one puts nothing into {name}; "
                            "remove it or choose another --output",
                            at=path,
                        )
            for path in sorted(scratch.iterdir()):
                if (output / path.name).exists():
                    old = output / path.name
                    print(both(f"将覆盖已有的文件 {old}", f"We will overwrite an existing file {old}"), file=sys.stderr)
    finally:
        print_skipped(listing.faults, listing.source)
    return splits, copies


def _read(pictures: list[tuple[RecordId, Picture]]) -> Iterator[tuple[RecordId, Picture, bytes] | Fault]:
    for image_id, picture in counted(pictures, both("张", "pictures"), both("读取图片", "reading pictures")):
        try:
            data = picture.path.read_bytes()
            check_picture(data, "decode")
        except OSError as error:
            yield Fault(str(picture.path), None, f"cannot be read ({error.strerror})", image_id)
        except DataError as error:
            yield Fault(str(picture.path), None, str(error), image_id)
        else:
            yield image_id, picture, data


def _write_images(
    scratch: Path, pictures: Iterable[tuple[RecordId, Picture, bytes]], division: Division, copies: Copies
) -> dict[str, SplitContent]:
    """Writes the tsv files; returns the splits that got a picture, in the order of the shares.

    A copy goes where the first picture of these bytes went: else a model would be tested on what it was trained on.
    """
    splits: dict[str, SplitContent] = {}
    firsts: dict[str, tuple[Picture, str]] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for image_id, picture, data in pictures:
            key = picture.name if picture.given_id is None else str(picture.given_id)
            own = split_of(key, division.shares, division.seed)
            first, name = firsts.setdefault(facts_of_bytes(data).digest, (picture, own))
            if first is not picture:
                copies.count += 1
                copies.num_other_captions += first.captions != picture.captions
                if len(copies.examples) < MAX_COPIES_SHOWN:
                    copies.examples.append((picture.name, first.name))
            if name not in files:
                files[name] = stack.enter_context(open(images_path(scratch, name), "wb"))
            files[name].write(image_line(image_id, data))
            split = splits.setdefault(name, SplitContent())
            split.num_images += 1
            for text in picture.captions:
                split.texts.setdefault(text, []).append(image_id)
    return {name: splits[name] for name in division.shares if name in splits}


def split_of(key: str, shares: Mapping[str, float], seed: int) -> str:
    """The split of a picture: a fraction in [0, 1) hashed from the seed and its id or name, laid onto the shares."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    fraction = (int.from_bytes(digest, "big") >> 11) / 2**53
    bound = 0.0
    for split, share in shares.items():
        bound += share
        if fraction < bound:
            return split
    return [split for split, share in shares.items() if share][-1]  # the shares' sum was rounded down
