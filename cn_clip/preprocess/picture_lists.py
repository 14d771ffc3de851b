"""Which pictures there are and what Chinese text they carry, from file names or a table; for dataset_from_folder."""

import csv
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cn_clip import extras
from cn_clip.clip.picture_names import is_picture_file, passed_over
from cn_clip.data.folders import walked
from cn_clip.data.names import characters, spelled
from cn_clip.data.records import Fault, RecordId, canonical_id
from cn_clip.digests import is_file
from cn_clip.errors import DataError, Where, reading

IdSource: TypeAlias = Literal["auto", "number", "sequence", "name"]
Row: TypeAlias = tuple[int, dict[str, Any]]

logger = logging.getLogger(__name__)

_LEADING_NUMBER = re.compile(r"[0-9]+")
_LEADING_COUNTER = re.compile(r"\A[0-9_\-\s]+")


@dataclass(frozen=True)
class Picture:
    """A picture file and its captions. `name` is its path below the folder, as `names.spelled` spells it; `given_id`
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

    Other files are counted in the log.
    """
    unread: list[Fault] = []
    found = _picture_files(folder, unread)
    yield from unread
    for path in found:
        name, text = spelled(path.relative_to(folder).as_posix()), characters(path.name)
        if text is None:
            yield Fault(name, None, "the file name is neither UTF-8 nor GBK, or holds controls; rename the file")
        elif caption := caption_of(text):
            yield Picture(path, unicodedata.normalize("NFC", name), (caption,))
        else:
            yield Fault(
                spelled(str(path)), None, "the file name carries no text; expected a name such as 0001妙蛙种子.png"
            )


def _picture_files(folder: Path, unread: list[Fault]) -> list[Path]:
    """The picture files; `unread` takes the folders that cannot be listed."""
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
    return sorted(found)


def pictures_from_table(
    table: Path, folder: Path, *, image_column: str, text_column: str, id_column: str | None
) -> Iterator[Picture | Fault]:
    """The pictures that a CSV, TSV or Parquet table names, in the order of their first rows.

    Several rows of one picture are several captions. Raises DataError when the table cannot be read or lacks a
    column.
    """
    merged: dict[str, tuple[Path, dict[str, None], RecordId | None]] = {}
    owners: dict[RecordId, str] = {}
    columns = [image_column, text_column, *([id_column] if id_column else [])]
    for line, row in _rows(table, columns):
        try:
            if None in row:
                raise DataError("has more cells than the first line; put a text with commas into double quotes")
            name, text = Path(_cell(row, image_column)).as_posix(), _cell(row, text_column)
            path = folder / name
            if not is_file(path):
                raise DataError(f"column {image_column!r} names {str(path)!r}, which does not exist")
            given_id = canonical_id(row[id_column]) if id_column else None
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
    value = row[column]
    if isinstance(value, (bytes, dict, list)):
        raise DataError(f"column {column!r}: expected text, got {type(value).__name__}; give a column of file names")
    text = "" if value is None else unicodedata.normalize("NFC", str(value)).strip()
    if not text:
        raise DataError(f"column {column!r} is empty")
    return text


def _rows(table: Path, columns: list[str]) -> Iterator[Row]:
    if not is_file(table):
        raise DataError("no such file; give a .csv, .tsv or .parquet table", at=table)
    reader = {".parquet": _parquet_rows, ".csv": _csv_rows, ".tsv": _csv_rows}.get(table.suffix.lower())
    if reader is None:
        raise DataError("expected a name ending in .csv, .tsv or .parquet", at=table)
    yield from reader(table, columns)


def _csv_rows(table: Path, columns: list[str]) -> Iterator[Row]:
    csv.field_size_limit(2**30)
    try:
        with open(table, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, dialect="excel-tab" if table.suffix.lower() == ".tsv" else "excel")
            _require_columns(table, columns, reader.fieldnames or [])
            for row in reader:
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 near byte {error.start}; save the table as UTF-8", at=table) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", at=table) from error
    except csv.Error as error:
        raise DataError(f"not valid CSV ({error})", at=Where(table, line=reader.line_num)) from error


def _parquet_rows(table: Path, columns: list[str]) -> Iterator[Row]:
    parquet = extras.require("pyarrow.parquet", extra="parquet", purpose=f"reading the Parquet table {table}")
    explained = reading(table, DataError, what="cannot be read as Parquet", step="write it again")
    with explained, parquet.ParquetFile(table) as file:
        _require_columns(table, columns, file.schema_arrow.names)
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        yield from enumerate(rows, start=1)


def _require_columns(table: Path, columns: list[str], present: Iterable[str]) -> None:
    names = list(present)
    for column in columns:
        if column not in names:
            raise DataError(f"has no column {column!r}; it has {', '.join(names) or 'none'}", at=table)


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
    if source == "number":
        return _unique_numbers(pictures)
    makers: dict[str, Callable[[int, Picture], RecordId]] = {
        "sequence": lambda index, _: index,
        "name": lambda _, picture: canonical_id(picture.name),
    }
    return [makers[source](index, picture) for index, picture in enumerate(pictures)]


def _leading_number(picture: Picture) -> int | None:
    match = _LEADING_NUMBER.match(picture.path.name)
    return int(match[0]) if match and len(match[0]) <= 18 else None  # beyond that it is no counter


def _unique_numbers(pictures: list[Picture]) -> list[RecordId]:
    owners: dict[RecordId, Picture] = {}
    for picture in pictures:
        number = _leading_number(picture)
        if number is None:
            raise DataError("the file name starts with no number; use --ids sequence or name", at=picture.path)
        if owners.setdefault(number, picture) is not picture:
            raise DataError(f"its number {number} is also that of {owners[number].path}", at=picture.path)
    return list(owners)
