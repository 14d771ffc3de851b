"""The LMDB layout of a dataset split, `imgs` and `pairs`, as Chinese-CLIP lays it out; built and read only here."""

import contextlib
import io
import os
import pickle
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import lmdb

from cn_clip.data.records import NUM_IMAGES_KEY, RecordId, canonical_id, decode_base64, id_from_key, id_key
from cn_clip.digests import is_file
from cn_clip.errors import CnClipError, DataError, UnreadableError, Where, is_absent, reading

IMAGES = "imgs"
PAIRS = "pairs"
NUM_PAIRS_KEY = b"num_samples"

FIRST_MAP_BYTES = 16 * 2**20
BATCH_BYTES = 16 * 2**20
BATCH_ITEMS = 5000

BUILD_AGAIN = "build the dataset again"


class Pair(NamedTuple):
    """One training sample: a picture, a sentence that describes it."""

    image_id: RecordId
    text_id: RecordId
    text: str


def _writing(folder: Path, step: str = "is the disk full?") -> contextlib.AbstractContextManager[None]:
    return reading(folder, DataError, what="cannot be written", step=step)


class LmdbWriter:
    """Writes one LMDB folder; the map doubles when it is full.

    A context manager: leaving it without an error stores the count under `count_key` and flushes all to disk.
    Not for a folder that somebody reads: build beside it, then move.
    """

    def __init__(
        self, folder: Path, count_key: bytes, *, map_bytes: int = FIRST_MAP_BYTES, told: Path | None = None
    ) -> None:
        """told: how errors name the folder; default: by its path."""
        self._folder = told or folder
        with _writing(self._folder, "is the disk full, or the folder read-only?"):
            folder.mkdir(parents=True, exist_ok=True)
            # One sync at the end is enough: a folder that is not complete is never moved to its final path.
            # No file of locks: one process writes here, and of a full disk that file says nothing but SIGBUS.
            self._env = lmdb.open(
                os.fspath(folder), map_size=map_bytes, sync=False, metasync=False, meminit=False, lock=False
            )
        self._count_key = count_key
        self._batch: list[tuple[bytes, bytes]] = []
        self._batch_bytes = 0
        self.count = 0

    def put(self, key: bytes, value: bytes) -> None:
        """Stores a value, counted; written in batches."""
        self._batch.append((key, value))
        self._batch_bytes += len(key) + len(value)
        self.count += 1
        if self._batch_bytes >= BATCH_BYTES or len(self._batch) >= BATCH_ITEMS:
            self._flush()

    def _flush(self) -> None:
        with _writing(self._folder):
            while self._batch:
                try:
                    with self._env.begin(write=True) as transaction:
                        for key, value in self._batch:
                            transaction.put(key, value)
                    self._batch.clear()
                except lmdb.MapFullError:  # nothing of the batch was stored
                    self._env.set_mapsize(self._env.info()["map_size"] * 2)
        self._batch_bytes = 0

    def __enter__(self) -> "LmdbWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._batch.append((self._count_key, str(self.count).encode()))
                self._flush()
                with _writing(self._folder):
                    self._env.sync(True)
        finally:
            self._env.close()


class SplitWriter:
    """Writes both folders of a new split; a context manager that completes them on disk."""

    def __init__(self, folder: Path, *, told: Path | None = None) -> None:
        """told: how errors name the folder; default: by its path."""
        told = told or folder
        self._images = LmdbWriter(folder / IMAGES, NUM_IMAGES_KEY, told=told / IMAGES)
        self._pairs = LmdbWriter(folder / PAIRS, NUM_PAIRS_KEY, told=told / PAIRS)

    @property
    def num_images(self) -> int:
        """Pictures written so far."""
        return self._images.count

    @property
    def num_pairs(self) -> int:
        """Pairs written so far."""
        return self._pairs.count

    def put_image(self, image_id: RecordId, base64_text: bytes) -> None:
        """Stores a picture: the base64 text of its file."""
        self._images.put(id_key(image_id), base64_text)

    def put_pair(self, pair: Pair) -> None:
        """Stores a pair under the next number."""
        self._pairs.put(str(self.num_pairs).encode(), pickle.dumps(tuple(pair), protocol=4))

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._images.__exit__(kind, error, trace)
        finally:
            self._pairs.__exit__(kind, error, trace)


# One environment a folder and process: LMDB refuses to open a folder twice in a process.
_open_environments: "weakref.WeakValueDictionary[tuple[int, int], Any]" = weakref.WeakValueDictionary()
_opening = threading.Lock()
_owner_pid = os.getpid()


# Offsets within a page are of 16 bits: from so many bytes before the end of the file, a wrong one may lead behind it.
_REACH = 1 << 16
_BRANCH, _LEAF, _META, _BIG = 1, 2, 8, 1
_HEAD, _NODE = struct.Struct("<QHHHH"), struct.Struct("<HHHH")


def _open(folder: str, num_bytes: int) -> Any:
    """An environment that is safe to read: LMDB believes damaged pages, and near the end would read behind the end.

    Of pages before these, LMDB mostly says itself that they are damaged.
    """
    with reading(folder, UnreadableError, what="cannot be read as an LMDB", step=BUILD_AGAIN):
        environment = lmdb.open(folder, readonly=True, create=False, lock=False, readahead=False, meminit=False)
        needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    try:
        if num_bytes < needed:  # reading behind the end of a memory-mapped file kills the process
            raise DataError(f"{folder}/data.mdb: cut short, {num_bytes} of {needed} bytes; copy or build it again")
        path, page_bytes = Path(folder, "data.mdb"), environment.stat()["psize"]
        first = max(2, (num_bytes - _REACH) // page_bytes - 1)
        with reading(path, UnreadableError, step=BUILD_AGAIN), path.open("rb") as stream:
            stream.seek(first * page_bytes)
            pages = stream.read()
        for start in range(0, len(pages) - page_bytes + 1, page_bytes):
            number, page = first + start // page_bytes, pages[start : start + page_bytes]
            if not _is_sound(page, number, num_bytes):
                raise DataError(f"page {number} is damaged; copy or build it again", at=path)
    except CnClipError:
        environment.close()
        raise
    return environment


def _is_sound(page: bytes, number: int, num_bytes: int) -> bool:
    """Whether what a page points to lies in it, and long values in the file; true for parts of these."""
    own_number, _, flags, lower, upper = _HEAD.unpack_from(page)
    if own_number != number or not flags & (_BRANCH | _LEAF) or flags & _META:
        return True
    if not _HEAD.size <= lower <= upper <= len(page):
        return False
    for (offset,) in struct.iter_unpack("<H", page[_HEAD.size : lower - lower % 2]):
        if not upper <= offset <= len(page) - _NODE.size:
            return False
        low, high, node_flags, key_bytes = _NODE.unpack_from(page, offset)
        value, value_bytes = offset + _NODE.size + key_bytes, low | high << 16
        if not flags & _LEAF:
            value_bytes = 0  # its number is that of a page
        elif node_flags & _BIG:
            if value + 8 > len(page):
                return False
            (first,) = struct.unpack_from("<Q", page, value)
            if first * len(page) + _HEAD.size + value_bytes > num_bytes:
                return False
            value_bytes = 8
        if value + value_bytes > len(page):
            return False
    return True


class LmdbReader:
    """Random access to one LMDB folder. Opened at first use and again in each process, so it may be pickled, or
    inherited by forked workers."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._opened: tuple[int, Any] | None = None
        self._env()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _env(self) -> Any:
        global _owner_pid
        if self._opened is not None and self._opened[0] == os.getpid():
            return self._opened[1]
        data_file = Path(self.folder) / "data.mdb"
        try:
            status = data_file.stat()
        except OSError as error:
            if not is_absent(error):
                raise UnreadableError.of(data_file, error) from error
            raise DataError(
                f"no LMDB is here ({error.strerror}: data.mdb); give a folder that "
                "build_lmdb_dataset.py made, such as .../lmdb/train/imgs",
                at=self.folder,
            ) from error
        with _opening:
            if _owner_pid != os.getpid():  # a forked worker: it must not share the parent's handles
                for environment in list(_open_environments.values()):
                    environment.close()
                _open_environments.clear()
                _owner_pid = os.getpid()
            environment = _open_environments.get((status.st_dev, status.st_ino))
            if environment is None:
                environment = _open(self.folder, status.st_size)
                _open_environments[status.st_dev, status.st_ino] = environment
        self._opened = (os.getpid(), environment)
        return environment

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, or None; a copy, safe to keep."""
        what = f"cannot read key {key!r}"
        with reading(self.folder, UnreadableError, what=what, step=BUILD_AGAIN), self._env().begin() as transaction:
            value: bytes | None = transaction.get(key)
        return value

    def transaction(self) -> Any:
        """LMDB's own transaction for reading, in this process; its values are views of the map: copy what is kept."""
        return self._env().begin(buffers=True)

    def list_keys(self) -> Iterator[bytes]:
        """All keys in byte order."""
        with (
            reading(self.folder, UnreadableError, what="cannot list its keys", step=BUILD_AGAIN),
            self._env().begin() as transaction,
            transaction.cursor() as cursor,
        ):
            yield from cursor.iternext(keys=True, values=False)

    def stored_count(self, key: bytes) -> int:
        """The number under `num_images` or `num_samples`; raises DataError when there is none."""
        value = self.get(key)
        if value is None or not value.isdigit():
            raise DataError(
                f"expected a number under {key.decode()!r}, got {value!r}; "
                f"give the {IMAGES!r} folder for pictures, the {PAIRS!r} folder for pairs",
                at=self.folder,
            )
        return int(value)


class ImageStore:
    """The pictures of a split, by id or by index in key order (the order in which features are extracted)."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens an `imgs` folder; raises DataError when it is none."""
        self._reader = LmdbReader(folder)
        self.folder = self._reader.folder
        # As many as it says it holds.
        self.num_images = self._reader.stored_count(NUM_IMAGES_KEY)
        self._ids: list[RecordId] | None = None

    @property
    def ids(self) -> list[RecordId]:
        """The ids in LMDB byte order of their keys; raises DataError when they are not as many as it says.

        Then some were lost, or stayed from a build before: Chinese-CLIP builds into a folder without emptying it.
        """
        if len(self.listed) != self.num_images:
            raise DataError(
                f"num_images says {self.num_images}, but it holds {len(self.listed)} pictures; {BUILD_AGAIN}",
                at=self.folder,
            )
        return self.listed

    @property
    def listed(self) -> list[RecordId]:
        """As `ids`, however many they are."""
        if self._ids is None:
            keys = list(self._reader.list_keys())
            try:
                self._ids = [id_from_key(key) for key in keys if key != NUM_IMAGES_KEY]
            except DataError as error:
                raise DataError(error, at=self.folder) from error
        return self._ids

    def __len__(self) -> int:
        return len(self.ids)

    def base64(self, image_id: RecordId) -> bytes | None:
        """The base64 text as stored, or None when there is no such picture."""
        return self._reader.get(id_key(image_id))

    def where(self, image_id: RecordId) -> Where:
        """How an error about a picture begins: with the folder and the id."""
        return Where(self.folder, part=f"image id {image_id!r}", id=image_id)

    def picture(self, image_id: RecordId) -> bytes:
        """The bytes of the picture file; raises DataError that starts with `where`."""
        text = self.base64(image_id)
        if text is None:
            raise DataError("no such picture; build the dataset again", at=self.where(image_id))
        try:
            return decode_base64(text)
        except DataError as error:
            raise DataError(error, at=self.where(image_id)) from error


class _TripleUnpickler(pickle.Unpickler):
    """Builds tuples, ints and strings; whatever needs an import is refused, so a pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it asks for an outside object")


def unpickle_pair(data: bytes) -> Pair:
    """The (image id, text id, text) of a stored pair; raises DataError for anything else."""
    try:
        value = _TripleUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"refused, expected a pickled (image id, text id, text): {error}") from error
    if not (type(value) is tuple and len(value) == 3 and type(value[2]) is str):
        raise DataError(f"expected a pickled (image id, text id, text), got {repr(value)[:60]}")
    return Pair(canonical_id(value[0]), canonical_id(value[1]), value[2])


class PairStore:
    """The pairs of a split, by index."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Opens a `pairs` folder; raises DataError when it is none."""
        self._reader = LmdbReader(folder)
        self.folder = self._reader.folder
        self._num_pairs = self._reader.stored_count(NUM_PAIRS_KEY)

    def __len__(self) -> int:
        return self._num_pairs

    def __getitem__(self, index: int) -> Pair:
        """Pair `index`, 0 <= index < len; raises IndexError beyond, DataError naming the folder and the index."""
        if not 0 <= index < self._num_pairs:
            raise IndexError(f"{self.folder}: pair {index} of {self._num_pairs}")
        data = self._reader.get(str(index).encode())
        try:
            if data is None:
                raise DataError("it is missing; build the dataset again")
            return unpickle_pair(data)
        except DataError as error:
            raise DataError(f"pair {index}: {error}", at=self.folder) from error


def is_split_folder(folder: Path) -> bool:
    """Whether a folder holds both parts of a built split; raises UnreadableError."""
    return all(is_file(folder / part / "data.mdb") for part in (IMAGES, PAIRS))


# --- a whole split


@dataclass(frozen=True)
class Split:
    """Ids of the pictures, texts as written, (picture number, text number) of each pair in order."""

    image_ids: Sequence[RecordId]
    texts: list[str]
    pairs: list[tuple[int, int]]


def read_split(pairs: PairStore, image_ids: Sequence[RecordId]) -> Split:
    """Numbers pictures as in `image_ids` and texts by their first pair.

    Raises DataError for a pair whose picture is not in the split.
    """
    rows = [pairs[index] for index in range(len(pairs))]
    texts = {pair.text_id: pair.text for pair in rows}
    text_numbers = {text_id: number for number, text_id in enumerate(texts)}
    image_numbers = {image_id: number for number, image_id in enumerate(image_ids)}
    for number, pair in enumerate(rows):
        if pair.image_id not in image_numbers:
            raise DataError(f"pair {number} names the picture {pair.image_id!r}, which is missing", at=pairs.folder)
    numbers = [(image_numbers[pair.image_id], text_numbers[pair.text_id]) for pair in rows]
    return Split(image_ids, list(texts.values()), numbers)
