"""Pictures of a large collection, listed once and handed out in parts: folders, tar files, Parquet tables, LMDB."""

import contextlib
import fnmatch
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from cn_clip.clip.picture_names import HEAD_BYTES, PICTURE_SUFFIXES, begins_as_picture, passed_over, suffix_of
from cn_clip.data.lmdb_store import IMAGES, ImageStore
from cn_clip.data.paths import spelled
from cn_clip.data.pictures import LmdbPictures, PictureSource, StoredPicture
from cn_clip.data.records import RecordId, canonical_id, digest_of
from cn_clip.data.storage import EXTRA, FoundFile, Storage, is_uri, open_storage, shown
from cn_clip.data.tars import expand_braces, tar_members
from cn_clip.errors import DataError, Where, reading
from cn_clip.extras import require

logger = logging.getLogger(__name__)

ID_COLUMNS, PICTURE_COLUMNS = ("image_id", "id"), ("image", "image_bytes")
_SUFFIXES = {"pictures": PICTURE_SUFFIXES, "tar files": (".tar",), "Parquet files": (".parquet",)}
_LISTING_THREADS = 8
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


def open_collection(location: str) -> Collection:
    """The pictures of a location, local or a URI.

    location: an LMDB split or its `imgs` folder; tar files or Parquet tables by name, with {000..099} and `*` in the
    last part of the path; or a folder that holds, at any depth, pictures, tar files or tables.
    Ids: of an LMDB as there; of a folder the path below it, of a tar `TAR/KEY`, both as `paths.spelled` spells them; of
    a table its column `image_id` or `id`. Raises DataError naming what cannot be read, an address without pictures or
    with several kinds of files, and an id that comes twice. Other files of a folder are counted in the log.
    """
    collection = _open(location)
    if not len(collection.ids):
        raise DataError("holds no picture", at=shown(location))
    seen: set[RecordId] = set()
    for image_id in collection.ids:
        if image_id in seen:
            raise DataError(f"image id {image_id!r} comes twice; expected each id once", at=shown(location))
        seen.add(image_id)
    return collection


def _open(location: str) -> Collection:
    folders = () if is_uri(location) else (Path(location), Path(location, IMAGES))
    lmdb = next((folder for folder in folders if (folder / "data.mdb").is_file()), None)
    if lmdb is not None:
        ids, status = ImageStore(lmdb).ids, (lmdb / "data.mdb").stat()
        digest = digest_of([*ids, status.st_size, status.st_mtime_ns])
        return Collection(ids, digest, lambda start, stop: LmdbPictures(lmdb.absolute(), ids[start:stop]))
    root, files = _listed(location)
    begun = _begun_as_pictures(root, [file for file in files if not suffix_of(file.path)])
    kinds = {
        kind: [file for file in files if suffix_of(file.path) in suffixes or (kind == "pictures" and file in begun)]
        for kind, suffixes in _SUFFIXES.items()
    }
    found = {kind: chosen for kind, chosen in kinds.items() if chosen}
    if not found:
        raise DataError("holds no picture, tar or Parquet file, and is no LMDB", at=shown(location))
    if len(found) > 1:
        counts = ", ".join(f"{len(chosen)} {kind}" for kind, chosen in found.items())
        name = shown(location).rstrip("/")
        raise DataError(f"holds {counts}; name one kind, such as {name}/*.tar", at=name)
    ((kind, chosen),) = found.items()
    sentence = passed_over(shown(location), {file.path for file in files} - {file.path for file in chosen})
    if sentence:
        logger.warning("%s", sentence)
    digest = digest_of((root.below(file.path), file.size, file.mtime_ns) for file in chosen)
    if kind == "Parquet files":
        return _open_tables(root, chosen, digest)
    if kind == "pictures":
        items = [_Item(spelled(root.below(file.path)), file.path, root.at(file.path).name) for file in chosen]
    else:
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            items = [item for members in pool.map(lambda file: _members(root, file), chosen) for item in members]
    return Collection([item.id for item in items], digest, lambda start, stop: FilePart(root, items[start:stop]))


def _begun_as_pictures(root: Storage, files: Sequence[FoundFile]) -> set[FoundFile]:
    """Those of the files whose first bytes are those of a picture."""

    def head(file: FoundFile) -> bytes:
        with root.at(file.path).open() as stream:
            return stream.read(HEAD_BYTES)

    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        return {
            file for file, beginning in zip(files, pool.map(head, files), strict=True) if begins_as_picture(beginning)
        }


def _listed(location: str) -> tuple[Storage, list[FoundFile]]:
    """The folder that ids are relative to, and the files that a location names, or those below it."""
    address, mark, query = location.partition("?") if is_uri(location) else (location, "", "")
    marks = [position for position in map(address.find, "{*") if position >= 0]
    if not marks or (not is_uri(location) and Path(address).exists()):
        storage = open_storage(location)
        file = storage.find()
        if file is None:
            return storage, storage.list_files()
        parent = address.rstrip("/").rpartition("/")
        return open_storage(f"{parent[0]}{parent[1] or '.'}{mark}{query}"), [file]
    start = address.rfind("/", 0, min(marks)) + 1
    root, files = open_storage(f"{address[:start] or '.'}{mark}{query}"), list[FoundFile]()
    for pattern in expand_braces(address[start:]):
        folder, _, name = pattern.rpartition("/")
        if "*" in folder:
            raise DataError(f"{root.name}/{pattern}: expected * in the last part of the path alone")
        if "*" in name:
            listed = (root.child(folder) if folder else root).list_files(recursive=False)
            found = [one for one in listed if fnmatch.fnmatchcase(PurePosixPath(one.path).name, name)]
        else:
            file = root.child(pattern).find()
            found = [] if file is None else [file]
        if not found:
            raise DataError("no such file", at=root.child(pattern).name)
        files += found
    return root, files


# --- files, and members of tar files


class _Item(NamedTuple):
    """A picture: in `path` whole, or `size` bytes from `offset` on."""

    id: RecordId
    path: str
    name: str
    offset: int = 0
    size: int = -1


class FilePart:
    """Pictures that are files, or stretches of files."""

    def __init__(self, storage: Storage, items: Sequence[_Item]) -> None:
        self.storage, self.items = storage, items
        self.ids: Sequence[RecordId] = [item.id for item in items]
        self.paths: Sequence[str] | None = [item.name for item in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> StoredPicture[RecordId]:
        item = self.items[index]
        stored, where = Storage(self.storage.files, item.path, item.name), Where(item.name, id=item.id)
        if item.size < 0:
            return StoredPicture(item.id, stored.read(), where)
        try:
            with stored.input_file() as stream:
                data: bytes = stream.read_at(item.size, item.offset)
        except OSError as error:
            raise DataError(f"cannot be read ({error})", at=where) from error
        if len(data) < item.size:
            raise DataError("the file became shorter while it was in use", at=where)
        return StoredPicture(item.id, data, where)


def _members(root: Storage, file: FoundFile) -> list[_Item]:
    stored, items = root.at(file.path), []
    with root.at(file.path).open() as stream:
        for member in tar_members(stream, stored.name):
            key, suffix = member.sample
            if key and suffix in PICTURE_SUFFIXES:
                image_id = f"{spelled(root.below(file.path))}/{key}"
                items.append(_Item(image_id, file.path, f"{stored.name}/{member.name}", member.offset, member.size))
    return items


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


class TablePart:
    """Pictures of Parquet tables, by row groups; a few of these are kept in memory."""

    paths = None

    def __init__(self, storage: Storage, ids: Sequence[RecordId], rows: Sequence[_Rows], column: str) -> None:
        self.storage, self.ids, self.rows, self.column = storage, ids, rows, column
        self._positions = [(piece, number) for piece in rows for number in range(piece.start, piece.stop)]
        self._kept: dict[_Rows, Any] = {}
        self._reading = threading.Lock()

    def __getstate__(self) -> tuple[Any, ...]:
        return self.storage, self.ids, self.rows, self.column

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
                    self._kept[piece] = table.read_row_group(piece.group, columns=[self.column]).column(self.column)
            value = self._kept[piece][number].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"expected the bytes of a picture, got {type(data).__name__}", at=where.of(self.column))
        return StoredPicture(self.ids[index], data, where)


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


def _open_tables(root: Storage, files: Sequence[FoundFile], digest: str) -> Collection:
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        tables = list(pool.map(lambda file: _table(root.at(file.path)), files))
    columns = {table.column for table in tables}
    if len(columns) > 1:
        raise DataError(f"the tables have pictures in different columns, {sorted(columns)}", at=root.name)
    (column,) = columns
    ids = [image_id for table in tables for image_id in table.ids]
    rows = [piece for table in tables for piece in table.rows]

    def part(start: int, stop: int) -> TablePart:
        return TablePart(root, ids[start:stop], list(_cut(rows, start, stop)), column)

    return Collection(ids, digest, part)


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
    return _Table(
        [_id(value, Where(stored.name, part=f"row {row}")) for row, value in enumerate(values, 1)], rows, column
    )


def _id(value: object, where: Where) -> RecordId:
    try:
        return canonical_id(value)
    except DataError as error:
        raise DataError(error, at=where) from error


def _cut(rows: Sequence[_Rows], start: int, stop: int) -> Iterator[_Rows]:
    """The pieces of rows `start` to `stop` counted over all of `rows`."""
    begin = 0
    for piece in rows:
        end = begin + piece.stop
        if begin < stop and start < end:
            yield piece._replace(start=max(start - begin, 0), stop=min(stop, end) - begin)
        begin = end
