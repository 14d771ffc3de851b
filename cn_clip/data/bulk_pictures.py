"""Pictures of a large collection, listed once and handed out in parts: folders, tar files, Parquet tables, LMDB."""

import bisect
import contextlib
import fnmatch
import itertools
import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, time
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from cn_clip.clip.picture_names import HEAD_BYTES, PICTURE_SUFFIXES, begins_as_picture, passed_over, suffix_of
from cn_clip.data.lmdb_store import IMAGES, ImageStore
from cn_clip.data.paths import spelled
from cn_clip.data.pictures import LmdbPictures, PictureSource, StoredPicture
from cn_clip.data.records import Digest, RecordId, canonical_id, digest_of
from cn_clip.data.spilled import Spilled, first_twice
from cn_clip.data.storage import EXTRA, FoundFile, Storage, is_uri, open_storage, read_ahead, shown
from cn_clip.data.tars import expand_braces, tar_members
from cn_clip.errors import ConfigError, DataError, Where, reading
from cn_clip.extras import require

logger = logging.getLogger(__name__)

ID_COLUMNS, PICTURE_COLUMNS = ("image_id", "id"), ("image", "image_bytes")
_SUFFIXES = {"pictures": PICTURE_SUFFIXES, "tar files": (".tar",), "Parquet files": (".parquet",)}
# Asks for all columns that a table, or the JSON of a sample, has; and what these cannot be called.
ALL_COLUMNS, RESERVED = "*", frozenset({"image_id", "text_id", "feature", "path", "thumbnail"})
# The text of a sample of a tar, and the suffixes of what lies beside its picture.
CAPTION, JSON, TEXT = "caption", ".json", ".txt"
# Texts so near to their picture are read with it.
_LARGEST_GAP = 1 << 16
_LISTING_THREADS, _FILES_AT_ONCE = 8, 1024
_ROW_GROUPS_KEPT = 2


class Part(PictureSource[RecordId], Protocol):
    """Some pictures of a collection, small enough to send to another machine, which reads them."""

    @property
    def ids(self) -> Sequence[RecordId]: ...

    @property
    def paths(self) -> Sequence[str] | None:
        """Where each picture lies, where that says more than its id."""
        ...


class Collection(NamedTuple):
    """All pictures of an address. digest: of what decides on them; part: those from one number to before another."""

    ids: Sequence[RecordId]
    digest: str
    part: Callable[[int, int], Part]


def open_collection(location: str, columns: Sequence[str] = ()) -> Collection:
    """The pictures of a location, local or a URI.

    location: an LMDB split or its `imgs` folder; tar files or Parquet tables by name, with {000..099} and `*` in the
    last part of the path; or a folder that holds, at any depth, pictures, tar files or tables.
    Ids: of an LMDB as there; of a folder the path below it, of a tar `TAR/KEY`, both as `paths.spelled` spells them; of
    a table its column `image_id` or `id`.
    columns: what `StoredPicture.beside` is to have: columns of tables, of tars `caption`, which is the text of a
    sample, and the fields of its JSON; ALL_COLUMNS for all.
    The listing lies in temporary files, of which little is in memory, but for the ids of an LMDB.
    Raises DataError naming what cannot be read, an address without pictures or with several kinds of files, and an id
    that comes twice; ConfigError for columns where there are none. Other files of a folder are counted in the log.
    """
    collection = _open(location, tuple(columns))
    if not len(collection.ids):
        raise DataError("holds no picture", at=shown(location))
    twice = first_twice(collection.ids, len(collection.ids))
    if twice is not None:
        raise DataError(f"image id {twice!r} comes twice; expected each id once", at=shown(location))
    return collection


def is_wanted(columns: Sequence[str], name: str) -> bool:
    """Whether a column is among those that were asked for; reserved names only if they are named."""
    return name in columns or (ALL_COLUMNS in columns and name not in RESERVED)


class _Ids(Sequence[RecordId]):
    """The ids of spilled records."""

    def __init__(self, records: Spilled, id_of: Callable[[Any], RecordId]) -> None:
        self._records, self._id_of = records, id_of

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        start, stop, step = index.indices(len(self)) if isinstance(index, slice) else (index, index + 1, 1)
        found = [self._id_of(record) for record in self._records.read(start, stop)][::step]
        return found if isinstance(index, slice) else found[0]

    def __iter__(self) -> Iterator[RecordId]:
        return map(self._id_of, self._records)


class _Kind:
    """The files of one kind that were found: their number, a digest of what decides on them, and where they are."""

    def __init__(self) -> None:
        self.digest, self.paths = Digest(), Spilled()

    def take(self, root: Storage, file: FoundFile) -> None:
        self.digest.add((root.below(file.path), file.size, file.mtime_ns))
        self.paths.append(file.path)


def _open(location: str, columns: tuple[str, ...]) -> Collection:
    folders = () if is_uri(location) else (Path(location), Path(location, IMAGES))
    lmdb = next((folder for folder in folders if (folder / "data.mdb").is_file()), None)
    if lmdb is not None:
        _refuse_columns(columns, location)
        ids, status = ImageStore(lmdb).ids, (lmdb / "data.mdb").stat()
        digest = digest_of([*ids, status.st_size, status.st_mtime_ns])
        return Collection(ids, digest, lambda start, stop: LmdbPictures(lmdb.absolute(), ids[start:stop]))
    root, files = _listed(location)
    kinds, others = {kind: _Kind() for kind in _SUFFIXES}, Counter[str]()
    kind_of = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes}
    while block := list(itertools.islice(files, _FILES_AT_ONCE)):
        begun = _begun_as_pictures(root, [file for file in block if not suffix_of(file.path)])
        for file in block:
            suffix = suffix_of(file.path)
            kind = "pictures" if file in begun else kind_of.get(suffix)
            if kind is None:
                others[f"x{suffix}"] += 1
            else:
                kinds[kind].take(root, file)
    found = {kind: one for kind, one in kinds.items() if len(one.paths)}
    if not found:
        raise DataError("holds no picture, tar or Parquet file, and is no LMDB", at=shown(location))
    if len(found) > 1:
        counts = ", ".join(f"{len(one.paths)} {kind}" for kind, one in found.items())
        name = shown(location).rstrip("/")
        raise DataError(f"holds {counts}; name one kind, such as {name}/*.tar", at=name)
    ((kind, chosen),) = found.items()
    sentence = passed_over(shown(location), others.elements())
    if sentence:
        logger.warning("%s", sentence)
    if kind == "Parquet files":
        return _open_tables(root, chosen, columns)
    if kind == "pictures":
        _refuse_columns(columns, location)
        return _collection(chosen.paths, chosen.digest.text, root, _whole_file, ())
    members = itertools.chain.from_iterable(
        read_ahead(lambda path: _members(root, path), chosen.paths, _LISTING_THREADS)
    )
    return _collection(Spilled(members), chosen.digest.text, root, _member, columns)


def _refuse_columns(columns: Sequence[str], location: str) -> None:
    if columns:
        raise ConfigError(
            f"column {columns[0]}: {shown(location)} has no columns, only pictures; give a table of metadata"
        )


def _collection(
    records: Spilled,
    digest: str,
    root: Storage,
    item_of: "Callable[[Storage, Any], _Item]",
    columns: tuple[str, ...],
) -> Collection:
    def part(start: int, stop: int) -> FilePart:
        return FilePart(root, [item_of(root, record) for record in records.read(start, stop)], columns)

    return Collection(_Ids(records, lambda record: item_of(root, record).id), digest, part)


def _begun_as_pictures(root: Storage, files: Sequence[FoundFile]) -> set[FoundFile]:
    """Those of the files whose first bytes are those of a picture."""

    def head(file: FoundFile) -> bytes:
        with root.at(file.path).open() as stream:
            return stream.read(HEAD_BYTES)

    heads = read_ahead(head, files, _LISTING_THREADS)
    return {file for file, beginning in zip(files, heads, strict=True) if begins_as_picture(beginning)}


def _listed(location: str) -> tuple[Storage, Iterator[FoundFile]]:
    """The folder that ids are relative to, and the files that a location names, or those below it."""
    address, mark, query = location.partition("?") if is_uri(location) else (location, "", "")
    marks = [position for position in map(address.find, "{*") if position >= 0]
    if not marks or (not is_uri(location) and Path(address).exists()):
        storage = open_storage(location)
        file = storage.find()
        if file is None:
            return storage, storage.walk()
        parent = address.rstrip("/").rpartition("/")
        return open_storage(f"{parent[0]}{parent[1] or '.'}{mark}{query}"), iter([file])
    start = address.rfind("/", 0, min(marks)) + 1
    root = open_storage(f"{address[:start] or '.'}{mark}{query}")
    return root, _fitting(root, expand_braces(address[start:]))


def _fitting(root: Storage, patterns: Iterable[str]) -> Iterator[FoundFile]:
    """The files that patterns name, one pattern after the other."""
    for pattern in patterns:
        folder, _, name = pattern.rpartition("/")
        if "*" in folder:
            raise DataError(f"{root.name}/{pattern}: expected * in the last part of the path alone")
        number = 0
        if "*" in name:
            for one in (root.child(folder) if folder else root).walk(recursive=False):
                if fnmatch.fnmatchcase(PurePosixPath(one.path).name, name):
                    number += 1
                    yield one
        elif (file := root.child(pattern).find()) is not None:
            number = 1
            yield file
        if not number:
            raise DataError("no such file", at=root.child(pattern).name)


# --- files, and members of tar files


class _Item(NamedTuple):
    """A picture: in `path` whole, or `size` bytes from `offset` on. beside: (suffix, offset, size) of its texts."""

    id: RecordId
    path: str
    name: str
    offset: int = 0
    size: int = -1
    beside: Sequence[tuple[str, int, int]] = ()


class FilePart:
    """Pictures that are files, or stretches of files, which have the columns beside them."""

    def __init__(self, storage: Storage, items: Sequence[_Item], columns: tuple[str, ...] = ()) -> None:
        self.storage, self.items, self.columns = storage, items, columns
        self.ids: Sequence[RecordId] = [item.id for item in items]
        self.paths: Sequence[str] | None = [item.name for item in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> StoredPicture[RecordId]:
        item = self.items[index]
        stored, where = Storage(self.storage.files, item.path, item.name), Where(item.name, id=item.id)
        if item.size < 0:
            return StoredPicture(item.id, stored.read(), where)
        stretches = [("", item.offset, item.size), *(item.beside if self.columns else ())]
        first = min(offset for _, offset, _ in stretches)
        last = max(offset + size for _, offset, size in stretches)
        if last - first > sum(size for _, _, size in stretches) + _LARGEST_GAP:  # they lie far from each other
            parts = {suffix: _stretch(stored, where, offset, size) for suffix, offset, size in stretches}
        else:
            data = _stretch(stored, where, first, last - first)
            parts = {suffix: data[offset - first : offset - first + size] for suffix, offset, size in stretches}
        return StoredPicture(item.id, parts.pop(""), where, _said(parts, self.columns, where))


def _stretch(stored: Storage, where: Where, offset: int, size: int) -> bytes:
    try:
        with stored.input_file() as stream:
            data: bytes = stream.read_at(size, offset)
    except OSError as error:
        raise DataError(f"cannot be read ({error})", at=where) from error
    if len(data) < size:
        raise DataError("the file became shorter while it was in use", at=where)
    return data


def _said(parts: Mapping[str, bytes], columns: Sequence[str], where: Where) -> dict[str, Any]:
    """The columns that the texts beside a picture of a tar give; raises DataError for texts that are none."""
    said: dict[str, Any] = {}
    if JSON in parts:
        with reading(where, DataError, what=f"its {JSON} cannot be read", step="write the tar again"):
            fields = json.loads(parts[JSON])
        if not isinstance(fields, dict):
            raise DataError(f"its {JSON} is no object; write the tar again", at=where)
        said = {name: value for name, value in fields.items() if is_wanted(columns, name) and value is not None}
    if TEXT in parts and is_wanted(columns, CAPTION):
        with reading(where, DataError, what=f"its {TEXT} cannot be read", step="write the tar again"):
            said[CAPTION] = parts[TEXT].decode("utf-8-sig").strip()
    return said


def _whole_file(root: Storage, path: str) -> _Item:
    return _Item(spelled(root.below(path)), path, root.at(path).name)


def _member(root: Storage, record: Sequence[Any]) -> _Item:
    path, key, name, offset, size, beside = record
    return _Item(
        f"{spelled(root.below(path))}/{key}", path, f"{root.at(path).name}/{name}", offset, size, [*map(tuple, beside)]
    )


def _members(root: Storage, path: str) -> list[Sequence[Any]]:
    """The records of the pictures of a tar, which `_member` reads."""
    stored, items, texts = root.at(path), list[tuple[str, Any]](), dict[str, list[tuple[str, int, int]]]()
    with stored.open() as stream:
        for member in tar_members(stream, stored.name):
            key, suffix = member.sample
            if key and suffix in PICTURE_SUFFIXES:
                items.append((key, member))
            elif key and suffix in (JSON, TEXT):
                texts.setdefault(key, []).append((suffix, member.offset, member.size))
    return [(path, key, one.name, one.offset, one.size, texts.get(key, [])) for key, one in items]


# --- Parquet tables


class _Rows(NamedTuple):
    """Rows `start` to `stop` of a row group; first: the number of the group's first row in the file."""

    path: str
    name: str
    group: int
    first: int
    start: int
    stop: int


class _Table(NamedTuple):
    ids: list[RecordId]
    rows: list[_Rows]
    column: str
    columns: frozenset[str]


class TablePart:
    """Pictures of Parquet tables, by row groups; a few of these are kept in memory."""

    paths = None

    def __init__(
        self,
        storage: Storage,
        ids: Sequence[RecordId],
        rows: Sequence[_Rows],
        column: str,
        beside: Sequence[str] = (),
    ) -> None:
        """column: that of the pictures; beside: others that are wanted."""
        self.storage, self.ids, self.rows, self.column, self.beside = storage, ids, rows, column, beside
        self._positions = [(piece, number) for piece in rows for number in range(piece.start, piece.stop)]
        self._kept: dict[_Rows, Any] = {}
        self._reading = threading.Lock()

    def __getstate__(self) -> tuple[Any, ...]:
        return self.storage, self.ids, self.rows, self.column, self.beside

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        TablePart.__init__(self, *state)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> StoredPicture[RecordId]:
        piece, number = self._positions[index]
        where = Where(piece.name, part=f"row {piece.first + number + 1}", id=self.ids[index])
        with self._reading, reading(where, DataError, step="write the table again"):  # a text may be no UTF-8
            if piece not in self._kept:
                if len(self._kept) >= _ROW_GROUPS_KEPT:
                    self._kept.pop(next(iter(self._kept)))
                with _parquet(Storage(self.storage.files, piece.path, piece.name)) as table:
                    self._kept[piece] = table.read_row_group(piece.group, columns=[self.column, *self.beside])
            row = {name: self._kept[piece].column(name)[number].as_py() for name in (self.column, *self.beside)}
        value = row.pop(self.column)
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"expected the bytes of a picture, got {type(data).__name__}", at=where.of(self.column))
        return StoredPicture(self.ids[index], data, where, _as_json(row, where))


def _as_json(row: Mapping[str, Any], where: Where) -> dict[str, Any]:
    """The cells of a row as JSON holds them, without empty ones; raises DataError for those it cannot hold."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, date | time):
            value = value.isoformat()
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            if isinstance(value, float):  # a number that is none
                continue
            raise DataError(
                f"expected what JSON holds, got {type(value).__name__}; name the columns that are wanted",
                at=where.of(name),
            ) from error
        if value not in (None, ""):
            found[name] = value
    return found


@contextlib.contextmanager
def _parquet(stored: Storage) -> Iterator[Any]:
    """A Parquet file, opened; what goes wrong with it is a DataError."""
    parquet = require("pyarrow.parquet", extra=EXTRA, purpose=stored.name)
    with (
        reading(stored.name, DataError, what="cannot be read as Parquet", step="write it again"),
        stored.input_file() as stream,
        parquet.ParquetFile(stream) as file,
    ):
        yield file


def _open_tables(root: Storage, found: _Kind, columns: tuple[str, ...]) -> Collection:
    ids, rows, starts = Spilled(), list[_Rows](), list[int]()
    kinds, names = set[str](), frozenset[str]()
    for table in read_ahead(lambda path: _table(root.at(path)), found.paths, _LISTING_THREADS):
        kinds.add(table.column)
        for piece in table.rows:
            starts.append(len(ids) + piece.first)
        rows += table.rows
        for image_id in table.ids:
            ids.append(image_id)
        names = table.columns if not names else names & table.columns
    if len(kinds) > 1:
        raise DataError(f"the tables have pictures in different columns, {sorted(kinds)}", at=root.name)
    (column,) = kinds
    missing = [name for name in columns if name != ALL_COLUMNS and name not in names]
    if missing:
        raise ConfigError(f"column {missing[0]}: {root.name} has {', '.join(sorted(names)) or 'no others'}")
    beside = [name for name in sorted(names) if is_wanted(columns, name) or (name == "path" and ALL_COLUMNS in columns)]

    def part(start: int, stop: int) -> TablePart:
        return TablePart(root, ids.read(start, stop), list(_cut(rows, starts, start, stop)), column, beside)

    return Collection(_Ids(ids, lambda one: one), found.digest.text, part)


def _table(stored: Storage) -> _Table:
    with _parquet(stored) as file:
        names = file.schema_arrow.names
        id_column = next((name for name in ID_COLUMNS if name in names), None)
        column = next((name for name in PICTURE_COLUMNS if name in names), None)
        if id_column is None or column is None:
            raise DataError(
                f"expected a column {' or '.join(ID_COLUMNS)} and one with the bytes of pictures, "
                f"{' or '.join(PICTURE_COLUMNS)}; it has {names}",
                at=stored.name,
            )
        values = file.read(columns=[id_column]).column(id_column).to_pylist()
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    if len(values) != sum(sizes):
        raise DataError(f"says it has {sum(sizes)} rows, and has {len(values)}; write it again", at=stored.name)
    rows, first = [], 0
    for group, size in enumerate(sizes):
        rows.append(_Rows(stored.path, stored.name, group, first, 0, size))
        first += size
    ids = [_id(value, Where(stored.name, part=f"row {row}")) for row, value in enumerate(values, 1)]
    return _Table(ids, rows, column, frozenset(names) - {id_column, column})


def _id(value: object, where: Where) -> RecordId:
    try:
        return canonical_id(value)
    except DataError as error:
        raise DataError(error, at=where) from error


def _cut(rows: Sequence[_Rows], starts: Sequence[int], start: int, stop: int) -> Iterator[_Rows]:
    """The pieces of rows `start` to `stop` counted over all of `rows`, which begin at `starts`."""
    for position in range(bisect.bisect_right(starts, start) - 1, bisect.bisect_left(starts, stop)):
        piece, begin = rows[position], starts[position]
        first, last = max(start - begin, 0), min(stop - begin, piece.stop)
        if first < last:
            yield piece._replace(start=first, stop=last)
