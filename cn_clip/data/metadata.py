"""Tables of what is known of pictures besides their pixels: captions and any other columns."""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, TypeAlias

from cn_clip.data.tables import read_rows
from cn_clip.errors import DataError, Where
from cn_clip.language import both
from cn_clip.progress import counted
from cn_clip.retrieval.segments import ItemId, item_line

CAPTION_COLUMN = "text"

Table: TypeAlias = Mapping[str, Mapping[str, Any]]


def read_table(path: Path, image_column: str, *, own: AbstractSet[str]) -> Table:
    """Metadata by the picture file's path or the id; the first row of each counts.

    Empty cells are left out; the column `text` is called `caption`. own: names of columns that are taken.
    Raises DataError naming file and line, also for a column of such a name.
    """
    table: dict[str, dict[str, Any]] = {}
    for number, row in _rows(path, image_column):
        key = row.pop(image_column, None)
        if key is None or key == "":
            raise DataError(
                f"expected a picture in the column {image_column!r}; has {sorted(row)}", at=Where(path, line=number)
            )
        if type(key) not in (int, str):
            raise DataError(
                f"expected the name of a picture or an int, got {key!r}",
                at=Where(path, line=number, field=image_column),
            )
        taken = sorted(row.keys() & own)
        if taken:
            raise DataError(
                f"the column {taken[0]!r} is the index's own; give it another name", at=Where(path, line=number)
            )
        if CAPTION_COLUMN in row:
            row["caption"] = row.pop(CAPTION_COLUMN)
        name = str(key).removeprefix("./")
        try:
            item_line(name, row)
        except DataError as error:
            raise DataError(error, at=Where(path, line=number)) from error
        table.setdefault(name, {field: value for field, value in row.items() if value not in ("", None)})
    if not table:
        raise DataError(f"holds no row; expected a column {image_column!r} and a row for each picture", at=path)
    return table


def row_of(table: Table, item_id: ItemId, id_prefix: str = "") -> Mapping[str, Any] | None:
    """The row of an item: under its id as text, for a table may hold 7 or "7"."""
    bare = item_id.removeprefix(id_prefix) if isinstance(item_id, str) else item_id
    return table.get(str(bare))


def _rows(path: Path, image_column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    header = list[str]()

    def check(columns: Sequence[str]) -> None:
        header.extend(columns)
        if columns and image_column not in columns:
            raise DataError(
                f"expected a picture in the column {image_column!r}; has {sorted(columns)}", at=Where(path, line=1)
            )

    rows = read_rows(path, (image_column, CAPTION_COLUMN), check)
    for number, row in counted(rows, both("行", "rows"), both("读取表格", "reading the table")):
        if header and (None in row or None in row.values()):
            raise DataError(f"expected {len(header)} columns as in the first line", at=Where(path, line=number))
        yield number, {name: value for name, value in row.items() if name}
