"""Datasets made of pictures whose names, or a table, carry their Chinese text: which there are, ids, and the files."""

import contextlib
import hashlib
import itertools
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import opencc

from cn_clip.clip.picture_names import PICTURE_SUFFIXES, is_picture_file, passed_over
from cn_clip.data import tables
from cn_clip.data.building import OnFault, print_skipped
from cn_clip.data.checks import images_path, sound_records, texts_path
from cn_clip.data.paths import characters, spelled, walked
from cn_clip.data.pictures import check_picture
from cn_clip.data.records import DATASET, Fault, RecordId, canonical_id, image_line, text_line
from cn_clip.digests import is_file, is_folder, is_there
from cn_clip.errors import DataError
from cn_clip.files import written_together
from cn_clip.language import both
from cn_clip.progress import counted

IdSource: TypeAlias = Literal["auto", "number", "sequence", "name"]

logger = logging.getLogger(__name__)

_LEADING_NUMBER = re.compile(r"[0-9]+")
_LEADING_COUNTER = re.compile(r"\A[0-9_\-\s]+")


@dataclass(frozen=True)
class Picture:
    """A picture file and its captions. `name` is its path below the folder, as `paths.spelled` spells it; `given_id`
    from a table's id column."""

    path: Path
    name: str
    captions: tuple[str, ...]
    given_id: RecordId | None = None


def caption_of(file_name: str) -> str:
    """`0001妙蛙种子.png` -> 妙蛙种子: no ending, no leading digits, blanks, `_`, `-`; "" if nothing is left."""
    stem = unicodedata.normalize("NFC", Path(file_name).stem)
    return _LEADING_COUNTER.sub("", stem).strip()


def pictures_from_names(folder: Path) -> Iterator[Picture | Fault]:
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
        name, text = spelled(picture.relative_to(folder).as_posix()), characters(picture.name)
        if text is None:
            yield Fault(name, None, "the file name is neither UTF-8 nor GBK, or holds controls; rename the file")
        elif caption := caption_of(text):
            yield Picture(picture, unicodedata.normalize("NFC", name), (caption,))
        else:
            yield Fault(
                spelled(str(picture)), None, "the file name carries no text; expected a name such as 0001妙蛙种子.png"
            )


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

    for line, row in tables.read_rows(table, (image_column, text_column), check, only=columns):
        try:
            if None in row:
                raise DataError("has more cells than the first line; put a text with commas into double quotes")
            name, text = Path(_cell(row, image_column)).as_posix(), _cell(row, text_column)
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
        yield Picture(path, name, tuple(captions), given_id)


def _cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, (bytes, dict, list)):
        raise DataError(f"column {column!r}: expected text, got {type(value).__name__}; give a column of file names")
    text = "" if value is None else unicodedata.normalize("NFC", str(value)).strip()
    if not text:
        raise DataError(f"column {column!r} is empty")
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


def make_dataset(
    output: Path,
    folder: str | None,
    table: str | None,
    *,
    columns: Mapping[str, str | None],
    ids: IdSource,
    shares: Mapping[str, float],
    seed: int,
    simplify: bool,
    on_error: OnFault,
) -> tuple[dict[str, SplitContent], list[Fault]]:
    """Writes {split}_imgs.tsv and {split}_texts.jsonl of all splits at once; what is skipped is listed on stderr.

    columns: of the table, the arguments of `pictures_from_table`. shares: the share of each split, together 1.
    Returns the splits that are not empty, and the faults that were skipped.
    Raises DataError at the first fault unless faults are skipped, and when nothing is left.
    """
    faults: list[Fault] = []
    try:
        pictures = _listed(folder, table, columns, ids, on_error, faults)
        with written_together(output / DATASET, told=output) as scratch:
            sound = sound_records(_read(pictures), on_error, faults)
            convert = opencc.OpenCC("t2s").convert if simplify else str
            splits = _write_images(scratch, sound, shares, seed, convert)
            text_ids = itertools.count()  # one count for all splits: no id is used twice
            for name, split in splits.items():
                with open(texts_path(scratch, name), "w", encoding="utf-8", newline="\n") as stream:
                    stream.writelines(text_line(next(text_ids), text, found) for text, found in split.texts.items())
            if not splits:
                raise DataError("no picture of it can be read; see the list of faults", at=table or folder)
            for name in (one for one in shares if one not in splits):
                for path in (images_path(output, name), texts_path(output, name)):
                    if is_there(path):
                        raise DataError(
                            f"is of an earlier run, and this one puts nothing into {name}; "
                            "remove it or choose another --output",
                            at=path,
                        )
            for path in sorted(scratch.iterdir()):
                if (output / path.name).exists():
                    print(f"We will overwrite an existing file {output / path.name}", file=sys.stderr)
    finally:
        print_skipped(faults, str(table or folder))
    return splits, faults


def _listed(
    given: str | None,
    table: str | None,
    columns: Mapping[str, Any],
    ids: IdSource,
    on_error: OnFault,
    faults: list[Fault],
) -> list[tuple[RecordId, Picture]]:
    folder = Path(given) if given is not None else Path(str(table)).parent
    if not is_folder(folder):
        raise DataError("no such folder; --folder is the folder of the pictures", at=folder)
    found = pictures_from_names(folder) if table is None else pictures_from_table(Path(table), folder, **columns)
    pictures = list(sound_records(found, on_error, faults))
    if not pictures:
        endings = ", ".join(PICTURE_SUFFIXES)
        raise DataError(f"no usable picture; expected files ending in {endings} and their text", at=table or folder)
    return list(zip(assign_ids(pictures, ids), pictures, strict=True))


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
    scratch: Path,
    pictures: Iterable[tuple[RecordId, Picture, bytes]],
    shares: Mapping[str, float],
    seed: int,
    convert: Callable[[str], str],
) -> dict[str, SplitContent]:
    """Writes the tsv files; returns the splits that got a picture, in the order of `shares`."""
    splits: dict[str, SplitContent] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for image_id, picture, data in pictures:
            name = split_of(picture.name if picture.given_id is None else str(picture.given_id), shares, seed)
            if name not in files:
                files[name] = stack.enter_context(open(images_path(scratch, name), "wb"))
            files[name].write(image_line(image_id, data))
            split = splits.setdefault(name, SplitContent())
            split.num_images += 1
            for caption in dict.fromkeys(map(convert, picture.captions)):
                split.texts.setdefault(caption, []).append(image_id)
    return {name: splits[name] for name in shares if name in splits}


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
