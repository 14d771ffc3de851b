"""Feature files of numbers as they are in memory: npz for numpy, Parquet for tables; `files` calls them."""

# N rows, D embedding

import contextlib
import io
import json
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from typing import IO, Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cn_clip.clip.weights.file_kinds import check_unpacked
from cn_clip.data.records import RecordId, plain_id
from cn_clip.errors import DataError, Where, reading
from cn_clip.extras import require
from cn_clip.features.rows import Block, Blocks, Features, FloatArray, IdField, check_unique, first_not_finite
from cn_clip.files import atomic_write

Path: TypeAlias = "str | os.PathLike[str]"
# How the ids of a file are kept: integers, strings, or the JSON of each where they are of both kinds.
IdKind: TypeAlias = Literal["int", "str", "json"]

IDS, FEATURES, FIELD, ID_KIND = "ids", "features", "field", "id_kind"
FEATURE_COLUMN, PATH_COLUMN, THUMBNAIL_COLUMN = "feature", "path", "thumbnail"
# Names the columns whose values are JSON, for Parquet has no type for values of several kinds.
_JSON_COLUMNS = "json_columns"
METADATA_KEY = b"cn_clip"
# Rows that are read at once where not all are held.
_BLOCK_ROWS = 16384
_LARGEST_INT64 = 2**63 - 1
# What the ids of an npz may take, and how many times their own size if it is more.
_BYTES_A_CHARACTER, _LARGEST_IDS, _LARGEST_WASTE = 4, 1 << 26, 16
_NOT_KEPT = re.compile("[\0\ud800-\udfff]")

logger = logging.getLogger(__name__)


# --- npz


def write_npz(path: Path, field: IdField, ids: Sequence[RecordId], blocks: Blocks, embed_dim: int) -> None:
    """Writes `ids` (int64 or text), `features` (N, D) float32, `field` and `id_kind`, without pickled objects.

    Raises DataError when the folder is missing, and as `check_npz_ids`.
    """
    check_npz_ids(path, field, ids)
    kind, kept = _kept_ids(ids)
    with atomic_write(path, "wb") as stream, zipfile.ZipFile(stream, "w", allowZip64=True) as archive:
        _write_array(archive, IDS, np.array(kept, dtype=np.int64 if kind == "int" else np.str_))
        with archive.open(f"{FEATURES}.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), embed_dim)}
            np.lib.format.write_array_header_1_0(member, header)
            for block in blocks:
                member.write(np.ascontiguousarray(block, dtype="<f4").tobytes())
        _write_array(archive, FIELD, np.array(field))
        _write_array(archive, ID_KIND, np.array(kind))


def check_npz_ids(path: Path, field: IdField, ids: Sequence[RecordId]) -> None:
    """Raises DataError when one long id would make all of them take its room: numpy keeps texts at one length."""
    lengths = [len(one) for one in _kept_ids(ids)[1] if isinstance(one, str)]
    room = _BYTES_A_CHARACTER * max(lengths, default=0) * len(lengths)
    if room > _LARGEST_IDS and max(lengths) * len(lengths) > _LARGEST_WASTE * sum(lengths):
        position = lengths.index(max(lengths))
        raise DataError(
            f"{str(ids[position])[:40]!r}… has {max(lengths)} characters, as many as npz would keep of "
            f"each id ({room / 2**20:.0f} MiB); write parquet or jsonl",
            at=Where(path, field=field),
        )


def _write_array(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def read_arrays(
    path: Path, wanted: Sequence[str] | None = None, *, step: str
) -> tuple[dict[str, NDArray[Any]], list[str]]:
    """(the arrays of an npz, the names of all that it has). wanted: of these names only, those that it has.

    Raises DataError, which ends with `step`, for anything else, also for pickled objects.
    """
    check_unpacked(path, DataError)
    with (
        reading(path, DataError, what="cannot be read as npz", step=step),
        open(path, "rb") as stream,
        np.load(stream, allow_pickle=False) as arrays,
    ):
        names = list(arrays.files)
        found = {name: arrays[name] for name in names if wanted is None or name in wanted}
    for name, array in found.items():
        if not isinstance(array, np.ndarray):  # numpy hands out the bytes of a member that is no array
            raise DataError("is no numpy array; save the file with np.savez", at=Where(path, field=name))
        # numpy checks no code points of text; one beyond Unicode would be a SystemError where it is used.
        if array.dtype.kind == "U" and array.size and array.dtype.itemsize:
            points = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).reshape(-1).view(np.uint32)
            if points.max() > sys.maxunicode:
                raise DataError(f"holds {points.max():#x}, which is no character; {step}", at=Where(path, field=name))
    return found, names


def read_npz(path: Path, field: IdField) -> Features:
    """Reads an npz with `ids` and `features`, this package's or one that np.savez wrote; float types become float32.

    Raises DataError naming the file, and the row counted from 1, for anything else, also for pickled objects.
    """
    wanted, step = (IDS, FEATURES, FIELD, ID_KIND), "extract it again, or save ids as integers or text (np.str_)"
    found, names = read_arrays(path, wanted, step=step)
    if IDS not in found or FEATURES not in found:
        raise DataError(f"expected the arrays {IDS} and {FEATURES}, it has {names}", at=path)
    if str(found.get(FIELD, field)) != field:
        raise DataError(f"no {field}, only {found[FIELD]}; is this the file of the other modality?", at=path)
    ids, vectors = found[IDS], found[FEATURES]
    if ids.ndim != 1 or vectors.ndim != 2 or len(ids) != len(vectors):
        raise DataError(
            f"expected one id a row, {IDS} (N,) and {FEATURES} (N, D); got {ids.shape} and {vectors.shape}", at=path
        )
    if ids.dtype.kind not in "iuU":
        raise DataError(f"expected integers or text, got {ids.dtype}", at=Where(path, field=IDS))
    return _checked(path, field, ids.tolist(), _as_float32(path, vectors), str(found.get(ID_KIND, "")))


# --- Parquet


def write_parquet(path: Path, field: IdField, ids: Sequence[RecordId], blocks: Blocks, embed_dim: int) -> None:
    """Writes the columns `image_id` or `text_id` (int64 or string) and `feature` (fixed_size_list<float32>[D]).

    One row group a block; the metadata under "cn_clip" say how the ids are kept.
    Raises DataError when the folder is missing, MissingExtraError without pyarrow.
    """
    require_parquet()
    with atomic_write(path, "wb") as stream:
        _write_parquet(stream, field, ids, blocks, embed_dim)


def parquet_bytes(
    field: IdField,
    ids: Sequence[RecordId],
    rows_ND: FloatArray,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    facts: Mapping[str, object],
) -> bytes:
    """A file as `write_parquet` writes it, in memory.

    columns: as of `rows.Block`. facts: what JSON can hold, kept in the metadata for `parquet_facts`. Raises
    MissingExtraError without pyarrow.
    """
    sink = io.BytesIO()
    _write_parquet(sink, field, ids, [rows_ND], rows_ND.shape[1], columns=columns, facts=facts)
    return sink.getvalue()


def _write_parquet(
    stream: IO[bytes],
    field: IdField,
    ids: Sequence[RecordId],
    blocks: Blocks,
    embed_dim: int,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    facts: Mapping[str, object] | None = None,
) -> None:
    arrow, parquet = require_parquet()
    kind, kept = _kept_ids(ids)
    beside = {name: _kept_column(arrow, name, values) for name, values in (columns or {}).items()}
    as_json = [name for name, (_, is_json) in beside.items() if is_json]
    schema = [
        arrow.field(field, arrow.int64() if kind == "int" else arrow.string()),
        arrow.field(FEATURE_COLUMN, arrow.list_(arrow.field("element", arrow.float32()), embed_dim)),
        *(arrow.field(name, array.type) for name, (array, _) in beside.items()),
    ]
    told = {FIELD: field, ID_KIND: kind, **({_JSON_COLUMNS: as_json} if as_json else {}), **(facts or {})}
    schema = arrow.schema(schema, {METADATA_KEY: json.dumps(told)})
    with parquet.ParquetWriter(stream, schema, write_page_checksum=True) as writer:
        start = 0
        for block in blocks:
            numbers = arrow.array(np.ascontiguousarray(block, dtype=np.float32).reshape(-1))
            lists = arrow.FixedSizeListArray.from_arrays(numbers, embed_dim)
            arrays = [arrow.array(kept[start : start + len(block)], type=schema.field(0).type), lists]
            arrays += [array.slice(start, len(block)) for array, _ in beside.values()]
            writer.write_table(arrow.table(arrays, schema=schema))
            start += len(block)


def _kept_column(arrow: Any, name: str, values: Sequence[Any]) -> tuple[Any, bool]:
    """(the values as a column that gives them back as they were, whether each is kept as JSON)."""
    if name == THUMBNAIL_COLUMN:
        return arrow.array(values, type=arrow.binary()), False
    types = {type(value) for value in values if value is not None}
    plain = {str: arrow.string(), int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_()}
    only = next(iter(types), str) if len(types) <= 1 else None
    if only in plain:
        with contextlib.suppress(arrow.ArrowInvalid, OverflowError, UnicodeEncodeError):  # what JSON alone holds
            return arrow.array(values, type=plain[only]), False
    return arrow.array([None if value is None else json.dumps(value) for value in values], type=arrow.string()), True


class TableEnd(NamedTuple):
    """What the end of a Parquet file says of it. width: of its vectors, None where lists of any length are kept."""

    num_rows: int
    width: int | None
    facts: dict[str, Any]


def parquet_facts(stream: Any) -> TableEnd:
    """The end of a file that `parquet_bytes` made.

    Raises DataError when it is none, or damaged there.
    """
    _, parquet = require_parquet()
    what = "the end of the file: is no shard of features"
    with reading(None, DataError, what=what, step="extract it again"):  # the caller knows the file
        metadata = parquet.read_metadata(stream)
        facts = json.loads((metadata.metadata or {})[METADATA_KEY])
        width = getattr(metadata.schema.to_arrow_schema().field(FEATURE_COLUMN).type, "list_size", None)
    if not isinstance(facts, dict):
        raise DataError(f"the end of the file: expected an object of facts, got {type(facts).__name__}")
    return TableEnd(metadata.num_rows, width, facts)


def read_parquet(path: Path, field: IdField) -> Features:
    """Reads the columns `field` and `feature`, lists of any float type, as this package and others write them.

    Raises DataError naming the file, and the row counted from 1; MissingExtraError without pyarrow.
    """
    return _checked(path, field, *_read_table(path, field))


def parquet_blocks(path: Path, field: IdField, *, stream: Any = None, beside: bool = True) -> Iterator[Block]:
    """The rows in order, block by block; raises as `read_parquet`, but not for an id that an earlier block has.

    stream: the open file, where `path` is only its name. beside: also what lies beside the vectors.
    """
    start = 0
    for table in _table_blocks(path, field, _BLOCK_ROWS, stream=stream, beside=beside):
        features = _checked(path, field, table.ids, table.vectors, table.kind, start=start)
        start += len(features.ids)
        yield Block(*features, table.columns)


def parquet_ids(path: Path, field: IdField, *, stream: Any) -> list[RecordId]:
    """The ids alone, without the vectors; raises as `parquet_blocks`."""
    arrow, parquet = require_parquet()
    with (
        reading(path, DataError, what="cannot be read as Parquet", step="write it again"),
        parquet.ParquetFile(stream, page_checksum_verification=True) as file,
    ):
        kept = _plain(arrow, file.read(columns=[field]).column(field)).to_pylist()
        return _plain_ids(path, field, kept, str(_own_facts(file).get(ID_KIND, "")))


class _Rows(NamedTuple):
    """Rows as a file keeps them. kind: how the ids are kept."""

    ids: list[Any]
    vectors: FloatArray
    kind: str
    columns: Mapping[str, Sequence[Any]]


def _read_table(path: Path, field: IdField) -> tuple[list[Any], FloatArray, str]:
    """The ids as kept, the vectors, and how the ids are kept."""
    ids: list[Any] = []
    parts: list[FloatArray] = []
    kind = ""
    for block in _table_blocks(path, field):
        ids.extend(block.ids)
        kind = block.kind
        parts.append(block.vectors)
    widths = {vectors.shape[1] for vectors in parts}
    if len(widths) > 1:
        raise DataError(
            f"the row groups have vectors of {sorted(widths)} numbers", at=Where(path, field=FEATURE_COLUMN)
        )
    vectors = np.concatenate(parts) if parts else np.empty((0, 0), dtype=np.float32)
    return ids, vectors, kind


def _own_facts(file: Any) -> dict[str, Any]:
    """What this package wrote into the metadata of an open file; {} for those of another program."""
    with contextlib.suppress(ValueError, AttributeError):
        facts = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
        return facts if isinstance(facts, dict) else {}
    return {}


def _table_blocks(
    path: Path, field: IdField, num_rows: int | None = None, *, stream: Any = None, beside: bool = False
) -> Iterator[_Rows]:
    """The rows block by block: row group by row group, or so many rows at a time."""
    arrow, parquet = require_parquet()
    with (  # texts that are no UTF-8 fail as late as a column becomes Python's
        reading(path, DataError, what="cannot be read as Parquet", step="write it again"),
        parquet.ParquetFile(path if stream is None else stream, page_checksum_verification=True) as file,
    ):
        names = file.schema_arrow.names
        if field not in names or FEATURE_COLUMN not in names:
            raise DataError(
                f"expected the columns {field} and {FEATURE_COLUMN}, it has {names}; "
                "is this the file of the other modality?",
                at=path,
            )
        for name in (field, FEATURE_COLUMN):
            if names.count(name) > 1:
                raise DataError(f"has {names.count(name)} columns {name}; expected one", at=path)
        id_type, list_type = (file.schema_arrow.field(name).type for name in (field, FEATURE_COLUMN))
        _check_types(arrow, path, field, _plain_type(arrow, id_type), _plain_type(arrow, list_type))
        own, start = _own_facts(file), 1
        more = columns_beside(arrow, path, file.schema_arrow, field) if beside else []
        columns, as_json = [field, FEATURE_COLUMN, *more], own.get(_JSON_COLUMNS, [])
        tables = (
            (file.read_row_group(number, columns=columns) for number in range(file.num_row_groups))
            if num_rows is None
            else (arrow.Table.from_batches([one]) for one in file.iter_batches(batch_size=num_rows, columns=columns))
        )
        for table in tables:
            if not len(table):
                continue
            kept, lists = (_plain(arrow, table.column(name)) for name in (field, FEATURE_COLUMN))
            for name, column in ((field, kept), (FEATURE_COLUMN, lists)):
                if column.null_count:
                    empty = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
                    raise DataError(f"row {start + empty} {name}: is null", at=path)
            values = {name: values_beside(table.column(name).to_pylist(), name in as_json) for name in more}
            yield _Rows(kept.to_pylist(), _vectors(path, lists, start), str(own.get(ID_KIND, "")), values)
            start += len(table)


def columns_beside(arrow: Any, path: Path, schema: Any, field: IdField) -> list[str]:
    """The names of the columns beside ids and vectors whose values JSON holds, and of the thumbnails."""
    types = arrow.types
    fits = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    found, others = list[str](), list[str]()
    for name in schema.names:
        if name in (field, FEATURE_COLUMN):
            continue
        kind = (
            _plain_type(arrow, schema.field(schema.get_field_index(name)).type)
            if schema.names.count(name) == 1
            else None
        )
        is_date = kind is not None and (types.is_date(kind) or types.is_timestamp(kind))
        is_small_picture = name == THUMBNAIL_COLUMN and kind is not None and types.is_binary(kind)
        is_kept = is_small_picture or (name != THUMBNAIL_COLUMN and kind is not None and any(fit(kind) for fit in fits))
        (found if is_kept or is_date else others).append(name)
    if others:
        logger.warning("%s: columns that an index cannot hold are left out: %s", path, ", ".join(others))
    return found


def values_beside(values: list[Any], is_json: bool) -> list[Any]:
    """The values of a column as JSON holds them, None for a number that is none."""
    if is_json:
        return [None if value is None else json.loads(value) for value in values]
    first = next((value for value in values if value is not None), None)
    if isinstance(first, float):
        return [value if value is not None and np.isfinite(value) else None for value in values]
    if isinstance(first, date):
        return [None if value is None else value.isoformat() for value in values]
    return values


def require_parquet() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet; raises MissingExtraError saying how to install them."""
    return tuple(
        require(name, extra="parquet", purpose="a feature file in Parquet") for name in ("pyarrow", "pyarrow.parquet")
    )  # type: ignore[return-value]


def _plain_type(arrow: Any, column_type: Any) -> Any:
    """The type of the values of a dictionary, and of the lists that tensors of one dimension are kept as."""
    if arrow.types.is_dictionary(column_type):
        return column_type.value_type
    if isinstance(column_type, arrow.FixedShapeTensorType) and len(column_type.shape) == 1:
        return column_type.storage_type
    return column_type


def _check_types(arrow: Any, path: Path, field: IdField, id_type: Any, list_type: Any) -> None:
    known_ids: tuple[Callable[[Any], bool], ...] = (
        arrow.types.is_integer,
        arrow.types.is_string,
        arrow.types.is_large_string,
        getattr(arrow.types, "is_string_view", arrow.types.is_string),
    )
    if not any(fits(id_type) for fits in known_ids):
        raise DataError(f"expected integers or strings, got {id_type}", at=Where(path, field=field))
    known_lists = (arrow.types.is_fixed_size_list, arrow.types.is_list, arrow.types.is_large_list)
    if not any(fits(list_type) for fits in known_lists) or not arrow.types.is_floating(list_type.value_type):
        raise DataError(f"expected lists of floats, got {list_type}", at=Where(path, field=FEATURE_COLUMN))


def _plain(arrow: Any, column: Any) -> Any:
    """A column as one array of its plain type."""
    whole = column.combine_chunks()
    whole = whole.storage if isinstance(whole, arrow.ExtensionArray) else whole
    return whole.cast(_plain_type(arrow, column.type))


def _vectors(path: Path, lists: Any, start: int) -> FloatArray:
    """The vectors of a column; `start` is the number of its first row."""
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    width = int(lengths[0])
    if (lengths != width).any():
        row = int(np.argmax(lengths != width))
        raise DataError(
            f"row {start + row} {FEATURE_COLUMN}: has {lengths[row]} numbers, the rows before have {width}", at=path
        )
    values = lists.flatten()
    if values.null_count:
        row = int(np.argmax(values.is_null().to_numpy(zero_copy_only=False))) // max(width, 1)
        raise DataError(f"row {start + row} {FEATURE_COLUMN}: holds null", at=path)
    return _as_float32(path, values.to_numpy(zero_copy_only=False).reshape(len(lists), width))


# --- both


def _kept_ids(ids: Sequence[RecordId]) -> tuple[IdKind, list[RecordId]]:
    """How ids are kept, and as what: a column of one type that gives them back as they were."""
    if all(type(one) is int and -_LARGEST_INT64 <= one <= _LARGEST_INT64 for one in ids):
        return "int", list(ids)
    # numpy drops NUL at the end of a string, Parquet has no lone surrogates.
    if all(isinstance(one, str) and not _NOT_KEPT.search(one) for one in ids):
        return "str", list(ids)
    return "json", [json.dumps(one) for one in ids]


def _checked(
    path: Path, field: IdField, ids: list[Any], vectors_ND: FloatArray, kind: str, *, start: int = 0
) -> Features:
    """start: how many rows of the file come before these."""
    if not len(ids):
        raise DataError(f"the file has no rows; expected one vector and one {field} a row", at=path)
    if not vectors_ND.shape[1]:
        raise DataError("the vectors are empty", at=Where(path, field=FEATURES))
    faulty = first_not_finite(vectors_ND)
    if faulty is not None:
        raise DataError(
            f"row {start + faulty + 1} {FEATURE_COLUMN}: holds NaN or infinity; expected finite float32 numbers",
            at=path,
        )
    return Features(_plain_ids(path, field, ids, kind, start=start), vectors_ND)


def _plain_ids(path: Path, field: IdField, ids: list[Any], kind: str, *, start: int = 0) -> list[RecordId]:
    """The ids as they were before they were kept; raises DataError for what is none, and for one that comes twice."""
    if kind == "json":
        texts, ids = ids, []
        for row, text in enumerate(texts, start=start + 1):
            value = None
            with contextlib.suppress(ValueError):
                value = json.loads(str(text))
            if type(value) not in (int, str):
                what = f"row {row} {field}: expected the JSON of an integer or a string, got {text!r}"
                raise DataError(what, at=path)
            ids.append(value)
    plain = list(map(plain_id, ids))
    check_unique(plain, path, field)
    return plain


def _as_float32(path: Path, vectors: NDArray[Any]) -> FloatArray:
    if vectors.dtype.kind != "f":
        raise DataError(f"expected floats, got {vectors.dtype}", at=Where(path, field=FEATURES))
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(vectors, dtype=np.float32)


Write: TypeAlias = Callable[[Path, IdField, Sequence[RecordId], Blocks, int], None]
Read: TypeAlias = Callable[[Path, IdField], Features]
