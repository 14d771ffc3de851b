"""The rows of tables that name pictures: CSV, TSV, JSON Lines, Parquet and Excel; the one reader of all commands.

Text tables are UTF-8, or else UTF-16 or GB18030, which is said in one line; commas, semicolons or tabs separate cells.
"""

import codecs
import contextlib
import csv
import io
import itertools
import logging
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date, datetime, time
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from cn_clip import extras
from cn_clip.clip.picture_names import PICTURE_SUFFIXES, suffix_of
from cn_clip.digests import is_file
from cn_clip.errors import DataError, Where, reading
from cn_clip.jsonl import read_objects
from cn_clip.language import both

# (line or row number from 1, its cells by column); surplus cells of a CSV line are under None, and cells that it lacks
# are None. Empty cells of other tables are "".
Row: TypeAlias = tuple[int, dict[Any, Any]]

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".xlsx")
# Bounds of an Excel table. Unpacked bytes: a million rows of usual captions are 200 MB of XML.
MOST_UNPACKED_BYTES = 512 << 20
MOST_COLUMNS = 256
MOST_ROWS = 1_048_576  # Excel's own
# A cell of more lines is no caption: a quotation mark that opens it is never closed.
MOST_CELL_LINES = 100
# What Excel shows instead of a value; read as empty.
EXCEL_ERRORS = frozenset({"#NULL!", "#DIV/0!", "#VALUE!", "#REF!", "#NAME?", "#NUM!", "#N/A", "#SPILL!", "#CALC!"})

_SEPARATORS = (",", ";", "\t")
_EXCELS_SEPARATOR = re.compile(r"\Asep=([,;\t])\r?\n", re.IGNORECASE)
_HEAD_CHARACTERS = 1 << 16
_CHUNK_BYTES = 1 << 20
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16 does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_THREE_BYTES = re.compile(rb"[\xe0-\xef][\x80-\xbf]{2}")
_BIG5_PAIRS = re.compile(rb"[\xa1-\xf9][\x40-\x7e\xa1-\xfe]")
_HIGH_BYTES = re.compile(rb"[\x80-\xff]")
_XLSX, _XLS = b"PK\x03\x04", b"\xd0\xcf\x11\xe0"
_BLOCK_ROWS = 1000

logger = logging.getLogger(__name__)


def read_rows(
    table: Path, wanted: Sequence[str], check: Callable[[Sequence[str]], None], *, only: Sequence[str] | None = None
) -> Iterator[Row]:
    """The rows of a table, of the kind that its suffix says; rows without any content are passed over.

    wanted: the columns of pictures and of texts. They decide what separates the cells of a text table, and are those
    of a table of two columns without a line of names, which is said in one line.
    check: called with the names of the columns before the first row (not for JSON Lines, where each row has its own).
    only: the columns of a Parquet file that are read; default: all.
    Raises DataError naming the file and the line; MissingExtraError without openpyxl or pyarrow.
    """
    suffix = table.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(
            f"expected a table whose name ends in one of {', '.join(TABLE_SUFFIXES)}; save it as one", at=table
        )
    if not is_file(table):
        raise DataError(f"no such file; give a table whose name ends in one of {', '.join(TABLE_SUFFIXES)}", at=table)
    if suffix == ".jsonl":
        yield from ((number, dict(row)) for number, row in read_objects(table))
    elif suffix == ".parquet":
        yield from _parquet_rows(table, check, only)
    else:
        lines = _xlsx_lines(table) if suffix == ".xlsx" else _text_lines(table, suffix, wanted)
        yield from _by_column(table, lines, wanted, check, is_ragged=suffix != ".xlsx")


# --- rows of cells to rows by column


def _by_column(
    table: Path,
    lines: Iterator[tuple[int, Sequence[Any]]],
    wanted: Sequence[str],
    check: Callable[[Sequence[str]], None],
    *,
    is_ragged: bool,
) -> Iterator[Row]:
    """is_ragged: cells without a name are a fault of the row, which its reader must know; else they are left out."""
    filled: Iterator[tuple[int, Sequence[Any]]] = (line for line in lines if any(str(cell).strip() for cell in line[1]))
    first, cells = next(filled, (1, ()))
    header = [str(cell).strip() for cell in cells]
    while header and not is_ragged and not header[-1]:
        header.pop()
    if not set(wanted) & set(header) and any(suffix_of(name) in PICTURE_SUFFIXES for name in header):
        header = _names_without_header(table, first, header, wanted)
        filled = itertools.chain([(first, cells)], filled)
    check(header)
    for number, cells in filled:
        row: dict[Any, Any] = dict(zip(header, cells, strict=False))
        surplus = list(cells[len(header) :])
        if is_ragged and any(surplus):
            row[None] = surplus
        yield number, row | dict.fromkeys(header[len(cells) :])


def _names_without_header(table: Path, first: int, cells: list[str], wanted: Sequence[str]) -> list[str]:
    """The names of the columns of a table whose first line is a row: of two, one of them with names of pictures."""
    is_picture = [suffix_of(cell) in PICTURE_SUFFIXES for cell in cells]
    if len(cells) != 2 or len(wanted) != 2 or all(is_picture):
        shown = ", ".join(cells)
        raise DataError(
            f"the first line, {shown[:80]!r}, is a row and names no columns; "
            f"put a line such as {','.join(wanted)} before it",
            at=Where(table, line=first),
        )
    names = list(wanted) if is_picture[0] else list(reversed(wanted))
    columns = ", ".join(names)
    in_chinese = f"没有表头，两列依次当作 {columns}"
    logger.warning("%s: %s", table, both(in_chinese, f"has no header; its two columns are taken as {columns}"))
    return names


# --- text tables


def _text_lines(table: Path, suffix: str, wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV or TSV file as cells, with their numbers."""
    csv.field_size_limit(2**30)
    try:
        encoding = _encoding_of(table)
        with open(table, encoding=encoding, newline="") as stream:
            head = stream.read(_HEAD_CHARACTERS)
        with open(table, encoding=encoding, newline="") as stream:
            if told := _EXCELS_SEPARATOR.match(head):
                stream.readline()
            separator = told[1] if told else _separator(head, suffix, wanted)
            yield from _cells(table, csv.reader(stream, delimiter=separator), 1 if told else 0)
    except UnicodeError as error:
        raise _undecoded(table, error) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", at=table) from error


def _cells(table: Path, reader: Any, num_before: int) -> Iterator[tuple[int, list[str]]]:
    """num_before: lines before those of the reader."""
    end = num_before
    try:
        for cells in reader:
            start, end = end + 1, reader.line_num + num_before
            if end - start >= MOST_CELL_LINES:
                raise DataError(
                    f"a cell goes over {end - start + 1} lines; close the quotation mark that opens it, or double one "
                    "that belongs to the text",
                    at=Where(table, line=start),
                )
            yield end, cells
    except csv.Error as error:
        raise DataError(f"not valid CSV ({error})", at=Where(table, line=reader.line_num + num_before)) from error


def _undecoded(table: Path, error: UnicodeError) -> DataError:
    if isinstance(error, UnicodeDecodeError):
        name = error.encoding.upper().replace("UTF8", "UTF-8")
        return DataError(f"invalid {name} near byte {error.start}; save the table as UTF-8", at=table)
    return DataError("its text is cut short; save the table as UTF-8", at=table)


def _separator(head: str, suffix: str, wanted: Sequence[str]) -> str:
    """What separates the cells of the first line: that by which it holds the most of the wanted columns, else cells."""

    def columns(separator: str) -> tuple[int, int]:
        try:
            cells = next(csv.reader(io.StringIO(head), delimiter=separator), [])
        except csv.Error:
            cells = []
        return len({cell.strip() for cell in cells} & set(wanted)), len(cells)

    usual = "\t" if suffix == ".tsv" else ","
    return max((usual, *_SEPARATORS), key=columns)  # the first of equals


def _encoding_of(table: Path) -> str:
    """The encoding of a text file, for `open`; says in one line when it is none of Unicode. Raises DataError."""
    with open(table, "rb") as stream:
        head = stream.read(4096)
    if head.startswith(_XLSX):
        raise DataError("is an Excel file by its content; rename it to .xlsx", at=table)
    if head.startswith(_XLS):
        raise DataError("is an old Excel file by its content; save it as .xlsx or .csv in Excel", at=table)
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    even, odd = head[:256:2].count(0), head[1:256:2].count(0)
    if abs(even - odd) > 1:  # of separators and line ends in UTF-16 without a mark
        return "utf-16-le" if odd > even else "utf-16-be"
    try:
        for _ in _decoded(table, "utf-8"):
            pass
    except UnicodeDecodeError:
        encoding = _chinese_encoding(table)
        if encoding is None:
            raise
        name = encoding.upper()
        logger.warning("%s: %s", table, both(f"不是 UTF-8，按 {name} 读取", f"is not UTF-8, read as {name}"))
        return encoding
    return "utf-8"


def _decoded(table: Path, encoding: str) -> Iterator[str]:
    """The text in pieces; raises UnicodeDecodeError whose `start` counts from the start of the file."""
    decoder, begin = codecs.getincrementaldecoder(encoding)(), 0
    with open(table, "rb") as stream:
        while True:
            data = stream.read(_CHUNK_BYTES)
            kept = len(decoder.getstate()[0])
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                error.start += begin - kept
                raise
            if not data:
                return
            begin += len(data)


def _chinese_encoding(table: Path) -> str | None:
    """GB18030, which has GBK and GB2312 in it, or Big5, of a file that is not UTF-8; None for what is neither.

    Nearly all bytes are some text in GB18030. So it is none if it holds what no text does, or if most of its bytes that
    are not ASCII are the three bytes of a Chinese character in UTF-8: then it is UTF-8, with damage. Of Chinese in GBK,
    one byte in twenty lies in such a three. The second byte of a character is ASCII for 4 in 10 of Big5, and for none
    of GB2312; the rarer characters of GBK begin with bytes that Big5 does not have.
    """
    num_high = num_in_threes = num_pairs = num_ascii = 0
    with open(table, "rb") as stream:
        while data := stream.read(_CHUNK_BYTES):
            num_high += len(_HIGH_BYTES.findall(data))
            num_in_threes += 3 * len(_THREE_BYTES.findall(data))
            pairs = _BIG5_PAIRS.findall(data)
            num_pairs += len(pairs)
            num_ascii += sum(pair[1] < 0x80 for pair in pairs)
    if 2 * num_in_threes > num_high:
        return None
    for encoding in ("big5", "gb18030") if 5 * num_ascii > num_pairs else ("gb18030",):
        with contextlib.suppress(UnicodeDecodeError):
            if not any(map(_holds_no_text, _decoded(table, encoding))):
                return encoding
    return None


def _holds_no_text(text: str) -> bool:
    """Whether it holds controls or characters that Unicode does not have."""
    unusual = set(text) - set("\t\r\n")
    return any(unicodedata.category(one) in ("Cc", "Cn", "Co", "Cs") for one in unusual)


# --- Excel


def _xlsx_lines(table: Path) -> Iterator[tuple[int, Sequence[Any]]]:
    """The rows of the first sheet as values, with their numbers; formulas as what Excel computed last."""
    openpyxl = extras.require("openpyxl", extra="xlsx", purpose=f"reading the Excel table {table}")
    _check_archive(table)
    explained = reading(table, DataError, what="cannot be read as .xlsx", step="save it again, as .xlsx or as .csv")
    with explained, open(table, "rb") as stream:
        with warnings.catch_warnings():  # of styles and rules, which are not read
            warnings.simplefilter("ignore")
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True, keep_links=False)
        sheets = [sheet for sheet in book.worksheets if hasattr(sheet, "reset_dimensions")]
        if not sheets:
            raise DataError("holds no sheet with cells; save the table as .xlsx or as .csv", at=table)
        sheet = next((one for one in sheets if one.sheet_state == "visible"), sheets[0])
        if len(sheets) > 1:
            count, title = len(sheets), sheet.title
            in_chinese = f"有 {count} 张工作表，只读取 {title}"
            logger.warning("%s: %s", table, both(in_chinese, f"has {count} sheets; only {title} is read"))
        sheet.reset_dimensions()  # some programs write wrong ones
        part = partial(sheet.iter_rows, min_row=1, max_row=MOST_ROWS, values_only=True)
        # The columns of the first row that is not empty are all that have names.
        heads = _quietly(part(max_col=MOST_COLUMNS + 1))
        columns = ([at for at, one in enumerate(row, 1) if one is not None] for row in heads)
        width = next(filter(None, columns), [1])[-1]
        if width > MOST_COLUMNS:
            raise DataError(f"has more than {MOST_COLUMNS} columns; leave only those of pictures and texts", at=table)
        for number, cells in enumerate(_quietly(part(max_col=width)), start=1):
            yield number, [_plain(cell) for cell in cells]


def _quietly(rows: Iterable[Any]) -> Iterator[Any]:
    """The same, without the warnings of their reader; what the caller warns of is heard."""
    source = iter(rows)
    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            block = list(itertools.islice(source, _BLOCK_ROWS))
        if not block:
            return
        yield from block


def _check_archive(table: Path) -> None:
    """Raises DataError for a file that is no archive, or that unpacks to more than `MOST_UNPACKED_BYTES`."""
    try:
        with zipfile.ZipFile(table) as archive:
            # No reader gets more of a member than what it declares.
            size = sum(member.file_size for member in archive.infolist())
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", at=table) from error
    except Exception as error:  # zipfile raises errors of several types on damaged directories
        with open(table, "rb") as stream:
            is_old = stream.read(4) == _XLS
        if is_old:
            what = "is an old .xls file or has a password; save it as .xlsx without a password, or as .csv"
            raise DataError(what, at=table) from error
        raise DataError("is not a complete .xlsx file; save it again, as .xlsx or as .csv", at=table) from error
    if size > MOST_UNPACKED_BYTES:
        raise DataError(
            f"unpacks to {size >> 20} MB, more than the {MOST_UNPACKED_BYTES >> 20} MB that are read; save it as .csv",
            at=table,
        )


def _plain(value: Any) -> Any:
    """A cell as JSON holds it: 3.0 as 3, dates as 2021-05-03 or 2021-05-03T14:22:10, no value and errors as ""."""
    if value is None or value in EXCEL_ERRORS:
        return ""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, datetime) and value.time() == time():
        return value.date().isoformat()
    if isinstance(value, (date, time)):
        return value.isoformat()
    return value if isinstance(value, (bool, int, float, str)) else str(value)


# --- Parquet


def _parquet_rows(table: Path, check: Callable[[Sequence[str]], None], only: Sequence[str] | None) -> Iterator[Row]:
    """The rows of a Parquet file; `check` is given all its columns."""
    parquet = extras.require("pyarrow.parquet", extra="parquet", purpose=f"reading the Parquet table {table}")
    explained = reading(table, DataError, what="cannot be read as Parquet", step="write it again")
    with explained, parquet.ParquetFile(table) as file:
        check(file.schema_arrow.names)
        rows = (row for batch in file.iter_batches(columns=only) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield number, {name: _from_parquet(value) for name, value in row.items()}


def _from_parquet(value: Any) -> Any:
    if value is None:
        return ""
    return _plain(value) if isinstance(value, (date, time)) else value
