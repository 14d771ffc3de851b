"""The rows of tables that name pictures: CSV, TSV and Parquet."""

import csv
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from cn_clip import extras
from cn_clip.errors import DataError, Where, reading

# (line or row number from 1, its cells by column); surplus cells of a CSV line are under None.
Row: TypeAlias = tuple[int, dict[Any, Any]]


def csv_rows(table: Path, check: Callable[[Sequence[str]], None]) -> Iterator[Row]:
    """The rows of a CSV, or by its suffix TSV, file in UTF-8; `check` is given the columns before the first row.

    Raises DataError naming the file, and the line that is not CSV.
    """
    csv.field_size_limit(2**30)
    try:
        with open(table, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, dialect="excel-tab" if table.suffix.lower() == ".tsv" else "excel")
            check(reader.fieldnames or [])
            for row in reader:
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 near byte {error.start}; save the table as UTF-8", at=table) from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", at=table) from error
    except csv.Error as error:
        raise DataError(f"not valid CSV ({error})", at=Where(table, line=reader.line_num)) from error


def parquet_rows(table: Path, columns: Collection[str], check: Callable[[Sequence[str]], None]) -> Iterator[Row]:
    """The rows of a Parquet file, of these columns; `check` is given all its columns before the first row.

    Raises DataError naming the file, MissingExtraError without pyarrow.
    """
    parquet = extras.require("pyarrow.parquet", extra="parquet", purpose=f"reading the Parquet table {table}")
    explained = reading(table, DataError, what="cannot be read as Parquet", step="write it again")
    with explained, parquet.ParquetFile(table) as file:
        check(file.schema_arrow.names)
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
