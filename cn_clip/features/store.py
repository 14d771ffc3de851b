"""The row store: the rows that an extraction has computed so far, so that a killed run goes on where it stopped.

Each store holds two things: the facts of its job (what is extracted, from what, with what), and the rows so far. A run
with equal facts goes on; rows of other facts are never mixed in. There are two layouts:

`RowStore`, for one process: `X.partial` beside the output X, which disappears when X is written. A line of JSON with
the facts, padded to a multiple of 64 bytes, then the rows as little-endian float32 in the order of computing. Rows are
handed to the system batch by batch and not forced onto the disk: a killed process loses the batch in flight; a machine
that loses power loses what had not reached the disk, which shows as rows that are not of length 1: these, and all
behind them, are computed again. Only the finished output is forced onto the disk before it gets its name.

`Manifest` and shards, for many processes: a folder in which `manifest.json` holds the facts and appears first;
`part-00000.parquet` and the others appear whole, in any order, and carry the key of the manifest. So a shard is
finished if its file is there.

Example, of four rows of two numbers in batches of two; the run is killed in its second batch:

>>> import os, tempfile
>>> output = os.path.join(tempfile.mkdtemp(), "x.npz")
>>> rows = np.array([[1, 0], [0, 1], [0.6, 0.8], [0.8, 0.6]], dtype=np.float32)
>>> try:
...     with RowStore(output, {"data": "d"}, 2, tell=print) as store:
...         store.put(0, rows[:2])
...         raise KeyboardInterrupt
... except KeyboardInterrupt:
...     os.path.getsize(output + ".partial")  # {"embed_dim": 2, "job": {"data": "d"}} padded to 64, and 2 x 2 x 4 bytes
80
>>> with RowStore(output, {"data": "d"}, 2, tell=lambda line: None) as store:
...     store.num_rows  # so the run goes on with the third row
...     store.put(2, rows[2:])
...     store.rows()[:, 0].tolist()
...     store.is_written = True  # once the caller has written x.npz
2
[1.0, 0.0, 0.6000000238418579, 0.800000011920929]
>>> os.listdir(os.path.dirname(output))  # the store is gone
[]
"""

# M rows in the order of computing, N rows of a shard, D embedding

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cn_clip.data.records import RecordId, digest_of
from cn_clip.data.storage import FoundFile, Storage, StorageError, open_storage
from cn_clip.digests import is_file
from cn_clip.errors import CnClipError, ConfigError, DataError, UnreadableError, is_absent
from cn_clip.features.rows import Block, Features, FloatArray, IdField, check_unique
from cn_clip.features.shard_stats import ShardStats
from cn_clip.features.tables import parquet_blocks, parquet_bytes, parquet_facts, parquet_ids, require_parquet
from cn_clip.files import lock_file, replaceable, take
from cn_clip.language import both, counted

# The facts of a job: values that JSON can hold.
Job: TypeAlias = Mapping[str, object]
Tell: TypeAlias = Callable[[str], None]

SUFFIX = ".partial"
# The rows begin at a multiple of this, so that their memory map is aligned.
_ALIGNMENT = 64
_LARGEST_HEADER = 1 << 20
_BEGINNING = b'{"embed_dim": '
# Unit rows are that exact in float32; a row of zeros or of random bytes is not.
_LENGTH_TOLERANCE = 1e-3
_ROWS_A_LOOK = 8192

MANIFEST = "manifest.json"
SHARD_PREFIX, SHARD_SUFFIX = "part-", ".parquet"
_READING_THREADS = 16


# --- one process: a file


def job_text(job: Job) -> str:
    """The facts of a job as a finished output keeps them, to be recognised; equal facts give equal texts."""
    return json.dumps(job, sort_keys=True)


class RowStore:
    """The computed rows of one extraction, which sets `is_written` when the output holds them.

    A context manager: leaving it closes the file. It removes the file when it is empty, and when it is written unless
    the run was interrupted, for then the whole command is to be run again.
    """

    def __init__(self, output: str | os.PathLike[str], job: Job, embed_dim: int, tell: Tell) -> None:
        """Opens the file of `output` and goes on with it, or starts it again, saying why with `tell`.

        Raises DataError as `files.replaceable`, when the folder is not writable, or a file of that name holds something
        else; ConfigError when another process is at it.
        """
        replaceable(output)
        path = Path(output)
        self.path = path.with_name(f"{path.name}{SUFFIX}")
        self.embed_dim = embed_dim
        line = json.dumps({"job": job, "embed_dim": embed_dim}, sort_keys=True).encode()
        self._header = line + b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"
        try:
            self._lock = take(lock_file(path), f"{self.path}: another process is extracting into this file")
            try:
                self._stream = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by `_close`
            except OSError:
                self._lock.release()
                raise
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); choose another output path"
            raise DataError(reason, at=self.path) from error
        self._keep = False
        self.is_written = False
        self.num_rows = 0
        try:
            self._begin(tell)
        except BaseException:  # the caller has nothing to leave: the file and the lock go now
            self._close()
            raise

    def _begin(self, tell: Tell) -> None:
        self._stream.seek(0)
        content = self._stream.read(_LARGEST_HEADER)
        # Empty, zeros after a power failure, or begun as every header begins.
        if content.strip(b"\0") and content[: len(_BEGINNING)] != _BEGINNING[: len(content)]:
            raise DataError("is no file of computed rows; move it away, or choose another output path", at=self.path)
        found = content.partition(b"\n")[0]
        if found and found + b"\n" != self._header:
            try:
                old, new = json.loads(found), json.loads(self._header)
                names = {*old["job"], *new["job"]}
                other = sorted(name for name in names if old["job"].get(name) != new["job"].get(name))
                listed = ", ".join(other + ["embed_dim"] * (old["embed_dim"] != new["embed_dim"]))
                reason = both(
                    f"是另一次提取留下的（{listed} 不同），从头开始",
                    f"belongs to another extraction (other {listed}); starting from the beginning",
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                reason = both(
                    "看不出属于哪次提取，从头开始",
                    "does not say which extraction it belongs to; starting from the beginning",
                )
            tell(f"{self.path}: {reason}")
        elif found:
            self.num_rows = self._count()
            if self.num_rows:
                tell(
                    both(
                        f"{self.path}: 已有 {self.num_rows} 条，从第 {self.num_rows + 1} 条继续",
                        f"{self.path}: {counted(self.num_rows, 'row')} done, continuing at row {self.num_rows + 1}",
                    )
                )
                return
        self._stream.truncate(0)
        self._write(0, self._header)

    def _count(self) -> int:
        """Whole rows of length 1 at the beginning of the file."""
        whole = (os.fstat(self._stream.fileno()).st_size - len(self._header)) // (4 * self.embed_dim)
        rows_MD = self._map(max(whole, 0))
        for start in range(0, len(rows_MD), _ROWS_A_LOOK):
            lengths = np.linalg.norm(rows_MD[start : start + _ROWS_A_LOOK].astype(np.float64), axis=1)
            wrong = ~(np.abs(lengths - 1) < _LENGTH_TOLERANCE)
            if wrong.any():
                return start + int(np.argmax(wrong))
        return len(rows_MD)

    def put(self, first: int, rows_BD: FloatArray) -> None:
        """Keeps rows `first` to `first + B`; what was there from `first` on is dropped.

        Raises DataError, and keeps what is there, when they cannot be written.
        """
        assert first <= self.num_rows, "rows are computed in order"
        offset = len(self._header) + 4 * self.embed_dim * first
        self._write(offset, np.ascontiguousarray(rows_BD, dtype="<f4").tobytes())
        self.num_rows = first + len(rows_BD)

    def rows(self) -> FloatArray:
        """All rows (M, D), read from the file as they are looked at."""
        return self._map(self.num_rows)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Removes the file on a DataError, which going on would meet again; keeps it whatever else ends the run."""
        try:
            yield
        except DataError:
            if not self._keep:
                self.remove()
            raise

    def remove(self) -> None:
        """Deletes the file, once; while it is locked, lest it be another process's by then."""
        self.num_rows = 0
        if self._stream.closed:
            return
        self._stream.close()
        self.path.unlink(missing_ok=True)
        self._lock.release()

    def _close(self) -> None:
        """Closes the file, and removes it when nothing is in it."""
        with contextlib.suppress(OSError):
            if not os.fstat(self._stream.fileno()).st_size:
                self.path.unlink()
        self._stream.close()
        self._lock.release()

    def _map(self, count: int) -> FloatArray:
        if not count:
            return np.empty((0, self.embed_dim), dtype=np.float32)
        rows: NDArray[Any] = np.memmap(
            self._stream, dtype="<f4", mode="r", offset=len(self._header), shape=(count, self.embed_dim)
        )
        return rows

    def _write(self, offset: int, data: bytes) -> None:
        try:
            self._stream.truncate(offset)
            written = 0
            while written < len(data):
                written += self._stream.write(data[written:])
        except OSError as error:
            self._keep = True
            raise DataError(
                f"cannot be written ({error.strerror}); what is there is kept: free some space and run "
                "the command again, it goes on from there",
                at=self.path,
            ) from error

    def __enter__(self) -> "RowStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        has_ended = error is None or isinstance(error, CnClipError)
        if not self.num_rows or (self.is_written and has_ended):
            self.remove()
        else:
            self._close()


# --- many processes: a folder of shards


class Shard(NamedTuple):
    """Inputs `start` to before `stop`, which go into one file."""

    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The file name of the shard."""
        return f"{SHARD_PREFIX}{self.number:05d}{SHARD_SUFFIX}"


@dataclass(frozen=True)
class Skipped:
    """An input that could not be read; reason: where it is, and what is wrong."""

    id: RecordId
    reason: str


@dataclass(frozen=True)
class Finished:
    """What a shard holds: its rows, and the inputs that have none; stats: how it was made, of this run."""

    num_rows: int
    skipped: tuple[Skipped, ...] = ()
    stats: ShardStats | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Manifest:
    """What the shards of a folder are of.

    model, data: values that JSON can hold; each has a "digest", which differs from that of others.
    """

    field: IdField
    model: Mapping[str, object]
    data: Mapping[str, object]
    num_inputs: int
    shard_size: int

    @property
    def key(self) -> str:
        """A digest by which these shards differ from those of another job."""
        parts = [self.field, self.model["digest"], self.data["digest"], self.num_inputs, self.shard_size]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()

    def shards(self) -> list[Shard]:
        """The plan: every input in one shard, all of `shard_size` but the last."""
        starts = range(0, self.num_inputs, self.shard_size)
        return [
            Shard(number, start, min(start + self.shard_size, self.num_inputs)) for number, start in enumerate(starts)
        ]

    def fingerprint(self) -> str:
        """One line for people."""
        return f"{self.field} model {self.model['digest']} data {self.data['digest']} shard-size {self.shard_size}"

    def to_json(self) -> bytes:
        """The manifest as it is written, with the number of shards and its key."""
        num_shards = len(self.shards())
        record = {"format": "cn_clip feature shards 1", **asdict(self), "num_shards": num_shards, "key": self.key}
        return json.dumps(record, ensure_ascii=False, indent=2).encode() + b"\n"


def read_manifest(data: bytes, where: str) -> Manifest:
    """Raises DataError for anything but what `Manifest.to_json` writes."""
    try:
        record = json.loads(data)
        values = {name: record[name] for name in ("field", "model", "data", "num_inputs", "shard_size")}
        manifest = Manifest(**values)
        if manifest.key != record["key"] or manifest.shard_size < 1:
            raise ValueError("its key is another")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"is no manifest of feature shards ({error}); extract again with `cn-clip features --overwrite`", at=where
        ) from error
    return manifest


def begin_shards(folder: Storage, manifest: Manifest, *, overwrite: bool) -> dict[int, Finished]:
    """Makes the folder that of `manifest`, and returns the shards of it that are finished, by number.

    A shard that is damaged, or of another job, counts as not finished. overwrite: removes the shards that are there.
    Raises ConfigError naming both fingerprints when the folder is another job's, or holds shards without a manifest.
    """
    file = folder.child(MANIFEST)
    names = (folder.below(one.path) for one in folder.list_files(recursive=False))
    there = [name for name in names if name.startswith(SHARD_PREFIX) and name.endswith(SHARD_SUFFIX)]
    has_manifest = file.find() is not None
    if has_manifest and not overwrite:
        found = read_manifest(file.read(), file.name)
        if found.key != manifest.key:
            raise ConfigError(
                f"{folder.name}: holds the results of another extraction [{found.fingerprint()}], this run makes "
                f"[{manifest.fingerprint()}]; choose another --output, or start again with --overwrite"
            )
        return _finished(folder, manifest, there)
    if there and not overwrite:
        raise ConfigError(
            f"{folder.name}: holds {len(there)} Parquet shards but no {MANIFEST}; choose another --output, or remove "
            "them with --overwrite"
        )
    for name in [MANIFEST] * has_manifest + there:
        folder.child(name).delete()
    file.write(manifest.to_json())
    return {}


def _finished(folder: Storage, manifest: Manifest, there: Iterable[str]) -> dict[int, Finished]:
    shards = {shard.name: shard for shard in manifest.shards()}
    wanted = [shards[name] for name in there if name in shards]

    def look(shard: Shard) -> Finished | None:
        try:
            with folder.child(shard.name).open() as stream:
                return _report_of(stream, manifest, shard)[0]
        except StorageError:
            raise
        except DataError:  # damaged, or not this shard of this job
            return None

    with ThreadPoolExecutor(_READING_THREADS) as pool:
        found = zip(wanted, pool.map(look, wanted), strict=True)
        return {shard.number: finished for shard, finished in found if finished is not None}


def _report_of(stream: Any, manifest: Manifest, shard: Shard) -> tuple[Finished, int | None]:
    """What a shard holds, and the width of its vectors, None where its format does not say it.

    Raises DataError when a file is damaged, or not this shard of this job.
    """
    end = parquet_facts(stream)
    num_rows, facts = end.num_rows, end.facts
    try:
        skipped = tuple(Skipped(*one) for one in facts["skipped"])
        key, extent = facts["key"], facts["shard"]
    except (KeyError, TypeError) as error:
        raise DataError(f"does not say of which extraction it is ({error})") from error
    if key != manifest.key:
        raise DataError(f"is of another extraction, by its key {key!r}; that of the manifest is {manifest.key!r}")
    if extent != list(shard) or num_rows + len(skipped) != shard.stop - shard.start:
        raise DataError(f"holds {num_rows} rows of the inputs {extent}; expected those of {list(shard)}")
    return Finished(num_rows, skipped), end.width


def confirm_shards(folder: Storage, manifest: Manifest) -> dict[int, Finished]:
    """The shards of `manifest` that are in its folder now, by number, for a run that is about to say it is done.

    Raises ConfigError when the manifest there is not its own any more: another run has begun in the same folder.
    """
    refuse_replaced(folder, manifest)
    names = (folder.below(one.path) for one in folder.list_files(recursive=False))
    return _finished(folder, manifest, names)


def refuse_replaced(folder: Storage, manifest: Manifest) -> None:
    """Raises ConfigError unless the manifest in a folder is this one, DataError when it cannot be read."""
    file = folder.child(MANIFEST)
    found = read_manifest(file.read(), file.name)
    if found.key != manifest.key:
        raise ConfigError(
            f"{folder.name}: another run has taken the folder meanwhile [{found.fingerprint()}], and what this run "
            f"[{manifest.fingerprint()}] wrote does not count; give each run an --output of its own"
        )


def write_shard(
    folder: Storage,
    manifest: Manifest,
    shard: Shard,
    ids: Sequence[RecordId],
    rows_ND: FloatArray,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    skipped: Sequence[Skipped] = (),
    stats: ShardStats | None = None,
) -> Finished:
    """Writes a shard; it appears whole or not at all, instead of one that is there.

    columns: what lies beside the vectors, see `rows.Block`. stats: go into the metadata of the file. Raises
    DataError when it cannot be written, ConfigError when the folder has become that of another run, whose shards
    are left alone.
    """
    assert len(ids) + len(skipped) == shard.stop - shard.start, "every input has a row or a reason"
    facts: dict[str, Any] = {"key": manifest.key, "shard": list(shard)}
    facts["skipped"] = [[one.id, one.reason] for one in skipped]
    if stats is not None:
        facts["stats"] = stats.to_json()
    data = parquet_bytes(manifest.field, ids, rows_ND, columns=columns, facts=facts)
    refuse_replaced(folder, manifest)
    folder.child(shard.name).write(data)
    return Finished(len(ids), tuple(skipped), stats)


# --- reading a folder of shards


def is_shard_folder(path: Path) -> bool:
    """Whether a local folder holds shards that this package wrote; raises UnreadableError."""
    return is_file(path / MANIFEST)


@dataclass(frozen=True)
class ShardFolder:
    """The finished shards of an extraction, for whoever reads them; each is compared with the manifest as it is read.

    files: in the order of the inputs, as they were listed.
    """

    storage: Storage
    manifest: Manifest
    files: tuple[FoundFile, ...]

    @classmethod
    def opened(cls, storage: Storage, field: IdField) -> "ShardFolder":
        """Nothing but the manifest and the listing is read.

        Raises DataError for what is no such folder, one of the other modality, and for shards that are missing.
        """
        file = storage.child(MANIFEST)
        try:
            with file.stream() as stream:
                data = stream.read()
        except OSError as error:
            if not (isinstance(error, FileNotFoundError) or is_absent(error)):
                raise _unreadable(file, error) from error
            raise DataError(
                f"is a folder without {MANIFEST}; expected a feature file, or what "
                "`cn-clip features --engine ray` wrote into its --output",
                at=storage.name,
            ) from error
        manifest = read_manifest(data, file.name)
        if manifest.field != field:
            raise DataError(
                f"no {field}, only {manifest.field}; is this the folder of the other modality?", at=storage.name
            )
        there = {storage.below(one.path): one for one in storage.list_files(recursive=False)}
        shards = manifest.shards()
        missing = [shard.name for shard in shards if shard.name not in there]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(shards)} shards are missing ({missing[0]}); run the extraction again, "
                "it goes on where it stopped",
                at=storage.name,
            )
        return cls(storage, manifest, tuple(there[shard.name] for shard in shards))

    def __len__(self) -> int:
        return len(self.files)

    @property
    def shards(self) -> list[Shard]:
        """In the order of `files`."""
        return self.manifest.shards()

    def stamps(self, stop: int | None = None) -> str:
        """A digest of the first shards, or all, by which they differ from what is there once one is written again."""
        return digest_of([self.manifest.key, *((one.size, one.mtime_ns) for one in self.files[:stop])])

    def widths(self, start: int = 0) -> Iterator[tuple[Finished, int | None]]:
        """What the ends of the shards from number `start` on say: what each holds, and the width of its vectors.

        Raises DataError for a shard that is not of the manifest.
        """

        def look(shard: Shard) -> tuple[Finished, int | None]:
            with self._open(shard) as stream:
                return _report_of(stream, self.manifest, shard)

        with ThreadPoolExecutor(_READING_THREADS) as pool:
            yield from pool.map(look, self.shards[start:])

    def blocks(self, shard: Shard, *, beside: bool = True) -> Iterator[Block]:
        """The rows of a shard; raises DataError when it is damaged, or is not, by now, of the manifest."""
        with self._open(shard) as stream:
            _report_of(stream, self.manifest, shard)
            stream.seek(0)
            name = self.storage.child(shard.name).name
            yield from parquet_blocks(name, self.manifest.field, stream=stream, beside=beside)

    def ids(self, shard: Shard) -> list[RecordId]:
        """The ids of a shard, without its vectors; raises as `blocks`."""
        with self._open(shard) as stream:
            _report_of(stream, self.manifest, shard)
            stream.seek(0)
            return parquet_ids(self.storage.child(shard.name).name, self.manifest.field, stream=stream)

    def confirm(self) -> None:
        """Raises DataError when a shard, or the manifest, was written again since the folder was opened."""
        again = ShardFolder.opened(self.storage, self.manifest.field)
        if again.stamps() != self.stamps():
            raise DataError(
                "changed while it was read, and what was added may be of both; let it be written to its end, and run "
                "the same command again",
                at=self.storage.name,
            )

    @contextlib.contextmanager
    def _open(self, shard: Shard) -> Iterator[Any]:
        file = self.storage.child(shard.name)
        try:
            with file.stream() as stream:
                yield stream
        except OSError as error:
            if isinstance(error, DataError):
                raise
            raise _unreadable(file, error) from error
        except DataError as error:
            if error.path is not None:
                raise
            raise DataError(
                f"{error}; run the extraction again, which makes the shards that are not of {MANIFEST}", at=file.name
            ) from error


def _unreadable(file: Storage, error: OSError) -> UnreadableError:
    return UnreadableError.of(file.name, error, "is the disk there?" if file.is_local else "is the store there?")


def read_shards(folder: Path, field: IdField) -> Features:
    """All rows of a local folder in the order of the inputs; raises as `ShardFolder`, and for an id of two shards."""
    require_parquet()
    opened = ShardFolder.opened(open_storage(str(folder)), field)
    blocks = [block for shard in opened.shards for block in opened.blocks(shard, beside=False)]
    opened.confirm()
    widths = sorted({block.vectors.shape[1] for block in blocks})
    if len(widths) != 1:
        what = f"the files have vectors of {widths} numbers" if widths else "its files have no rows"
        raise DataError(f"{what}; extract it again", at=folder)
    ids = [item_id for block in blocks for item_id in block.ids]
    check_unique(ids, folder, field)
    return Features(ids, np.concatenate([block.vectors for block in blocks]))
